"""Direction methods: pure functions from the activations of the two kinds of prompts to candidate directions.

To add one, write the function in a file of its own and enter it in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from refusal_direction.candidates import Candidates
from refusal_direction.config import DIFFERENCE_OF_MEANS
from refusal_direction.errors import ConfigurationError
from refusal_direction.methods.difference_of_means import difference_of_means

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["METHODS", "Method", "check_methods", "difference_of_means", "make_candidates"]

Method = Callable[[Tensor, Tensor], Tensor]
"""From harmful [harmful, position, layer, d_model] and harmless [harmless, position, layer, d_model] activations to
directions [position, layer, d_model], in `widest_dtype` if they are to be exact."""

METHODS: dict[str, Method] = {DIFFERENCE_OF_MEANS: difference_of_means}
"""Every direction method by its name."""


def check_methods(names: Sequence[str]) -> None:
    """Raise ConfigurationError for a name that no method has, or that is given twice."""
    if unknown := [name for name in names if name not in METHODS]:
        raise ConfigurationError(f"methods: {unknown[0]!r} is not known. Choose from {', '.join(METHODS)}.")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"methods: {', '.join(names)} names a method twice.")


def make_candidates(
    names: Sequence[str],
    harmful: Float[Tensor, "harmful position layer d_model"],
    harmless: Float[Tensor, "harmless position layer d_model"],
) -> Candidates:
    """A candidate for every method, position and layer, in this order.

    Raises ConfigurationError for a name that no method has, or a method that returns another shape.
    """
    check_methods(names)
    grids = {name: METHODS[name](harmful, harmless) for name in names}
    for name, grid in grids.items():
        if grid.shape != harmful.shape[1:]:
            raise ConfigurationError(
                f"methods: {name!r} returned the shape {tuple(grid.shape)}, not {tuple(harmful.shape[1:])}. A method must "
                "return [position, layer, d_model]."
            )
    return Candidates.concatenate([Candidates.from_grid(grid, name) for name, grid in grids.items()])
