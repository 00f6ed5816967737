"""Which prompts and which candidate: pure rules over scores."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refusal_direction.config import TEXT, Rules, Thresholds
from refusal_direction.errors import NoCandidateError, TooFewPromptsError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["CandidateScore", "Selection", "keep_fitting", "layer_limit", "select", "select_survivor", "survivors"]


log = logging.getLogger(__name__)


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
    refusal: Float[Tensor, "prompt"], sets: dict[str, list[int]], *, skip: bool = False, rules: Rules = TEXT
) -> dict[str, list[int]]:
    """Keep the harmful prompts that the model refuses (score > 0) and the harmless ones that it answers (score < 0).

    Args:
        refusal: baseline refusal scores.
        sets: prompt indices by the name of their set; the name begins with harmful or harmless.
        skip: keep all.
        rules: how many must be left, and whether the most fitting of the others may fill up, with a warning.

    Raises TooFewPromptsError where a set is left with too few prompts for its mean to mean anything.
    """
    if skip:
        return sets
    kept = {
        name: [i for i in members if (refusal[i] > 0 if name.startswith("harmful") else refusal[i] < 0)]
        for name, members in sets.items()
    }
    for name, members in sets.items():
        least = min(rules.least_prompts, len(members))
        if len(kept[name]) >= least:
            continue
        if not rules.refill:
            raise TooFewPromptsError(_too_few(kept, sets))
        log.warning(
            "The filter left %d of %d %s prompts; the %d most fitting are used.",
            len(kept[name]),
            len(members),
            name,
            least,
        )
        sign = -1.0 if name.startswith("harmful") else 1.0
        fitting = sorted(members, key=lambda i, sign=sign: float((sign * refusal[i]).nan_to_num(math.inf)))  # type: ignore[misc]
        kept[name] = sorted(fitting[:least])
    return kept


def _too_few(kept: dict[str, list[int]], sets: dict[str, list[int]]) -> str:
    counts = ", ".join(f"{len(kept[name])} of {len(members)} {name}" for name, members in sets.items())
    return (
        f"The filter left too few prompts: {counts}. It keeps harmful prompts that the model refuses and harmless ones that "
        "it answers, by the probability of the refusal tokens. If the model does refuse, its refusals begin with other "
        "tokens: try --calibrate_refusal, or --refusal_tokens. If it hardly refuses at all, --skip_filter goes on "
        "with every prompt; or use more prompts (--n_train, --n_val) or prompts that it refuses (--harmful)."
    )


def layer_limit(n_layers: int, thresholds: Thresholds) -> int:
    """Candidates from this layer on are discarded."""
    return int(n_layers * (1.0 - thresholds.prune_layers))


def survivors(
    scores: Sequence[CandidateScore], n_layers: int, thresholds: Thresholds, top_k: int, null: Container[int] = ()
) -> list[int]:
    """The at most `top_k` candidates of lowest KL among those that the layer and KL conditions admit.

    If they admit none, the `top_k` of lowest KL, with a warning. In (position, layer) order. Candidates of length zero
    (`null`) never survive.
    """
    measured = [index for index, score in enumerate(scores) if index not in null and not math.isnan(score.kl_div)]
    limit = layer_limit(n_layers, thresholds)
    fitting = [i for i in measured if scores[i].layer < limit and scores[i].kl_div <= thresholds.kl]
    if not fitting:
        log.warning(
            "No candidate has a KL of %g or less below layer %d; those of lowest KL are used.", thresholds.kl, limit
        )
    return sorted(sorted(fitting or measured, key=lambda index: scores[index].kl_div)[:top_k])


def _first_failure(score: CandidateScore, limit: int, thresholds: Thresholds, null: bool) -> str | None:
    if null:
        return "length zero"
    if any(math.isnan(value) for value in (score.ablation_refusal, score.steering_refusal, score.kl_div)):
        return "a score is NaN"
    if score.layer >= limit:
        return f"layer >= {limit} (--prune_layers {thresholds.prune_layers:g})"
    if score.kl_div > thresholds.kl:
        return f"KL > {thresholds.kl:g} (--kl_threshold)"
    if score.steering_refusal < thresholds.induce:
        return f"steering score < {thresholds.induce:g} (--induce_threshold)"
    return None


def select(
    scores: Sequence[CandidateScore], n_layers: int, thresholds: Thresholds, null: Container[int] = ()
) -> Selection:
    """The admissible candidate with the lowest ablation score; of equals the first (paper, appendix C).

    Candidates of length zero (`null`) are never admissible.

    Raises NoCandidateError, with the nearest misses, where none is admissible.
    """
    limit = layer_limit(n_layers, thresholds)
    failures = [_first_failure(score, limit, thresholds, index in null) for index, score in enumerate(scores)]
    admissible = [index for index, failure in enumerate(failures) if failure is None]
    discarded = dict(Counter(failure for failure in failures if failure is not None))
    if not admissible:
        alive = [score for index, score in enumerate(scores) if index not in null]
        raise NoCandidateError(_explanation(len(scores), alive, limit, thresholds, discarded))
    best = _lowest_ablation(scores, admissible)
    return Selection(best, scores[best], discarded)


def select_survivor(
    scores: Sequence[CandidateScore], finalists: Sequence[int], thresholds: Thresholds, baseline: float
) -> Selection:
    """The finalist with the lowest ablation score whose steering score is at least the baseline's plus the threshold.

    If none reaches that, the finalist with the lowest ablation score, with a warning.

    Raises NoCandidateError where no finalist has scores.
    """
    scored = [
        index for index in finalists if not math.isnan(scores[index].ablation_refusal + scores[index].steering_refusal)
    ]
    if not scored:
        raise NoCandidateError("Every score of every candidate is NaN. Try --dtype float32.")
    floor = baseline + thresholds.induce
    inducing = [index for index in scored if scores[index].steering_refusal >= floor]
    if not inducing:
        log.warning("No candidate reaches a steering score of %.2f when added; the condition is waived.", floor)
    best = _lowest_ablation(scores, inducing or scored)
    return Selection(
        best,
        scores[best],
        {
            "not among those of lowest KL": len(scores) - len(finalists),
            "steering score below the baseline": len(scored) - len(inducing) if inducing else 0,
        },
    )


def _lowest_ablation(scores: Sequence[CandidateScore], among: Sequence[int]) -> int:
    return min(among, key=lambda index: scores[index].ablation_refusal)


def _explanation(
    count: int, scores: Sequence[CandidateScore], limit: int, thresholds: Thresholds, discarded: dict[str, int]
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
        f"None of {count} candidates passes every condition: {reasons}. No direction in this model both carries refusal "
        f"and leaves harmless behaviour alone, by these thresholds. Nothing was written.{misses}"
    )


def _up(value: float) -> float:
    """Rounded up to three decimals, so that the threshold shown is enough."""
    return math.ceil(value * 1000) / 1000
