"""Rows that several passes have in common: their intermediate results are kept from one pass for the next ones.

A search in rounds returns to the same interventions, whose prefix rows are then kept as keys and values, and to the same
prompts, whose baseline streams are then kept as branch points of steered rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["KeptRows"]

_Key = TypeVar("_Key", bound=Hashable)


class KeptRows(Generic[_Key]):
    """Tensors of every layer with one row for each key, extended in each pass by rows of that pass."""

    def __init__(self) -> None:
        self.places: dict[_Key, int] = {}
        """The row of each key."""
        self.count = 0
        """Number of rows."""
        self._tables: dict[int, tuple[Tensor, ...]] = {}
        self._new: list[_Key] = []
        self._extended: dict[int, tuple[Tensor, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return sum(tensor.nbytes for tables in self._tables.values() for tensor in tables)

    def begin(self, keys: Sequence[_Key]) -> None:
        """Begin a pass. Of its own rows the first ones are kept, under these keys."""
        self._new, self._extended = list(keys), {}

    def joined(self, layer: int, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The rows kept for a layer, followed by the pass's own; neither shares memory with `own`.

        Args:
            layer: index of the layer.
            own: tensors with one row for each of the pass's own; empty if it has none.
        """
        kept = self._tables.get(layer)
        if kept is None or not own:
            joined = tuple(tensor.clone() for tensor in own) if kept is None else kept
        else:
            joined = tuple(torch.cat(sides) for sides in zip(kept, own, strict=True))
        if self._new:
            count = self.count + len(self._new)
            self._extended[layer] = tuple(t if len(t) == count else t[:count].clone() for t in joined)
        return joined

    def commit(self) -> None:
        """End a pass that has gone through all layers."""
        if self._new:
            self.places.update({key: self.count + index for index, key in enumerate(self._new)})
            self.count += len(self._new)
            self._tables = self._extended
        self.begin(())
