"""What is read off the logits: the refusal score and the KL divergence. Pure functions.

Logits are those of the last prompt position, from which the first token of the reply would be sampled.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

import torch

from refusal_direction.directions import widest_dtype

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["LEAST_REFUSAL", "Measure", "entropy", "kl_divergence", "kl_floor", "refusal_probability", "refusal_score"]

_REFUSAL_EPS = 1e-8
_KL_EPS = 1e-6
LEAST_REFUSAL = math.log(_REFUSAL_EPS) - math.log(1 + _REFUSAL_EPS)
"""The refusal score where the refusal tokens have no probability at all; where they have it all it is as much above 0."""


class Measure(Enum):
    """What a candidate is scored by. The values are the names of the scores in `CandidateScore` and in files."""

    ABLATION = "ablation_refusal"
    KL = "kl_div"
    STEERING = "steering_refusal"

    @property
    def sign(self) -> int:
        """Times the score: the cost. A candidate should steer to a high score, and be low in the other two."""
        return -1 if self is Measure.STEERING else 1


def refusal_probability(logits: Float[Tensor, "row vocab"], tokens: tuple[int, ...]) -> Float[Tensor, "row"]:
    """Summed softmax probability of the refusal tokens (paper, appendix B), in `widest_dtype`."""
    probabilities = logits.to(widest_dtype(logits.device)).softmax(-1)
    return probabilities[:, list(tokens)].sum(-1).clamp(max=1)  # in float32 rounding may bring it above


def refusal_score(logits: Float[Tensor, "row vocab"], tokens: tuple[int, ...]) -> Float[Tensor, "row"]:
    """log-odds of refusing, log(p + 1e-8) - log(1 - p + 1e-8) with p the `refusal_probability` (paper, appendix B): in [-18.42, 18.42]."""
    p = refusal_probability(logits, tokens)
    return (p + _REFUSAL_EPS).log() - (1 - p + _REFUSAL_EPS).log()


def kl_divergence(logits_p: Float[Tensor, "row vocab"], logits_q: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
    """sum P (log(P + 1e-6) - log(Q + 1e-6)) per row, in nats, in `widest_dtype`: KL from the baseline P to Q (paper, appendix C)."""
    dtype = widest_dtype(logits_p.device)
    p, q = logits_p.to(dtype).softmax(-1), logits_q.to(dtype).softmax(-1)
    return (p * ((p + _KL_EPS).log() - (q + _KL_EPS).log())).sum(-1)


def kl_floor(logits_p: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
    """The least that `kl_divergence` from the baseline P can be, over every distribution Q. In float64, on the CPU.

    It is below 0, since 1e-6 is added to the probabilities: -log(1 + vocab * 1e-6) bounds it for any P. For a given P it
    is attained by the Q that fills P up from the top: Q + 1e-6 = c P on the k likeliest tokens, and 0 on the others.
    """
    p = logits_p.cpu().double().softmax(-1).sort(dim=-1, descending=True).values
    k = torch.arange(1, p.shape[-1] + 1, dtype=p.dtype)
    c = (1 + k * _KL_EPS) / p.cumsum(-1)  # so that Q sums to 1
    filled = (c * p > _KL_EPS).sum(-1, keepdim=True)  # where Q is above 0; true of a first few tokens, then never again
    level = c.gather(-1, filled - 1)
    log_q = torch.where(k <= filled, (level * p).log(), math.log(_KL_EPS))
    return (p * ((p + _KL_EPS).log() - log_q)).sum(-1)


def entropy(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
    """Entropy of the next-token distribution, in nats, in `widest_dtype`."""
    log_p = logits.to(widest_dtype(logits.device)).log_softmax(-1)
    return -(log_p.exp() * log_p).nansum(-1)  # where p is 0, log p may be -inf
