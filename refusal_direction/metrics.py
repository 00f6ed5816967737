"""What is read off the logits: the refusal score and the KL divergence. Pure functions.

Logits are those of the last prompt position, from which the first token of the reply would be sampled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refusal_direction.directions import precise

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["kl_divergence", "refusal_mass", "refusal_score"]

_REFUSAL_EPS = 1e-8
_KL_EPS = 1e-6


def refusal_mass(logits: Float[Tensor, "row vocab"], tokens: tuple[int, ...]) -> Float[Tensor, "row"]:
    """Summed softmax probability of the refusal tokens (paper, section 2.4), in `precise`."""
    probabilities = logits.to(precise(logits.device)).softmax(-1)
    return probabilities[:, list(tokens)].sum(-1)


def refusal_score(logits: Float[Tensor, "row vocab"], tokens: tuple[int, ...]) -> Float[Tensor, "row"]:
    """log-odds of refusing, log(p + 1e-8) - log(1 - p + 1e-8) with p the `refusal_mass`: in [-18.42, 18.42]."""
    p = refusal_mass(logits, tokens)
    return (p + _REFUSAL_EPS).log() - (1 - p + _REFUSAL_EPS).log()


def kl_divergence(logits_p: Float[Tensor, "row vocab"], logits_q: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
    """sum P (log(P + 1e-6) - log(Q + 1e-6)) per row, in nats, in `precise`: KL from the baseline P to Q."""
    dtype = precise(logits_p.device)
    p, q = logits_p.to(dtype).softmax(-1), logits_q.to(dtype).softmax(-1)
    return (p * ((p + _KL_EPS).log() - (q + _KL_EPS).log())).sum(-1)
