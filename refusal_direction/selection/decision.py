"""The decision: from mean scores and conditions to the selected candidate. Reads no model."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions, Rejection, layer_limit

__all__ = [
    "Decision",
    "decide",
    "explain_no_candidate",
    "finalists",
    "ranks",
    "relax_layer_and_kl",
    "warn_layer_and_kl",
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


def explain_no_candidate(
    scores: Sequence[CandidateScore], decision: Decision, zero: Sequence[bool], n_layers: int
) -> str:
    """The message where no candidate meets the conditions, with the nearest misses and the thresholds that they need."""
    conditions, by_rejection = decision.conditions, Counter(decision.rejections)
    if conditions.relaxing:
        return "No candidate has all of its scores: some are NaN. Try --dtype float32."
    counted = "; ".join(
        f"{count} by {conditions.reason(rejection, n_layers)}" for rejection, count in by_rejection.items() if rejection
    )
    alive = [score for index, score in enumerate(scores) if not zero[index]]
    lines = [f"  {_miss(score, conditions)}" for score in _nearest(alive, conditions, n_layers)]
    misses = "\nThe nearest misses:\n" + "\n".join(lines) if lines else ""
    return (
        f"None of {len(scores)} candidates passes every condition: {counted}. No direction in this model both carries refusal "
        f"and leaves harmless behaviour alone, by these thresholds. No results were written.{misses}"
    )


def _nearest(scores: Sequence[CandidateScore], conditions: Conditions, n_layers: int) -> list[CandidateScore]:
    def excess(score: CandidateScore) -> float:
        too_far = max(0.0, score.kl_div - conditions.kl_threshold) / max(conditions.kl_threshold, 0.01)
        return too_far + max(0.0, conditions.induce_threshold - score.steering_refusal)

    limit = layer_limit(n_layers, conditions.asked)
    finite = [
        score for score in scores if score.layer < limit and not math.isnan(excess(score) + score.ablation_refusal)
    ]
    return sorted(finite, key=excess)[:3]


def _miss(score: CandidateScore, conditions: Conditions) -> str:
    failed = tuple(conditions.violations(score))
    return (
        f"{score.label} (ablation score {score.ablation_refusal:.2f}) needs"
        + (f" --kl_threshold {_up(score.kl_div)}" if Rejection.KL in failed else "")
        + (f" --induce_threshold {-_up(-score.steering_refusal)}" if Rejection.STEERING in failed else "")
    )


def _up(value: float) -> float:
    """Round up to three decimals, so that the threshold shown is enough."""
    return math.ceil(value * 1000) / 1000
