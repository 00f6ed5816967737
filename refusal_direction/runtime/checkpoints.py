"""Checkpoints in files: the finished parts of a run that has not ended, used again by --resume.

Each part is one file, in a folder named by a fingerprint of everything that its numbers depend on. A run with another
fingerprint never sees them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from refusal_direction.config import CHECKPOINTS
from refusal_direction.runtime.files import write_atomically
from refusal_direction.runtime.processes import rank
from refusal_direction.runtime.store import Part, digest

__all__ = ["Checkpoints", "forget"]

log = logging.getLogger(__name__)


class Checkpoints:
    """The finished parts of one run.

    Args:
        output_dir: the folder of its results.
        fingerprint: of the run.
        resume: whether existing parts may be used; otherwise those of any earlier run are removed.
    """

    def __init__(self, output_dir: Path, fingerprint: str, *, resume: bool) -> None:
        self._all = output_dir / CHECKPOINTS
        self._folder = self._all / fingerprint[:32]
        self._full = False
        if resume and not self._folder.is_dir():
            other = " The checkpoints there belong to another model, other prompts or another setting."
            log.warning(
                "There is nothing to resume in %s; starting anew.%s", output_dir, other if self._all.is_dir() else ""
            )
        if not resume and rank() == 0:
            forget(output_dir)

    def key(self, *parts: Any) -> str:
        """The first half of the digest of the parts."""
        return digest(*parts)[:32]

    def load(self, key: str) -> Part | None:
        """The part with this key, if it was finished and has not been changed since."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s); it is computed again.", path, error)
            return None
        record = metadata.get("record", "")
        if metadata.get("digest") != _digest(key, tensors, record):
            log.warning("%s is not as it was written; it is computed again.", path)
            return None
        return Part(tensors, **_restored(record))

    def load_all(self, prefix: str) -> Iterator[Part]:
        """The finished parts whose keys have this prefix."""
        for path in sorted(self._folder.glob(f"{prefix}*.safetensors")):
            if (part := self.load(path.stem)) is not None:
                yield part

    def save(self, key: str, part: Part) -> None:
        """Keep a finished part; a crash leaves it complete or absent. On a full disk the run continues without them."""
        if self._full:
            return
        tensors = {name: tensor.contiguous() for name, tensor in part.tensors.items()}
        record = json.dumps({"seconds": part.seconds, "leak": part.leak, "warnings": part.warnings})
        content = save(tensors, metadata={"digest": _digest(key, tensors, record), "record": record})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(key), content)
        except OSError as error:
            self._full = True
            log.warning("Checkpoints for --resume cannot be written (%s); the run continues without them.", error)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"


def _restored(record: str) -> dict[str, Any]:
    values = json.loads(record)
    return {**values, "warnings": tuple(values["warnings"])}


def _digest(key: str, tensors: Mapping[str, Tensor], record: str) -> str:
    return digest(key, record, sorted(tensors), *(tensors[name] for name in sorted(tensors)))


def forget(output_dir: Path) -> None:
    """Remove the checkpoints in a folder of results: the run has ended, or another begins."""
    shutil.rmtree(output_dir / CHECKPOINTS, ignore_errors=True)
