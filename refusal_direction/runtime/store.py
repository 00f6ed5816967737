"""The interface through which computations see checkpoints; `runtime.checkpoints` implements it in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["NO_CHECKPOINTS", "CheckpointStore", "Part", "Scoped", "digest"]


@dataclass(frozen=True, eq=False)
class Part:
    """A finished part of a run: its result, and the record of its making."""

    tensors: Mapping[str, Tensor]
    seconds: float = 0.0
    """Wall time."""
    leak: float = 0.0
    """Largest share of an ablated stream found along its direction."""
    warnings: tuple[str, ...] = ()


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
    """Keeps the parts of a run under keys."""

    def key(self, *parts: Any) -> str:
        """A key for a result that depends on nothing but these tensors and plain values."""

    def load(self, key: str) -> Part | None:
        """The part under a key, or None."""

    def load_all(self, prefix: str) -> Iterator[Part]:
        """All parts under keys with this prefix."""

    def save(self, key: str, part: Part) -> None:
        """Keep a part under a key."""


@dataclass(frozen=True)
class Scoped:
    """A store whose keys depend on a scope, too: what was kept in another scope is not found."""

    store: CheckpointStore
    scope: str

    def key(self, *parts: Any) -> str:
        """A key for a result that depends on nothing but these parts and the scope."""
        return self.store.key(self.scope, *parts)

    def load(self, key: str) -> Part | None:
        """The part under a key, or None."""
        return self.store.load(key)

    def load_all(self, prefix: str) -> Iterator[Part]:
        """All parts under keys with this prefix."""
        return self.store.load_all(prefix)

    def save(self, key: str, part: Part) -> None:
        """Keep a part under a key."""
        self.store.save(key, part)


class _NoCheckpoints:
    """Keeps nothing."""

    def key(self, *parts: Any) -> str:
        return ""

    def load(self, key: str) -> Part | None:
        return None

    def load_all(self, prefix: str) -> Iterator[Part]:
        return iter(())

    def save(self, key: str, part: Part) -> None:
        pass


NO_CHECKPOINTS: CheckpointStore = _NoCheckpoints()
