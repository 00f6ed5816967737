"""Which candidates can still be the selected one, given bounds on their scores: the selection rules, provably."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

import torch

from refusal_direction.scoring.metrics import Measure
from refusal_direction.selection.pruned.bounds import Table
from refusal_direction.selection.rules import Rejection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

__all__ = ["Conditions", "Verdicts", "judge"]


@dataclass(frozen=True)
class Conditions:
    """What the selected candidate must meet."""

    layers: Int[Tensor, "candidate"]
    """Each candidate's layer."""
    null: Bool[Tensor, "candidate"]
    """Candidates of length zero: never selected, never measured."""
    limit: float
    """Candidates from this layer on are discarded."""
    kl: float
    """Likewise those of a larger mean KL divergence."""
    steering: float
    """Likewise those of a smaller mean steering score."""
    top_k: int
    """Only so many of lowest KL are considered, of those that meet the conditions on layer and KL."""

    def without_kl(self) -> Conditions:
        """Where no candidate meets the conditions on layer and KL, both are dropped."""
        return replace(self, limit=inf, kl=inf)

    def without_steering(self) -> Conditions:
        """Where none of those considered steers far enough, that condition is dropped."""
        return replace(self, steering=-inf)


@dataclass(frozen=True)
class Verdicts:
    """What the bounds prove."""

    fates: Int[Tensor, "candidate"]
    best: int | None
    """Of the candidates that are complete and proven to meet the conditions, the one with the lowest ablation score."""
    fitting: Bool[Tensor, "candidate"]
    """Which candidates meet the conditions on layer and KL, for all that is known."""

    @property
    def open(self) -> list[int]:
        """The candidates that may still be selected instead of the best."""
        return torch.nonzero(self.fates == Rejection.OPEN).flatten().tolist()


def judge(table: Table, conditions: Conditions) -> Verdicts:
    """Sort out the candidates that cannot be selected, whatever their scores on the prompts not measured."""
    kl, known = table.least(Measure.KL), table.complete(Measure.KL)
    too_deep = conditions.layers >= conditions.limit
    fitting = ~(conditions.null | table.broken(Measure.KL) | too_deep | (kl > conditions.kl))
    surely_ahead = _before(kl, fitting & known)
    ahead = _before(kl, fitting)
    fates = torch.full_like(conditions.layers, Rejection.OPEN)
    for fate, holds in (  # the later ones go before
        (Rejection.STEERING, table.least(Measure.STEERING) > -conditions.steering),
        (Rejection.RANK, surely_ahead >= conditions.top_k),
        (Rejection.KL, kl > conditions.kl),
        (Rejection.LAYER, too_deep),
        (Rejection.BROKEN, torch.stack([table.broken(measure) for measure in Measure]).any(0)),
        (Rejection.NULL, conditions.null),
    ):
        fates[holds] = fate
    proven = (fates == Rejection.OPEN) & table.whole() & (ahead < conditions.top_k)
    ablation = table.least(Measure.ABLATION)
    best = _best(ablation, proven)
    if best is not None:
        fates[(fates == Rejection.OPEN) & _comes_after(ablation, best)] = Rejection.BEATEN
        fates[best] = Rejection.BEST
    return Verdicts(fates, best, fitting)


def _before(kl: Float[Tensor, "candidate"], among: Bool[Tensor, "candidate"]) -> Int[Tensor, "candidate"]:
    """For each candidate, how many of the others come before it: with a lower KL, or an equal one and standing first.

    Of others it may be a lower bound: then the KL itself is larger, by the slack if nothing else, and so is no tie.
    """
    index = torch.arange(len(kl))
    other, one = (..., None), (None, ...)
    level = (kl[other] == kl[one]) & (index[other] < index[one])
    comes = ((kl[other] < kl[one]) | level) & among[other] & (index[other] != index[one])
    return comes.sum(0)


def _best(ablation: Float[Tensor, "candidate"], proven: Bool[Tensor, "candidate"]) -> int | None:
    """The proven candidate with the lowest ablation score; of equals the first."""
    places: list[int] = torch.nonzero(proven).flatten().tolist()
    return min(places, key=lambda place: float(ablation[place]), default=None)


def _comes_after(ablation: Float[Tensor, "candidate"], best: int) -> Bool[Tensor, "candidate"]:
    """Which candidates the best one goes before, though theirs are lower bounds."""
    behind = torch.arange(len(ablation)) > best
    return (ablation > ablation[best]) | ((ablation == ablation[best]) & behind)
