"""The decision: from mean scores and conditions to the selected candidate. Reads no model."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions, Rejection, layer_limit

__all__ = [
    "Decision",
    "Miss",
    "decide",
    "explain_no_candidate",
    "finalists",
    "nearest_misses",
    "ranks",
    "relax_layer_and_kl",
    "shortcomings",
    "warn_layer_and_kl",
    "warn_nearest",
    "warn_steering",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """The selected candidate, and why each of the others is rejected."""

    selected: int | None
    """Its index; None if no candidate meets the conditions."""
    rejections: tuple[Rejection | None, ...]
    """None for the selected one."""
    conditions: Conditions
    """The conditions in force: some may have been dropped because no candidate met them."""


@dataclass(frozen=True)
class Miss:
    """A candidate that comes close to meeting every condition."""

    index: int
    score: CandidateScore
    violated: tuple[Rejection, ...]
    needs: Mapping[str, float]
    """The thresholds, by name, that would admit it."""

    @property
    def flags(self) -> str:
        """The thresholds that would admit it, as on the command line."""
        return " ".join(f"--{name} {value}" for name, value in self.needs.items())

    def __str__(self) -> str:
        return f"{self.score.label} (ablation score {self.score.ablation_refusal:.2f}) needs {self.flags}"


def ranks(scores: Sequence[CandidateScore], conditions: Conditions, zero: Sequence[bool]) -> list[int]:
    """For each candidate, the number of candidates that come before it by KL, among those that fit; ties go by index."""
    fitting = [i for i, score in enumerate(scores) if conditions.fits(score, zero=zero[i])]
    order = sorted(fitting, key=lambda index: scores[index].kl_div)
    place = {index: rank for rank, index in enumerate(order)}
    return [place.get(index, len(order)) for index in range(len(scores))]


def finalists(scores: Sequence[CandidateScore], conditions: Conditions, zero: Sequence[bool]) -> list[int]:
    """The candidates that meet the conditions on length, layer, KL and rank, by index."""
    ahead, top_k = ranks(scores, conditions, zero), conditions.top_k_candidates
    fitting = [i for i, score in enumerate(scores) if conditions.fits(score, zero=zero[i])]
    return [index for index in fitting if top_k is None or ahead[index] < top_k]


def relax_layer_and_kl(scores: Sequence[CandidateScore], conditions: Conditions, zero: Sequence[bool]) -> Conditions:
    """Drop the conditions on layer and KL, with a warning, if they are relaxing and no candidate meets them."""
    dropped = conditions.layer_limit == math.inf  # by an earlier call
    if dropped or not conditions.relaxing or finalists(scores, conditions, zero):
        return conditions
    warn_layer_and_kl(conditions)
    return conditions.without_layer_and_kl()


def decide(scores: Sequence[CandidateScore], conditions: Conditions, zero: Sequence[bool]) -> Decision:
    """Select the candidate with the lowest ablation score of those that meet every condition; a tie goes to the first.

    Args:
        scores: mean scores of every candidate; NaN where not measured.
        conditions: if they are relaxing, those on KL and layer, and then that on steering, are dropped, with a warning, where no
            candidate meets them.
        zero: which candidates are zero.
    """
    conditions = relax_layer_and_kl(scores, conditions, zero)
    rejections = _rejections(scores, conditions, zero)
    if conditions.relaxing and None not in rejections and Rejection.STEERING in rejections:
        warn_steering(conditions)
        conditions = conditions.without_steering()
        rejections = _rejections(scores, conditions, zero)
    admissible = [index for index, rejection in enumerate(rejections) if rejection is None]
    selected = min(admissible, key=lambda index: scores[index].ablation_refusal, default=None)
    for index in admissible:
        rejections[index] = None if index == selected else Rejection.NOT_BEST
    return Decision(selected, tuple(rejections), conditions)


def _rejections(
    scores: Sequence[CandidateScore], conditions: Conditions, zero: Sequence[bool]
) -> list[Rejection | None]:
    ahead = ranks(scores, conditions, zero)
    return [conditions.rejection(score, zero=zero[index], ahead=ahead[index]) for index, score in enumerate(scores)]


def warn_layer_and_kl(conditions: Conditions) -> None:
    """Warn that no candidate meets the conditions on layer and KL, so that both are dropped."""
    log.warning(
        "No candidate has a KL of %g or less below layer %d; those of lowest KL are used.",
        conditions.kl_threshold,
        conditions.layer_limit,
    )


def warn_steering(conditions: Conditions) -> None:
    """Warn that no candidate meets the condition on the steering score, so that it is dropped."""
    log.warning(
        "No candidate reaches a steering score of %.2f when added; the condition is dropped.",
        conditions.induce_threshold,
    )


def warn_nearest(score: CandidateScore, conditions: Conditions) -> None:
    """Warn that no candidate meets the conditions, so that the nearest miss is used."""
    log.warning(
        "No candidate meets every condition; the nearest miss, %s, is used: %s.",
        score.label,
        ", and ".join(shortcomings(score, conditions)),
    )


def shortcomings(score: CandidateScore, conditions: Conditions) -> list[str]:
    """The conditions on layer and scores that a candidate violates, in words."""
    words = {
        Rejection.LAYER: f"its layer is not below {conditions.layer_limit:g}",
        Rejection.KL: f"its KL is above {conditions.kl_threshold:g}",
        Rejection.STEERING: f"its steering score is below {conditions.induce_threshold:.2f}",
    }
    return [words[violated] for violated in conditions.violations(score) if violated in words]


def explain_no_candidate(
    scores: Sequence[CandidateScore], decision: Decision, zero: Sequence[bool], n_layers: int
) -> str:
    """The message where no candidate meets the conditions, with the nearest misses and the thresholds that they need."""
    conditions, by_rejection = decision.conditions, Counter(decision.rejections)
    if all(zero):
        return "Every candidate has length zero: harmful and harmless training prompts leave the same activations. Are they the same?"
    if conditions.relaxing:
        return "No candidate has all of its scores: some are NaN. Try --dtype float32."
    counted = "; ".join(
        f"{count} by {conditions.reason(rejection, n_layers)}" for rejection, count in by_rejection.items() if rejection
    )
    lines = [f"  {miss}" for miss in nearest_misses(scores, conditions, zero, n_layers)]
    misses = "\nThe nearest misses:\n" + "\n".join(lines) if lines else ""
    remedy = "\n--select nearest takes the first of them all the same." if lines else ""
    return (
        f"None of {len(scores)} candidates passes every condition: {counted}. No direction in this model both carries refusal "
        f"and leaves harmless behaviour alone, by these thresholds.{misses}{remedy}"
    )


def nearest_misses(
    scores: Sequence[CandidateScore], conditions: Conditions, zero: Sequence[bool], n_layers: int
) -> list[Miss]:
    """The three candidates that violate the conditions on KL and steering by least, in order; a tie goes to the first.

    Only candidates of allowed layers and with all scores count. There are none where conditions are relaxing: dropping those
    that no candidate meets has admitted the nearest.
    """

    def excess(score: CandidateScore) -> float:
        too_far = max(0.0, score.kl_div - conditions.kl_threshold) / max(conditions.kl_threshold, 0.01)
        return too_far + max(0.0, conditions.induce_threshold - score.steering_refusal)

    if conditions.relaxing:
        return []
    limit = layer_limit(n_layers, conditions.asked)
    finite = [
        index
        for index, score in enumerate(scores)
        if not zero[index]
        and score.layer < limit
        and math.isfinite(score.kl_div + score.steering_refusal + score.ablation_refusal)
    ]
    return [_miss(index, scores[index], conditions) for index in sorted(finite, key=lambda i: excess(scores[i]))[:3]]


def _miss(index: int, score: CandidateScore, conditions: Conditions) -> Miss:
    failed = tuple(conditions.violations(score))
    needs = {
        **({"kl_threshold": _up(score.kl_div)} if Rejection.KL in failed else {}),
        **({"induce_threshold": -_up(-score.steering_refusal)} if Rejection.STEERING in failed else {}),
    }
    return Miss(index, score, failed, needs)


def _up(value: float) -> float:
    """Round up to three decimals, so that the threshold shown is enough."""
    return math.ceil(value * 1000) / 1000
