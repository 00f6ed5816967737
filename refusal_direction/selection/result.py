"""The outcome of a selection, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from refusal_direction.errors import NoCandidateError
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Noise
from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions, Rejection
from refusal_direction.selection.decision import Decision, Miss, explain_no_candidate, nearest_misses, shortcomings

__all__ = ["SelectionResult"]


@dataclass(frozen=True)
class SelectionResult:
    """The selected candidate, the mean scores it was selected by, and how they were measured."""

    index: int | None
    """The selected candidate; None if none meets the conditions and the nearest miss was not asked for."""
    means: tuple[CandidateScore, ...] = field(repr=False)
    """Mean scores of every candidate; NaN where not measured on every prompt."""
    rejections: tuple[Rejection | None, ...] = field(repr=False)
    """Why each candidate is not the best; None for the best. A nearest miss that is selected has its reason, too."""
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
    def selected(self) -> int:
        """The selected candidate.

        Raises NoCandidateError, with the nearest misses, if there is none.
        """
        if self.index is None:
            raise NoCandidateError(self.explanation)
        return self.index

    @property
    def selected_as(self) -> str | None:
        """Whether the selected candidate meets the conditions ("best") or is the nearest miss ("nearest"); None without one."""
        if self.index is None:
            return None
        return "best" if self.rejections[self.index] is None else "nearest"

    @property
    def score(self) -> CandidateScore:
        """Mean scores of the selected candidate.

        Raises NoCandidateError, with the nearest misses, if there is none.
        """
        return self.means[self.selected]

    @property
    def misses(self) -> list[Miss]:
        """The nearest misses where no candidate meets the conditions, the nearest first."""
        if self.selected_as == "best":
            return []
        return nearest_misses(self.means, self.conditions, self._zero, self.n_layers)

    @property
    def shortcomings(self) -> list[str]:
        """The conditions asked for that the selected candidate violates, in words."""
        return shortcomings(self.score, self.conditions_asked)

    @property
    def explanation(self) -> str:
        """The message where no candidate meets the conditions: discards, nearest misses, and the thresholds they need."""
        decision = Decision(None, self.rejections, self.conditions)
        return explain_no_candidate(self.means, decision, self._zero, self.n_layers)

    @property
    def _zero(self) -> list[bool]:
        return [rejection is Rejection.ZERO_LENGTH for rejection in self.rejections]

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
        """Why each candidate is not the best, in words."""
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
