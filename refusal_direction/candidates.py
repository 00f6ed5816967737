"""Candidate directions: vectors, each with its label. This is the one place that lays them out over positions and layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refusal_direction.config import DIFFERENCE_OF_MEANS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

__all__ = ["ZERO_NORM", "CandidateLabel", "Candidates"]

ZERO_NORM = 1e-12
"""A candidate that is no longer than this counts as zero: its ablation scales x by less than one part in 10^8."""


@dataclass(frozen=True)
class CandidateLabel:
    """How and where a candidate direction was made."""

    method: str
    """Name of the method, as in the table of `refusal_direction.methods`; any other name for a vector from elsewhere."""
    layer: int
    """The layer at whose input it was measured, and to whose input it is added."""
    position: int | None = None
    """The token position at which it was measured, -1 for the last of the prompt; None where it has none."""
    seed: int | None = None
    """The seed of a random direction."""

    def __str__(self) -> str:
        method = "" if self.method == DIFFERENCE_OF_MEANS else f"{self.method}, "
        position = "" if self.position is None else f"position {self.position}, "
        return f"{method}{position}layer {self.layer}" + ("" if self.seed is None else f", seed {self.seed}")


@dataclass(frozen=True, eq=False)
class Candidates:
    """Candidate directions, not normalised, and their labels.

    A set may mix methods, random directions and vectors from files. Raises ValueError unless each vector has one label.
    """

    vectors: Float[Tensor, "candidate d_model"]
    labels: tuple[CandidateLabel, ...]

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels were given for vectors of shape {tuple(self.vectors.shape)}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each candidate."""
        return tuple(label.layer for label in self.labels)

    @property
    def zero(self) -> Bool[Tensor, "candidate"]:
        """Which candidates are zero, on the CPU."""
        return (self.vectors.norm(dim=-1) <= ZERO_NORM).cpu()

    @classmethod
    def from_grid(cls, grid: Float[Tensor, "position layer d_model"], method: str) -> Candidates:
        """Label the vectors of a grid; the last position is -1. Ordered by position, then layer."""
        n_positions, n_layers, _ = grid.shape
        return cls(grid.flatten(0, 1), tuple(_grid_labels(method, n_positions, n_layers)))

    @classmethod
    def concatenate(cls, parts: Sequence[Candidates]) -> Candidates:
        """The candidates of all parts, in order."""
        return cls(torch.cat([part.vectors for part in parts]), tuple(label for part in parts for label in part.labels))

    def laid_out(self) -> Float[Tensor, "position layer d_model"] | Float[Tensor, "candidate d_model"]:
        """Vectors as stored: [position, layer, d_model] if one method fills the whole grid, else [candidate, d_model]."""
        positions, layers = self._extent()
        if not self.labels or self.labels != tuple(_grid_labels(self.labels[0].method, positions, layers)):
            return self.vectors
        return self.vectors.unflatten(0, (positions, layers))

    def _extent(self) -> tuple[int, int]:
        positions = [-label.position for label in self.labels if label.position is not None]
        return max(positions, default=0), max(self.layers, default=-1) + 1


def _grid_labels(method: str, n_positions: int, n_layers: int) -> Iterator[CandidateLabel]:
    for position in range(-n_positions, 0):
        for layer in range(n_layers):
            yield CandidateLabel(method, layer, position)
