"""The outcome of a selection, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Noise
from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions, Rejection

__all__ = ["SelectionResult"]


@dataclass(frozen=True)
class SelectionResult:
    """The selected candidate, the mean scores it was selected by, and how they were measured."""

    index: int
    """The selected candidate."""
    means: tuple[CandidateScore, ...] = field(repr=False)
    """Mean scores of every candidate; NaN where not measured on every prompt."""
    rejections: tuple[Rejection | None, ...] = field(repr=False)
    """Why each candidate is not selected; None for the selected one."""
    conditions_asked: Conditions
    """The conditions asked for."""
    conditions: Conditions
    """The conditions in force: some may have been dropped because no candidate met them."""
    n_layers: int
    """Of the model."""
    search: str
    """The search that found it."""
    measured: Mapping[Measure, tuple[int, ...]] = field(repr=False)
    """The number of prompts that each candidate was measured on. Those of length zero are not: their scores are the baseline's."""
    n_passes: int
    """Passes over the weights under interventions, if all rows of one fit into memory."""
    exhaustive_evaluations: int
    """Prompt evaluations of an exhaustive search: prompts run under an intervention."""
    noise: Noise
    """The effect of rounding on scores, measured."""
    n_repeated: int
    """Rows repeated to measure it, which do not count as prompt evaluations."""
    ties: tuple[int, ...]
    """The candidates that rounding alone may have kept from being selected instead."""

    @property
    def score(self) -> CandidateScore:
        """Mean scores of the selected candidate."""
        return self.means[self.index]

    @property
    def tied(self) -> list[CandidateScore]:
        """Mean scores of the ties."""
        return [self.means[index] for index in self.ties]

    @property
    def evaluations(self) -> int:
        """Prompt evaluations made."""
        return sum(sum(counts) for counts in self.measured.values())

    @property
    def reasons(self) -> tuple[str | None, ...]:
        """Why each candidate is not selected, in words."""
        return tuple(
            None if rejection is None else self.conditions.reason(rejection, self.n_layers)
            for rejection in self.rejections
        )

    @property
    def discarded(self) -> dict[str, int]:
        """The number of candidates that each condition discarded; a candidate counts for the first that it violates."""
        failed = (found for found in self.rejections if found not in (None, Rejection.NOT_BEST))
        return {
            self.conditions.reason(rejection, self.n_layers): count
            for rejection, count in Counter(failed).items()
            if rejection is not None
        }
