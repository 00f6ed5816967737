"""What is known of the candidates' scores so far, and what that proves of their means.

Every score is read as a cost: the lower, the better for the candidate. A cost has a floor below which it cannot fall,
whatever the model does, so the mean over all prompts is bounded from below by what has been measured and the floors of
the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from refusal_direction.scoring.metrics import Measure

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

__all__ = ["SLACK", "ScoreRequest", "Table"]

SLACK = 1e-4
"""The least by which bounds are lowered, more than rounding raises them in float32. Complete means are exact."""


class ScoreRequest(NamedTuple):
    """One score: of a candidate, by a measure, on one of the measure's prompts."""

    candidate: int
    measure: Measure
    prompt: int


class Table:
    """The scores measured so far.

    Args:
        n_candidates: how many candidates there are.
        floors: for each measure, below what its cost cannot fall on each of its prompts.
    """

    def __init__(self, n_candidates: int, floors: Mapping[Measure, Float[Tensor, "prompt"]]) -> None:
        self.floors = {measure: floor.double() for measure, floor in floors.items()}
        self.scores: dict[Measure, Float[Tensor, "candidate prompt"]] = {
            measure: torch.full((n_candidates, len(floor)), torch.nan, dtype=torch.float64)
            for measure, floor in floors.items()
        }
        self.known: dict[Measure, Bool[Tensor, "candidate prompt"]] = {
            measure: torch.zeros(n_candidates, len(floor), dtype=torch.bool) for measure, floor in floors.items()
        }
        self.slack = dict.fromkeys(floors, SLACK)
        """By how much bounds are lowered: more than rounding could have raised them."""

    def enter(self, cells: Sequence[ScoreRequest], scores: Iterable[float]) -> None:
        """Record what was measured; NaN is a score, too."""
        for (candidate, measure, prompt), score in zip(cells, scores, strict=True):
            self.scores[measure][candidate, prompt] = score
            self.known[measure][candidate, prompt] = True

    def allow_for(self, noise: Mapping[Measure, float]) -> None:
        """Lower bounds by what rounding was seen to do, if that is more."""
        self.slack = {measure: max(SLACK, noise.get(measure, 0.0)) for measure in self.slack}  # NaN is not more

    def missing(self, candidate: int, measure: Measure) -> list[ScoreRequest]:
        """What has not been measured of a candidate."""
        prompts = torch.nonzero(~self.known[measure][candidate]).flatten().tolist()
        return [ScoreRequest(candidate, measure, prompt) for prompt in prompts]

    def costs(self, measure: Measure) -> Float[Tensor, "candidate prompt"]:
        """Scores times the measure's sign; NaN where not measured."""
        return measure.sign * self.scores[measure]

    def complete(self, measure: Measure) -> Bool[Tensor, "candidate"]:
        """Which candidates have been measured on every prompt."""
        return self.known[measure].all(dim=1)

    def whole(self) -> Bool[Tensor, "candidate"]:
        """Which are complete in every measure."""
        return torch.stack([self.complete(measure) for measure in Measure]).all(0)

    def broken(self, measure: Measure) -> Bool[Tensor, "candidate"]:
        """Which have a score that came out as NaN."""
        return (self.known[measure] & self.scores[measure].isnan()).any(dim=1)

    def bound(self, measure: Measure) -> Float[Tensor, "candidate"]:
        """The mean cost of candidates that are complete; for the others a lower bound of it, up to rounding."""
        return torch.where(self.known[measure], self.costs(measure), self.floors[measure]).mean(dim=1)

    def least(self, measure: Measure) -> Float[Tensor, "candidate"]:
        """The mean cost of candidates that are complete; a proven lower bound of it for the others."""
        bound = self.bound(measure)
        return torch.where(self.complete(measure), bound, bound - self.slack[measure])
