"""Where finished parts of a run are kept, as the computation sees it; checkpoints.py keeps them in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["NO_CHECKPOINTS", "CheckpointStore", "digest"]


def digest(*parts: Any) -> str:
    """SHA-256 of tensors (dtype, shape, bytes) and of anything that JSON can hold."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype} {tuple(part.shape)}".encode())
            total.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            total.update(json.dumps(part, sort_keys=True, default=str).encode())
    return total.hexdigest()


class CheckpointStore(Protocol):
    """Keeps named tensors under keys."""

    def key(self, *parts: Any) -> str:
        """A key for what depends on nothing but these tensors and plain values."""

    def load(self, key: str) -> dict[str, Tensor] | None:
        """What was kept under the key, if anything was."""

    def load_all(self, beginning: str) -> Iterator[dict[str, Tensor]]:
        """All that was kept under keys that begin so."""

    def save(self, key: str, part: Mapping[str, Tensor]) -> None:
        """Keep a part under the key."""


class _NoCheckpoints:
    """Keeps nothing."""

    def key(self, *parts: Any) -> str:
        return ""

    def load(self, key: str) -> dict[str, Tensor] | None:
        return None

    def load_all(self, beginning: str) -> Iterator[dict[str, Tensor]]:
        return iter(())

    def save(self, key: str, part: Mapping[str, Tensor]) -> None:
        pass


NO_CHECKPOINTS: CheckpointStore = _NoCheckpoints()
