"""How far rounding alone moves mean scores, measured, and which candidates it therefore cannot tell from the best.

A few rows are run twice in one pass, the second time by a direction whose elements are off by at most one rounding of the
model's dtype. No arithmetic could tell the two apart; what their scores differ by is noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from refusal_direction.candidates import Candidates
from refusal_direction.engine import Row
from refusal_direction.scoring.metrics import Measure
from refusal_direction.selection.rules import CandidateScore

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Noise", "Repeats", "rounded_otherwise", "ties"]

_CANDIDATES = 8  # the most promising, since their scores are those that are compared
_ROWS = 16  # for each measure


@dataclass(frozen=True)
class Noise:
    """Twice the root mean square difference of a score from itself, run again: 95% of differences are smaller.

    Errors of one candidate on several prompts may agree, since they share its direction; so the noise of a mean is taken
    to be that of one score, and not less.
    """

    ablation_refusal: float
    steering_refusal: float
    kl_div: float


def rounded_otherwise(
    vectors: Float[Tensor, "candidate d_model"], dtype: torch.dtype
) -> Float[Tensor, "candidate d_model"]:
    """The same directions, each element off by at most one rounding of `dtype`; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    shift = 2 * torch.rand(vectors.shape, generator=generator, dtype=torch.float64) - 1
    return (vectors.double().cpu() * (1 + torch.finfo(dtype).eps * shift)).to(vectors)


@dataclass
class Repeats:
    """What is run twice, and what came of it.

    Args:
        originals: the candidates.
        dtype: in which the model computes.
        order: candidates worth repeating, the most promising first.
        measure: which measure a row is for.
    """

    originals: Candidates
    dtype: torch.dtype
    order: Sequence[int]
    measure: Callable[[Row], Measure]
    differences: dict[Measure, list[float]] = field(default_factory=lambda: {measure: [] for measure in Measure})
    """Of a score from itself, run again."""

    @property
    def candidates(self) -> Candidates:
        """The candidates, and after all of them their copies in the same order."""
        copies = rounded_otherwise(self.originals.vectors, self.dtype)
        return Candidates(torch.cat([self.originals.vectors, copies]), self.originals.labels * 2)

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The copies' rows that are run beside these: a few for each measure of which no pass has had enough."""
        again = []
        for measure, seen in self.differences.items():
            ours = [row for row in rows if self.measure(row) is measure]
            present = {row.candidate for row in ours}
            watched = set([candidate for candidate in self.order if candidate in present][:_CANDIDATES])
            ours = [row for row in ours if row.candidate in watched]
            again += random.Random(0).sample(ours, min(_ROWS - len(seen), len(ours)))
        return [Row(row.prompt, row.kind, row.candidate + len(self.originals.layers)) for row in again]

    def enter(self, measure: Measure, difference: float) -> None:
        """Record the difference of one score from itself."""
        self.differences[measure].append(difference)

    @property
    def noise(self) -> dict[Measure, float]:
        """By measure, as in `Noise`. NaN where nothing was run twice, or no number came of it."""
        finite = {
            measure: [value for value in seen if math.isfinite(value)] for measure, seen in self.differences.items()
        }
        return {
            measure: 2 * math.sqrt(sum(value**2 for value in seen) / len(seen)) if seen else math.nan
            for measure, seen in finite.items()
        }


def ties(
    scores: Sequence[CandidateScore],
    best: int,
    among: Collection[int],
    *,
    kl: float,
    steering: float,
    noise: Mapping[Measure, float],
    at_best: Sequence[CandidateScore] = (),
) -> tuple[int, ...]:
    """The candidates that might have been selected instead of the best one, had rounding gone another way.

    A candidate is tied if it meets the conditions once they are relaxed by the noise, and its ablation score exceeds by at most
    the noise the lowest among candidates that meet the conditions even when these are tightened by it.

    Args:
        scores: mean scores; NaN where not known.
        best: the selected candidate.
        among: the candidates that could be selected.
        kl: the largest admissible KL.
        steering: the smallest admissible steering score.
        noise: of each measure; NaN counts as none.
        at_best: where not all means are known, the best that they may be.
    """
    ablation_off, kl_off, steering_off = (
        0.0 if math.isnan(noise[measure]) else noise[measure]
        for measure in (Measure.ABLATION, Measure.KL, Measure.STEERING)
    )

    def admissible(score: CandidateScore, by: float) -> bool:
        return score.kl_div <= kl + by * kl_off and score.steering_refusal >= steering - by * steering_off

    certain = (scores[index].ablation_refusal for index in among if admissible(scores[index], -1))
    reach = min((score for score in certain if not math.isnan(score)), default=math.inf) + ablation_off
    possible = at_best or scores
    return tuple(
        index
        for index in sorted(among)
        if index != best and admissible(possible[index], 1) and possible[index].ablation_refusal <= reach
    )
