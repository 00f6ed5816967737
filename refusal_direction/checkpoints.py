"""Finished parts of a run that has not ended: kept as they come, found again with --resume.

Each part is one file, written whole or not at all, in a folder named by a fingerprint of all that its numbers depend on: the
weights and how they are loaded, every prompt's tensors, the refusal tokens, and the versions that computed. A run with
another fingerprint never sees them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from refusal_direction.config import UNFINISHED, Config
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.processes import rank
from refusal_direction.store import digest

__all__ = ["Checkpoints", "fingerprint", "forget"]

log = logging.getLogger(__name__)

_FORM = 1  # of what is kept; another one is not read


def fingerprint(config: Config, chat: ChatModel, inputs: Sequence[Mapping[str, Tensor]], tokens: RefusalTokens) -> str:
    """What the numbers of a run depend on. Thresholds do not matter: what is kept are scores, not decisions."""
    versions = [torch.__version__, transformers.__version__, _FORM]
    tensors = (tensor for one in inputs for _, tensor in sorted(one.items()))
    weights = [vars(config.model), chat.revision, _files(Path(config.model.model_id)), str(chat.model.dtype)]
    return digest(versions, weights, str(chat.model.device.type), tokens.ids, chat.n_positions, *tensors)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of what a local model is made of."""
    if not folder.is_dir():
        return []
    facts = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return [(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts]


class Checkpoints:
    """The finished parts of one run.

    Args:
        output_dir: where its results will be.
        fingerprint: of the run.
        resume: whether parts that are there may be used; otherwise those of any earlier run are removed.
    """

    def __init__(self, output_dir: Path, fingerprint: str, *, resume: bool) -> None:
        self._all = output_dir / UNFINISHED
        self._folder = self._all / fingerprint[:32]
        if resume and not self._folder.is_dir():
            different = (
                " What is kept there is of another model, other prompts or another setting." * self._all.is_dir()
            )
            log.warning("There is nothing to resume in %s; starting anew.%s", output_dir, different)
        if not resume and rank() == 0:
            forget(output_dir)

    def key(self, *parts: Any) -> str:
        return digest(*parts)[:32]

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The part with this key, if it was finished."""
        path = self._folder / f"{key}.safetensors"
        try:
            return load_file(path) if path.is_file() else None
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s); it is computed again.", path, error)
            return None

    def save(self, key: str, part: Mapping[str, Tensor]) -> None:
        """Keep a finished part; a crash leaves it whole or absent."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{key}.safetensors"
        half = path.with_suffix(f".{os.getpid()}.half")
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, half)
        with half.open("rb") as file:
            os.fsync(file.fileno())
        half.replace(path)


def forget(output_dir: Path) -> None:
    """Remove what is kept in a folder of results: the run has ended, or another begins."""
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
