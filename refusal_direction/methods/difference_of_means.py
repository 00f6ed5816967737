"""Difference of means (paper, section 2.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refusal_direction.directions import widest_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["difference_of_means"]


def difference_of_means(
    harmful: Float[Tensor, "harmful *site d_model"], harmless: Float[Tensor, "harmless *site d_model"]
) -> Float[Tensor, "*site d_model"]:
    """Mean over harmful minus mean over harmless activations (paper, eq. 3), in `widest_dtype`."""
    dtype = widest_dtype(harmful.device)
    return harmful.mean(0, dtype=dtype) - harmless.mean(0, dtype=dtype)
