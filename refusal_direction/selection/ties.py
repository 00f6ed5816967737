"""Candidates that rounding alone cannot tell from the selected one."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Noise
from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions

__all__ = ["ties"]


def ties(
    scores: Sequence[CandidateScore],
    selected: int,
    among: Collection[int],
    *,
    conditions: Conditions,
    noise: Noise,
    at_best: Sequence[CandidateScore] = (),
) -> tuple[int, ...]:
    """The candidates that might have been selected instead, had rounding gone another way.

    A candidate is tied if it meets the conditions once they are relaxed by the noise, and its ablation score exceeds by at
    most the noise the lowest among candidates that meet the conditions even when these are tightened by it.

    Args:
        scores: mean scores; NaN where not known.
        selected: the selected candidate.
        among: the candidates that meet the conditions that rounding does not affect: length, layer and rank.
        conditions: in force.
        noise: of each measure; NaN counts as none.
        at_best: where not all means are known, the best that they may be.
    """
    size = {measure: 0.0 if math.isnan(noise.of(measure)) else noise.of(measure) for measure in Measure}
    tight, wide = conditions.widened(size, -1), conditions.widened(size, +1)
    certain = [scores[i].ablation_refusal for i in among if tight.rejection(scores[i]) is None]
    reach = min(certain, default=math.inf) + size[Measure.ABLATION]
    possible = at_best or scores
    return tuple(
        index
        for index in sorted(among)
        if index != selected and wide.rejection(possible[index]) is None and possible[index].ablation_refusal <= reach
    )
