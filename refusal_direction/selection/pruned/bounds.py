"""Lower bounds on the candidates' mean scores, from the scores measured so far.

Every score is read as a cost: the lower, the better for the candidate. A cost has a floor below which it cannot fall,
whatever the model does, so the measured scores and the floors of the rest bound the mean over all prompts from below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Noise
from refusal_direction.scoring.scores import ScoreRequest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

__all__ = ["SLACK", "Table"]

SLACK = 1e-4
"""The least by which bounds are lowered, more than rounding raises them in float32. Complete means are exact."""


class Table:
    """The scores measured so far.

    Args:
        n_candidates: how many candidates there are.
        floors: for each measure, the lowest possible cost on each of its prompts.
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
        """The amount by which bounds are lowered: more than rounding could have raised them."""

    def enter(self, requests: Sequence[ScoreRequest], scores: Iterable[float]) -> None:
        """Record measured scores; NaN is a score too."""
        for (candidate, measure, prompt), score in zip(requests, scores, strict=True):
            self.scores[measure][candidate, prompt] = score
            self.known[measure][candidate, prompt] = True

    def allow_for(self, noise: Noise) -> None:
        """Lower the bounds by the measured noise, if that is more."""
        self.slack = {measure: max(SLACK, noise.of(measure)) for measure in self.slack}  # NaN is not more

    def missing(self, candidate: int, measure: Measure) -> list[ScoreRequest]:
        """Requests for the scores of a candidate that have not been measured."""
        prompts = torch.nonzero(~self.known[measure][candidate]).flatten().tolist()
        return [ScoreRequest(candidate, measure, prompt) for prompt in prompts]

    def costs(self, measure: Measure) -> Float[Tensor, "candidate prompt"]:
        """Scores times the measure's sign; NaN where not measured."""
        return measure.sign * self.scores[measure]

    def complete(self, measure: Measure) -> Bool[Tensor, "candidate"]:
        """Which candidates have been measured on every prompt."""
        return self.known[measure].all(dim=1)

    def whole(self) -> Bool[Tensor, "candidate"]:
        """Which candidates are complete in every measure."""
        return torch.stack([self.complete(measure) for measure in Measure]).all(0)

    def broken(self, measure: Measure) -> Bool[Tensor, "candidate"]:
        """Which candidates have a score that is NaN."""
        return (self.known[measure] & self.scores[measure].isnan()).any(dim=1)

    def bound(self, measure: Measure) -> Float[Tensor, "candidate"]:
        """The mean cost of complete candidates; for the others a lower bound of it, up to rounding."""
        return torch.where(self.known[measure], self.costs(measure), self.floors[measure]).mean(dim=1)

    def least(self, measure: Measure) -> Float[Tensor, "candidate"]:
        """The mean cost of complete candidates; for the others a proven lower bound of it."""
        bound = self.bound(measure)
        return torch.where(self.complete(measure), bound, bound - self.slack[measure])
