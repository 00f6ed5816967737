"""Mathematics of directions: pure functions of tensors, independent of models, prompts and files.

Notation of Arditi et al. (2024), sections 2.3 and 2.4: r is a difference of means, u its unit vector, x an activation of
the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["ablate", "in_own_dtype", "residual_component", "unit", "widest_dtype"]


def widest_dtype(device: torch.device | str) -> torch.dtype:
    """The widest floating-point dtype of a device: float64, or float32 on MPS, which lacks float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def unit(r: Float[Tensor, "*candidate d_model"]) -> Float[Tensor, "*candidate d_model"]:
    """r / (|r| + 1e-8): of unit length, or zero for a zero vector. In r's dtype, computed in at least float32."""
    wide = r.to(torch.promote_types(r.dtype, torch.float32))  # in float16 1e-8 is zero
    return (wide / (wide.norm(dim=-1, keepdim=True) + 1e-8)).to(r.dtype)


@contextmanager
def in_own_dtype() -> Iterator[None]:
    """Compute products in the dtype of their factors, even if the caller has enabled torch.autocast."""
    with ExitStack() as contexts:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                contexts.enter_context(torch.autocast(kind, enabled=False))
        yield


def ablate(
    x: Float[Tensor, "row token d_model"], u: Float[Tensor, "row d_model"] | Float[Tensor, "d_model"]
) -> Float[Tensor, "row token d_model"]:
    """x - (x . u) u (paper, eq. 5), with one u for each row or one for all; in x's dtype.

    In half precision it is applied twice: if most of x lies along u, the rounding of x . u leaves a component along u that
    is larger than the rounding of the rest. Some modules pass `x` flattened to (row * token, d_model); the result then has
    that shape, too.

    Raises ValueError if u has another number of rows than x.
    """
    with in_own_dtype():
        once = _ablated_once(x, u)
        return _ablated_once(once, u) if x.dtype.itemsize < torch.float32.itemsize else once


def _ablated_once(x: Tensor, u: Tensor) -> Tensor:
    if u.ndim == 1:
        return torch.addcmul(x, (x @ u).unsqueeze(-1), u, value=-1)
    if x.shape[0] % len(u) or (x.ndim == 3 and x.shape[0] != len(u)):
        raise ValueError(f"{len(u)} directions for {x.shape[0]} rows: give one direction, or one for each row.")
    rows = x.reshape(len(u), -1, u.shape[-1])
    along = torch.bmm(rows, u.unsqueeze(-1))
    return torch.baddbmm(rows, along, u.unsqueeze(1), alpha=-1).view(x.shape)


def residual_component(x: Float[Tensor, "row token d_model"], u: Float[Tensor, "row d_model"]) -> float:
    """Largest |x . u| / (|x| |u|) over all rows and tokens, beyond the remainder of an exact ablation by u, in float32.

    Ablation by a u that is not exactly of unit length (rounded, or from a direction of norm about 1e-8) leaves 1 - |u|^2 of
    the component along it; this fraction is subtracted. NaN counts as zero, since such scores are discarded later.
    """
    x, u = x.float(), u.float().to(x.device)
    length = u.norm(dim=-1, keepdim=True)
    with in_own_dtype():
        along = torch.bmm(x, (u / length.clamp_min(1e-30)).unsqueeze(-1)).squeeze(-1).abs()
    share = along / x.norm(dim=-1).clamp_min(1e-30) - (1 - length**2).abs()
    return float(share.nan_to_num(0.0).clamp_min(0.0).max())
