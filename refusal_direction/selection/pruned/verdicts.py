"""Which candidates can still be selected, given bounds on their scores: the conditions of the selection, provably."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from refusal_direction.candidates import CandidateLabel
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions, Rejection
from refusal_direction.selection.pruned.bounds import Table

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

__all__ = ["SearchSpace", "Verdicts", "best_possible", "judge"]


@dataclass(frozen=True)
class SearchSpace:
    """The candidates of a search."""

    labels: tuple[CandidateLabel, ...]
    zero: tuple[bool, ...]
    """Which of them have length zero: these are never selected and never measured."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each candidate."""
        return tuple(label.layer for label in self.labels)


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The conclusions from the bounds."""

    table: Table
    space: SearchSpace
    conditions: Conditions
    rejections: tuple[Rejection | None, ...]
    """Why each candidate cannot be selected; None for the best one and the open ones."""
    best: int | None
    """Of the candidates that are complete and proven to meet the conditions, the one with the lowest ablation score."""
    fitting: Bool[Tensor, "candidate"]
    """Which candidates meet the conditions on length, layer and KL, as far as is known."""

    @cached_property
    def open(self) -> list[int]:
        """The candidates that may still be selected instead of the best."""
        return [i for i, rejection in enumerate(self.rejections) if rejection is None and i != self.best]

    @property
    def top_k(self) -> int:
        """The number of candidates of lowest KL that are considered."""
        return self.conditions.top_k_candidates or len(self.space)


def best_possible(table: Table, space: SearchSpace, *, slack: bool = True) -> list[CandidateScore]:
    """The best mean scores that each candidate may have, rounding included if `slack`; NaN if a measured score is NaN."""
    bound = table.least if slack else table.bound
    columns = {measure.value: (measure.sign * bound(measure)).tolist() for measure in Measure}
    return [
        CandidateScore(label, **{name: column[index] for name, column in columns.items()})
        for index, label in enumerate(space.labels)
    ]


def judge(table: Table, space: SearchSpace, conditions: Conditions) -> Verdicts:
    """Reject the candidates that cannot be selected, whatever their scores on the prompts not measured."""
    possible, kl = best_possible(table, space), table.least(Measure.KL)
    fits = [conditions.fits(score, zero=zero) for score, zero in zip(possible, space.zero, strict=True)]
    fitting = torch.tensor(fits)
    certainly_ahead = _ahead(kl, fitting & table.complete(Measure.KL)).tolist()
    rejections = [
        conditions.rejection(score, zero=space.zero[index], ahead=certainly_ahead[index])
        for index, score in enumerate(possible)
    ]
    remaining = torch.tensor([rejection is None for rejection in rejections])
    top_k = conditions.top_k_candidates or len(space)
    proven = remaining & table.whole() & (_ahead(kl, fitting) < top_k)
    ablation = table.least(Measure.ABLATION)
    best = _best(ablation, proven)
    if best is not None:
        worse = _comes_after(ablation, best).tolist()
        rejections = [
            Rejection.NOT_BEST if rejection is None and worse[index] else rejection
            for index, rejection in enumerate(rejections)
        ]
    return Verdicts(table, space, conditions, tuple(rejections), best, fitting)


def _ahead(kl: Float[Tensor, "candidate"], among: Bool[Tensor, "candidate"]) -> Int[Tensor, "candidate"]:
    """For each candidate, the number of others that come before it by KL; of equals the first comes first.

    The KL of others may be a lower bound: then the KL itself is larger, by the slack at least, and so is never equal.
    """
    index = torch.arange(len(kl))
    other, one = (..., None), (None, ...)
    level = (kl[other] == kl[one]) & (index[other] < index[one])
    comes = ((kl[other] < kl[one]) | level) & among[other] & (index[other] != index[one])
    return comes.sum(0)


def _best(ablation: Float[Tensor, "candidate"], proven: Bool[Tensor, "candidate"]) -> int | None:
    """The proven candidate with the lowest ablation score; of equals the first."""
    indices: list[int] = torch.nonzero(proven).flatten().tolist()
    return min(indices, key=lambda index: float(ablation[index]), default=None)


def _comes_after(ablation: Float[Tensor, "candidate"], best: int) -> Bool[Tensor, "candidate"]:
    """Candidates whose lower bound already loses to `best`."""
    behind = torch.arange(len(ablation)) > best
    return (ablation > ablation[best]) | ((ablation == ablation[best]) & behind)
