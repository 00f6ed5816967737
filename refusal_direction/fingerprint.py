"""The fingerprint of a run: everything that its scores depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from refusal_direction.config import Config
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.prompts.sets import PromptSet, set_name
from refusal_direction.runtime.store import digest

__all__ = ["fingerprint"]

_SAMPLED = 256  # elements of each weight that enter the hash
_FORMAT = 4  # of checkpoints


def fingerprint(
    config: Config,
    chat: ChatModel,
    inputs: Sequence[Mapping[str, Tensor]],
    tokens: RefusalTokens,
    *,
    sets: Mapping[PromptSet, Sequence[int]] | None = None,
    hash_weights: bool = False,
) -> str:
    """SHA-256 of everything that scores depend on. Thresholds are excluded: checkpoints hold scores, not decisions.

    Args:
        config: gives the source of the weights and how they are loaded.
        chat: the model.
        inputs: the model's inputs for every prompt.
        tokens: the refusal tokens.
        sets: the prompts of each set.
        hash_weights: whether to hash a sample of each weight, as for a model in memory, which may have been trained further.
            Those of a model that was just loaded are not hashed, since which of them are in memory depends on free memory;
            with an adapter from the Hub they are, because nothing else tells its revision and all are in memory.
    """
    versions = [torch.__version__, transformers.__version__, _FORMAT]
    tensors = (tensor for one in inputs for _, tensor in sorted(one.items()))
    source = config.model
    files = [_files(Path(name)) for name in (source.model_id, source.adapter) if name is not None]
    weights = [vars(source), chat.revision, files, str(chat.model.dtype)]
    named = None if sets is None else {set_name(which): list(members) for which, members in sets.items()}
    settings = [str(chat.model.device.type), tokens.ids, chat.n_positions, named]
    sampled = hash_weights or (source.adapter is not None and not Path(source.adapter).is_dir())
    return digest(versions, weights, settings, *(_samples(chat.model) if sampled else ()), *tensors)


def _samples(model: nn.Module) -> Iterator[Tensor]:
    for weight in (*model.parameters(), *model.buffers()):
        if not weight.is_meta:
            flat = weight.detach().flatten()
            yield flat[:: flat.numel() // _SAMPLED | 1].cpu()  # an odd step meets every column of most weights


def _files(model: Path) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the files of a local model: a folder's, or its only one."""
    paths = sorted(model.iterdir()) if model.is_dir() else [model]
    facts = ((path.name, path.stat()) for path in paths if path.is_file())
    return [(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts]
