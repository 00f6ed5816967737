"""Which prompts and which candidate: rules over scores. They read no model, and warn where a condition is relaxed."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from refusal_direction.config import TEXT, VISION, Rules, Thresholds
from refusal_direction.errors import NoCandidateError, TooFewPromptsError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = [
    "CandidateScore",
    "Rejection",
    "Selection",
    "all_admitted",
    "keep_fitting",
    "layer_limit",
    "reasons",
    "select",
    "select_survivor",
    "selection",
    "survivors",
    "warn_of_relaxed_kl",
    "warn_of_waived_steering",
]


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


class Rejection(IntEnum):
    """What became of a candidate. Where several are true, the first is given."""

    NULL = 0
    """Of length zero."""
    BROKEN = 1
    """A score is NaN."""
    LAYER = 2
    KL = 3
    RANK = 4
    """Not among those of lowest KL."""
    STEERING = 5
    BEATEN = 6
    """Another has a lower ablation score, or an equal one and stands first."""
    OPEN = 7
    """Not decided yet (pruned search)."""
    BEST = 8


@dataclass(frozen=True)
class Selection:
    """The candidate chosen, and what became of the others."""

    index: int
    score: CandidateScore
    discarded: dict[str, int]
    """How many each condition discarded; a candidate counts for the first that it fails."""
    dropped: tuple[str | None, ...]
    """Why each candidate was not chosen, in (position, layer) order; None for the one that was."""


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
            raise TooFewPromptsError(_too_few(kept, sets, rules.least_prompts))
        log.warning(
            "The filter left %d of %d %s prompts; the %d most fitting are used.",
            len(kept[name]),
            len(members),
            name,
            least,
        )
        sign = -1.0 if name.startswith("harmful") else 1.0
        misfit = (sign * refusal).nan_to_num(math.inf).tolist()
        kept[name] = sorted(sorted(members, key=misfit.__getitem__)[:least])
    return kept


def _too_few(kept: dict[str, list[int]], sets: dict[str, list[int]], least: int) -> str:
    counts = ", ".join(f"{len(kept[name])} of {len(members)} {name}" for name, members in sets.items())
    short = {name.split("_")[0] for name, members in sets.items() if len(kept[name]) < min(least, len(members))}
    remedies = {
        "harmful": "If the model does refuse harmful prompts, its refusals begin with other tokens: try --calibrate_refusal, or "
        "--refusal_tokens. If it hardly refuses at all, use prompts that it refuses (--harmful).",
        "harmless": "If the model does answer harmless prompts, the refusal tokens begin ordinary replies, too: try "
        "--calibrate_refusal, or --refusal_tokens. If it refuses them, use others (--harmless).",
    }
    said = "Harmful prompts are answered and harmless ones refused: maybe --harmful and --harmless are swapped. "
    swapped = said if not any(kept.values()) else ""
    return (
        f"The filter left too few prompts: {counts}; each needs {least}, or all that were asked for. It keeps harmful prompts "
        "that the model refuses and harmless ones that it answers, by the probability of the refusal tokens. "
        f"{swapped}{' '.join(remedies[side] for side in remedies if side in short)} --skip_filter goes on with every prompt; "
        "--n_train and --n_val draw more."
    )


def layer_limit(n_layers: int, thresholds: Thresholds) -> int:
    """Candidates from this layer on are discarded."""
    return int(round(n_layers * (1.0 - thresholds.prune_layers), 9))  # 10 * (1.0 - 0.9) is a little less than 1


def survivors(
    scores: Sequence[CandidateScore],
    n_layers: int,
    *,
    thresholds: Thresholds,
    top_k: int,
    null: Container[int] = (),
) -> list[int]:
    """The at most `top_k` candidates of lowest KL among those that the layer and KL conditions admit.

    If they admit none, the `top_k` of lowest KL, with a warning. In (position, layer) order. Candidates of length zero
    (`null`) never survive.
    """
    measured = [index for index, score in enumerate(scores) if index not in null and not math.isnan(score.kl_div)]
    limit = layer_limit(n_layers, thresholds)
    fitting = [i for i in measured if scores[i].layer < limit and scores[i].kl_div <= thresholds.kl]
    if not fitting:
        warn_of_relaxed_kl(thresholds, limit)
    return sorted(sorted(fitting or measured, key=lambda index: scores[index].kl_div)[:top_k])


def all_admitted(
    scores: Sequence[CandidateScore], finalists: Sequence[int], *, thresholds: Thresholds, limit: int
) -> bool:
    """Whether the `survivors` meet the conditions on layer and KL, which otherwise were relaxed for them."""
    return all(scores[i].layer < limit and scores[i].kl_div <= thresholds.kl for i in finalists)


def reasons(rules: Rules, limit: int, thresholds: Thresholds) -> dict[Rejection, str]:
    """What to say of a candidate that was not chosen."""
    steering = f"steering score < {thresholds.induce:g} (--induce_threshold)"
    return {
        Rejection.NULL: "length zero",
        Rejection.BROKEN: "a score is NaN",
        Rejection.LAYER: f"layer >= {limit} (--prune_layers {thresholds.prune_layers:g})",
        Rejection.KL: f"KL > {thresholds.kl:g} (--kl_threshold)",
        Rejection.RANK: "not among those of lowest KL",
        Rejection.STEERING: "steering score below the baseline" if rules.relative_steering else steering,
        Rejection.BEATEN: "another's ablation score is lower",
    }


def selection(index: int, score: CandidateScore, fates: Sequence[Rejection], said: dict[Rejection, str]) -> Selection:
    """The selection of a candidate, with `reasons` for what became of the others."""
    dropped = tuple(None if place == index else said[fate] for place, fate in enumerate(fates))
    losers = (None, said[Rejection.BEATEN])
    discarded = Counter(reason for reason in dropped if reason is not None and reason not in losers)
    return Selection(index, score, dict(discarded), dropped)


def _fate(score: CandidateScore, limit: int, thresholds: Thresholds, null: bool) -> Rejection:
    if null:
        return Rejection.NULL
    if any(math.isnan(value) for value in (score.ablation_refusal, score.steering_refusal, score.kl_div)):
        return Rejection.BROKEN
    if score.layer >= limit:
        return Rejection.LAYER
    if score.kl_div > thresholds.kl:
        return Rejection.KL
    return Rejection.STEERING if score.steering_refusal < thresholds.induce else Rejection.BEATEN


def select(
    scores: Sequence[CandidateScore], n_layers: int, *, thresholds: Thresholds, null: Container[int] = ()
) -> Selection:
    """The admissible candidate with the lowest ablation score; of equals the first (paper, appendix C).

    Candidates of length zero (`null`) are never admissible.

    Raises NoCandidateError, with the nearest misses, where none is admissible.
    """
    limit = layer_limit(n_layers, thresholds)
    fates = [_fate(score, limit, thresholds, index in null) for index, score in enumerate(scores)]
    admissible = [index for index, fate in enumerate(fates) if fate is Rejection.BEATEN]
    said = reasons(TEXT, limit, thresholds)
    if not admissible:
        alive = [score for index, score in enumerate(scores) if index not in null]
        discarded = dict(Counter(said[fate] for fate in fates))
        raise NoCandidateError(_explanation(len(scores), alive, limit, thresholds, discarded))
    best = _lowest_ablation(scores, admissible)
    return selection(best, scores[best], fates, said)


def select_survivor(
    scores: Sequence[CandidateScore],
    finalists: Sequence[int],
    *,
    thresholds: Thresholds,
    baseline: float,
    n_layers: int,
    null: Container[int] = (),
) -> Selection:
    """The finalist with the lowest ablation score whose steering score is at least the baseline's plus the threshold.

    If none reaches that, the finalist with the lowest ablation score, with a warning.

    Args:
        scores: of every candidate; NaN where not measured.
        finalists: the `survivors`.
        thresholds: the conditions.
        baseline: mean refusal score of the harmless prompts.
        n_layers: of the model.
        null: candidates of length zero.

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
        warn_of_waived_steering(floor)
    best = _lowest_ablation(scores, inducing or scored)

    limit = layer_limit(n_layers, thresholds)
    strict = all_admitted(scores, finalists, thresholds=thresholds, limit=limit)

    def fate(index: int) -> Rejection:
        if index in finalists:
            admitted = Rejection.BEATEN if index in (inducing or scored) else Rejection.STEERING
            return admitted if index in scored else Rejection.BROKEN
        if index in null:
            return Rejection.NULL
        if math.isnan(scores[index].kl_div):
            return Rejection.BROKEN
        if strict and scores[index].layer >= limit:
            return Rejection.LAYER
        return Rejection.KL if strict and scores[index].kl_div > thresholds.kl else Rejection.RANK

    return selection(best, scores[best], list(map(fate, range(len(scores)))), reasons(VISION, limit, thresholds))


