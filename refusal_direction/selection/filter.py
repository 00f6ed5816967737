"""The filter: harmful prompts that are refused and harmless ones that are answered, by their baseline refusal scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from refusal_direction.config import TEXT, Rules
from refusal_direction.errors import TooFewPromptsError
from refusal_direction.prompts.sets import Kind, PromptSet, Split, set_name

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

__all__ = ["filter_prompts", "passes", "warn_few"]

log = logging.getLogger(__name__)

_FEW = 16  # validation prompts, below which a standard error is a rough guess

_Sets = Mapping[PromptSet, Sequence[int]]


def filter_prompts(
    refusal: Float[Tensor, "prompt"],
    sets: _Sets,
    *,
    skip: bool = False,
    rules: Rules = TEXT,
    asked: Mapping[PromptSet, int] | None = None,
    calibrated: bool = False,
) -> dict[PromptSet, list[int]]:
    """Keep the harmful prompts that the model refuses (score > 0) and the harmless ones that it answers (score < 0).

    Args:
        refusal: baseline refusal scores.
        sets: indices of the prompts of each set.
        skip: keep all.
        rules: minimum number per set, and whether the most fitting of the others may make it up, with a warning.
        asked: the number of prompts asked for of each set, where more have been drawn.
        calibrated: whether the refusal tokens were calibrated, so that errors do not advise it.

    Raises TooFewPromptsError if a set is left with too few prompts for a meaningful mean.
    """
    if skip:
        return {which: list(members) for which, members in sets.items()}
    asked = asked or {which: len(members) for which, members in sets.items()}
    fits = {kind: passes(kind, refusal).tolist() for kind in Kind}
    kept = {which: [i for i in members if fits[which[0]][i]] for which, members in sets.items()}
    for which, members in sets.items():
        minimum = min(rules.minimum_prompts, asked[which])
        if len(kept[which]) >= minimum:
            continue
        if not rules.keep_most_fitting:
            raise TooFewPromptsError(_too_few(kept, sets, rules.minimum_prompts, asked, calibrated=calibrated))
        log.warning(
            "The filter left %d of %d %s prompts; the %d most fitting are used.",
            len(kept[which]),
            len(members),
            set_name(which),
            minimum,
        )
        kept[which] = _most_fitting(which[0], members, refusal, minimum)
    return kept


def passes(kind: Kind, refusal: Float[Tensor, "prompt"]) -> Bool[Tensor, "prompt"]:
    """Whether prompts of a kind pass the filter, by their baseline refusal scores."""
    return refusal > 0 if kind is Kind.HARMFUL else refusal < 0


def warn_few(kept: _Sets, sets: _Sets, asked: Mapping[PromptSet, int]) -> None:
    """Warn of standard errors over few validation prompts, unless about that few were asked for."""
    for which, members in kept.items():
        enough = _FEW if asked[which] >= _FEW else asked[which] / 2
        if which[1] is Split.VALIDATION and len(members) < enough:
            kind = which[0].value
            log.warning(
                "Scores on %s prompts are means over only %d of the %d validation prompts drawn. The standard error says how "
                "far such a mean may be off because other prompts would score differently; from so few it is a rough guess, "
                "often too small. Trust no difference below three of them, or give more prompts that pass the filter (--%s).",
                kind,
                len(members),
                len(sets[which]),
                kind,
            )


def _most_fitting(kind: Kind, members: Sequence[int], refusal: Float[Tensor, "prompt"], count: int) -> list[int]:
    sign = -1.0 if kind is Kind.HARMFUL else 1.0
    misfit = (sign * refusal).nan_to_num(math.inf).tolist()
    return sorted(sorted(members, key=misfit.__getitem__)[:count])


def _too_few(kept: _Sets, sets: _Sets, minimum: int, asked: Mapping[PromptSet, int], *, calibrated: bool) -> str:
    counts = ", ".join(f"{len(kept[which])} of {len(members)} {set_name(which)}" for which, members in sets.items())
    short = {which[0] for which in sets if len(kept[which]) < min(minimum, asked[which])}
    tokens = "name them with --refusal_tokens" if calibrated else "try --calibrate_refusal, or --refusal_tokens"
    remedies = {
        Kind.HARMFUL: f"If the model does refuse harmful prompts, its refusals begin with other tokens: {tokens}. If it hardly "
        "refuses at all, use prompts that it refuses (--harmful).",
        Kind.HARMLESS: "If the model does answer harmless prompts, the refusal tokens begin ordinary replies, too: "
        f"{tokens.replace('name them', 'name others')}. If it refuses them, use others (--harmless).",
    }
    said = "Harmful prompts are answered and harmless ones refused: maybe --harmful and --harmless are swapped. "
    swapped = said if not any(kept.values()) else ""
    return (
        f"The filter left too few prompts: {counts}; each needs {minimum}, or all that were asked for. It keeps harmful prompts "
        "that the model refuses and harmless ones that it answers, by the probability of the refusal tokens. "
        f"{swapped}{' '.join(remedies[kind] for kind in remedies if kind in short)} --skip_filter goes on with every prompt; "
        "--n_train and --n_val draw more."
    )
