"""Finished parts of a run that has not ended: kept as they come, found again with --resume.

Each part is one file, written whole or not at all, in a folder named by a fingerprint of all that its numbers depend on: the
weights and how they are loaded, every prompt's tensors, the refusal tokens, and the versions that computed. A run with
another fingerprint never sees them.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from refusal_direction.config import UNFINISHED, Config
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.runtime.processes import rank
from refusal_direction.runtime.store import digest

__all__ = ["Checkpoints", "fingerprint", "forget"]

log = logging.getLogger(__name__)

_SAMPLED = 256  # elements of each weight that tell a model from another
_FORM = 3  # of what is kept; another one is not read


def fingerprint(
    config: Config,
    chat: ChatModel,
    inputs: Sequence[Mapping[str, Tensor]],
    tokens: RefusalTokens,
    *,
    sets: Mapping[str, Sequence[int]] | None = None,
    given: bool = False,
) -> str:
    """What the numbers of a run depend on. Thresholds do not matter: what is kept are scores, not decisions.

    Args:
        config: says where the weights come from, and how they are loaded.
        chat: the model.
        inputs: the model's inputs for every prompt.
        tokens: the refusal tokens.
        sets: which of the prompts are in which set.
        given: whether the model was handed over in memory, where it may have been trained further: then some elements of
            each weight count as well. Of one that was just loaded they do not: which of them are in memory, and which on
            disk, depends on the memory that is free. With an adapter from the Hub they count, too: nothing else tells which
            revision it is, and all are in memory.
    """
    versions = [torch.__version__, transformers.__version__, _FORM]
    tensors = (tensor for one in inputs for _, tensor in sorted(one.items()))
    source = config.model
    files = [_files(Path(name)) for name in (source.model_id, source.adapter) if name is not None]
    weights = [vars(source), chat.revision, files, str(chat.model.dtype)]
    settings = [str(chat.model.device.type), tokens.ids, chat.n_positions, sets]
    sampled = given or (source.adapter is not None and not Path(source.adapter).is_dir())
    return digest(versions, weights, settings, *(_samples(chat.model) if sampled else ()), *tensors)


def _samples(model: nn.Module) -> Iterator[Tensor]:
    for weight in (*model.parameters(), *model.buffers()):
        if not weight.is_meta:
            flat = weight.detach().flatten()
            yield flat[:: flat.numel() // _SAMPLED | 1].cpu()  # an odd step, so that it meets every column of most


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
        self._full = False
        if resume and not self._folder.is_dir():
            other = " What is kept there is of another model, other prompts or another setting."
            different = other if self._all.is_dir() else ""
            log.warning("There is nothing to resume in %s; starting anew.%s", output_dir, different)
        if not resume and rank() == 0:
            forget(output_dir)

    def key(self, *parts: Any) -> str:
        return digest(*parts)[:32]

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The part with this key, if it was finished and is still what was kept."""
        path = self._folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                whole = (file.metadata() or {}).get("digest") == _digest(key, part)
        except (SafetensorError, OSError) as error:
            log.warning("%s cannot be read (%s); it is computed again.", path, error)
            return None
        if not whole:
            log.warning("%s is not what was written there; it is computed again.", path)
        return part if whole else None

    def load_all(self, beginning: str) -> Iterator[dict[str, Tensor]]:
        """The finished parts whose keys begin so."""
        for path in sorted(self._folder.glob(f"{beginning}*.safetensors")):
            if (part := self.load(path.stem)) is not None:
                yield part

    def save(self, key: str, part: Mapping[str, Tensor]) -> None:
        """Keep a finished part; a crash leaves it whole or absent. Where there is no room the run goes on without."""
        if self._full:
            return
        path = self._folder / f"{key}.safetensors"
        half = path.with_suffix(f".{os.getpid()}.half")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with half.open("wb") as file:
                tensors = {name: tensor.contiguous() for name, tensor in part.items()}
                file.write(save(tensors, metadata={"digest": _digest(key, tensors)}))
                file.flush()
                os.fsync(file.fileno())
            half.replace(path)
        except OSError as error:
            self._full = True
            with suppress(OSError):
                half.unlink(missing_ok=True)
            log.warning("Finished parts cannot be kept for --resume (%s); the run goes on without.", error)


def _digest(key: str, part: Mapping[str, Tensor]) -> str:
    return digest(key, sorted(part), *(part[name] for name in sorted(part)))


def forget(output_dir: Path) -> None:
    """Remove what is kept in a folder of results: the run has ended, or another begins."""
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