def warn_of_relaxed_kl(thresholds: Thresholds, limit: int) -> None:
    """Warn that no candidate meets the conditions on layer and KL, so that both are dropped."""
    log.warning(
        "No candidate has a KL of %g or less below layer %d; those of lowest KL are used.", thresholds.kl, limit
    )


def warn_of_waived_steering(floor: float) -> None:
    """Warn that no candidate meets the condition on the steering score, so that it is dropped."""
    log.warning("No candidate reaches a steering score of %.2f when added; the condition is waived.", floor)


def _lowest_ablation(scores: Sequence[CandidateScore], among: Sequence[int]) -> int:
    return min(among, key=lambda index: scores[index].ablation_refusal)


def _explanation(
    count: int, scores: Sequence[CandidateScore], limit: int, thresholds: Thresholds, discarded: dict[str, int]
) -> str:
    by_reason = "; ".join(f"{count} by {reason}" for reason, count in discarded.items())

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
        f"None of {count} candidates passes every condition: {by_reason}. No direction in this model both carries refusal "
        f"and leaves harmless behaviour alone, by these thresholds. No results were written.{misses}"
    )


def _up(value: float) -> float:
    """Rounded up to three decimals, so that the threshold shown is enough."""
    return math.ceil(value * 1000) / 1000
