"""The filter: harmful prompts that are refused and harmless ones that are answered, by their baseline refusal scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from refusal_direction.config import TEXT, Rules
from refusal_direction.errors import TooFewPromptsError
from refusal_direction.prompts.sets import Kind, PromptSet, set_name

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["filter_prompts"]

log = logging.getLogger(__name__)

_Sets = Mapping[PromptSet, Sequence[int]]


def filter_prompts(
    refusal: Float[Tensor, "prompt"], sets: _Sets, *, skip: bool = False, rules: Rules = TEXT, calibrated: bool = False
) -> dict[PromptSet, list[int]]:
    """Keep the harmful prompts that the model refuses (score > 0) and the harmless ones that it answers (score < 0).

    Args:
        refusal: baseline refusal scores.
        sets: indices of the prompts of each set.
        skip: keep all.
        rules: minimum number per set, and whether the most fitting of the others may make it up, with a warning.
        calibrated: whether the refusal tokens were calibrated, so that errors do not advise it.

    Raises TooFewPromptsError if a set is left with too few prompts for a meaningful mean.
    """
    if skip:
        return {which: list(members) for which, members in sets.items()}
    kept = {which: [i for i in members if _fits(which[0], float(refusal[i]))] for which, members in sets.items()}
    for which, members in sets.items():
        minimum = min(rules.minimum_prompts, len(members))
        if len(kept[which]) >= minimum:
            continue
        if not rules.keep_most_fitting:
            raise TooFewPromptsError(_too_few(kept, sets, rules.minimum_prompts, calibrated))
        log.warning(
            "The filter left %d of %d %s prompts; the %d most fitting are used.",
            len(kept[which]),
            len(members),
            set_name(which),
            minimum,
        )
        kept[which] = _most_fitting(which[0], members, refusal, minimum)
    return kept


def _fits(kind: Kind, score: float) -> bool:
    return score > 0 if kind is Kind.HARMFUL else score < 0


def _most_fitting(kind: Kind, members: Sequence[int], refusal: Float[Tensor, "prompt"], count: int) -> list[int]:
    sign = -1.0 if kind is Kind.HARMFUL else 1.0
    misfit = (sign * refusal).nan_to_num(math.inf).tolist()
    return sorted(sorted(members, key=misfit.__getitem__)[:count])


def _too_few(kept: _Sets, sets: _Sets, minimum: int, calibrated: bool) -> str:
    counts = ", ".join(f"{len(kept[which])} of {len(members)} {set_name(which)}" for which, members in sets.items())
    short = {which[0] for which, members in sets.items() if len(kept[which]) < min(minimum, len(members))}
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
