"""Which prompts and which candidate: pure rules over scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refusal_direction.config import LEAST_PROMPTS, Thresholds
from refusal_direction.errors import NoCandidateError, TooFewPromptsError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["CandidateScore", "Selection", "keep_fitting", "select"]


@dataclass(frozen=True)
class CandidateScore:
    """A candidate's mean scores over the validation prompts."""

    position: int
    """-1 is the last prompt token."""
    layer: int
    ablation_refusal: float
    steering_refusal: float
    kl_div: float


@dataclass(frozen=True)
class Selection:
    """The candidate chosen, and how many each condition discarded (a candidate counts for the first it fails)."""

    index: int
    score: CandidateScore
    discarded: dict[str, int]


def keep_fitting(
    refusal: Float[Tensor, "prompt"], sets: dict[str, list[int]], *, skip: bool = False
) -> dict[str, list[int]]:
    """Keep the harmful prompts that the model refuses (score > 0) and the harmless ones that it answers (score < 0).

    Args:
        refusal: baseline refusal scores.
        sets: prompt indices by the name of their set; the name begins with harmful or harmless.
        skip: keep all.

    Raises TooFewPromptsError where a set is left with too few prompts for its mean to mean anything.
    """
    if skip:
        return sets
    kept = {
        name: [i for i in members if (refusal[i] > 0 if name.startswith("harmful") else refusal[i] < 0)]
        for name, members in sets.items()
    }
    if any(len(kept[name]) < min(LEAST_PROMPTS, len(members)) for name, members in sets.items()):
        counts = ", ".join(f"{len(kept[name])} of {len(members)} {name}" for name, members in sets.items())
        raise TooFewPromptsError(
            f"The filter left too few prompts: {counts}. It keeps harmful prompts that the model refuses and harmless ones that "
            "it answers, by the probability of the refusal tokens. If the model does refuse, its refusals begin with other "
            "tokens: try --calibrate_refusal, or --refusal_tokens. If it hardly refuses at all, --skip_filter goes on "
            "with every prompt; or use more prompts (--n_train, --n_val) or prompts that it refuses (--harmful)."
        )
    return kept


def _first_failure(score: CandidateScore, limit: int, thresholds: Thresholds) -> str | None:
    if any(math.isnan(value) for value in (score.ablation_refusal, score.steering_refusal, score.kl_div)):
        return "a score is NaN"
    if score.layer >= limit:
        return f"layer >= {limit} (--prune_layers {thresholds.prune_layers:g})"
    if score.kl_div > thresholds.kl:
        return f"KL > {thresholds.kl:g} (--kl_threshold)"
    if score.steering_refusal < thresholds.induce:
        return f"steering score < {thresholds.induce:g} (--induce_threshold)"
    return None


def select(scores: Sequence[CandidateScore], n_layers: int, thresholds: Thresholds) -> Selection:
    """The admissible candidate with the lowest ablation score; of equals the first (paper, appendix C).

    Raises NoCandidateError, with the nearest misses, where none is admissible.
    """
    limit = int(n_layers * (1.0 - thresholds.prune_layers))
    failures = [_first_failure(score, limit, thresholds) for score in scores]
    discarded: dict[str, int] = {}
    for failure in failures:
        if failure is not None:
            discarded[failure] = discarded.get(failure, 0) + 1
    admissible = [index for index, failure in enumerate(failures) if failure is None]
    if not admissible:
        raise NoCandidateError(_explanation(scores, limit, thresholds, discarded))
    best = min(admissible, key=lambda index: scores[index].ablation_refusal)
    return Selection(best, scores[best], discarded)


def _explanation(
    scores: Sequence[CandidateScore], limit: int, thresholds: Thresholds, discarded: dict[str, int]
) -> str:
    reasons = "; ".join(f"{count} by {reason}" for reason, count in discarded.items())

    def excess(score: CandidateScore) -> float:
        too_far = max(0.0, score.kl_div - thresholds.kl) / max(thresholds.kl, 0.01)
        return too_far + max(0.0, thresholds.induce - score.steering_refusal)

    finite = [
        score for score in scores if score.layer < limit and not math.isnan(excess(score) + score.ablation_refusal)
    ]
    lines = [
        f"  position {score.position}, layer {score.layer} (ablation score {score.ablation_refusal:.2f}) needs"
        + (f" --kl_threshold {_up(score.kl_div)}" if score.kl_div > thresholds.kl else "")
        + (f" --induce_threshold {-_up(-score.steering_refusal)}" if score.steering_refusal < thresholds.induce else "")
        for score in sorted(finite, key=excess)[:3]
    ]
    misses = "\nThe nearest misses:\n" + "\n".join(lines) if lines else ""
    return (
        f"None of {len(scores)} candidates passes every condition: {reasons}. No direction in this model both carries refusal "
        f"and leaves harmless behaviour alone, by these thresholds. Nothing was written.{misses}"
    )


def _up(value: float) -> float:
    """Rounded up to three decimals, so that the threshold shown is enough."""
    return math.ceil(value * 1000) / 1000
