"""Interface of a runner: it takes rows, and passes on logits and activations as they are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from refusal_direction.candidates import Candidates
from refusal_direction.engine.rows import Row

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Consume", "Observe", "Runner", "Tick", "silent"]

Consume = Callable[[list[Row], "Float[Tensor, 'row vocab']"], None]
"""Receives finished rows and their logits at the last position."""
Observe = Callable[[int, list[Row], "Float[Tensor, 'row token d_model']"], None]
"""Receives a layer's index, baseline rows, and their residual stream at the input of that layer."""
Tick = Callable[[int], object]
"""Receives the number of (row, layer) pairs just computed."""


def silent(done: int) -> None:
    """A `Tick` that shows nothing."""


class Runner(Protocol):
    """Runs rows of prompts through one model."""

    @property
    def name(self) -> str:
        """Name of the runner."""

    @property
    def branches(self) -> bool:
        """Whether steered rows start at their own layer instead of at layer 0."""

    @property
    def shared(self) -> int:
        """Number of leading tokens that are run once for each intervention, for all prompts together."""

    @property
    def leak(self) -> float:
        """Largest `residual_component` of an ablated stream at a layer's output so far."""

    def row_bytes(self, rows: Sequence[Row]) -> list[int]:
        """Memory that each row holds while it is under way."""

    def passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows of each pass over the weights, in order."""

    def run(
        self,
        rows: Sequence[Row],
        *,
        consume: Consume,
        candidates: Candidates | None = None,
        observe: Observe | None = None,
        tick: Tick = silent,
    ) -> Tensor | None:
        """Run rows through the whole model.

        Args:
            rows: rows to run.
            consume: receives the logits of each row once, a few rows at a time, in no particular order.
            candidates: the directions that ablated and steered rows refer to.
            observe: receives the residual stream of the baseline rows at the input of every layer.
            tick: receives progress.
        """
