"""Further prompts for sets of which the filter leaves fewer than half."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refusal_direction.prompts.sets import SETS_FOR_SELECTION, PromptSet, PromptSets
from refusal_direction.scoring.baseline import Baseline
from refusal_direction.selection.filter import passes

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

__all__ = ["Refilled", "count_further", "refill"]

_ROUNDS = 3  # each is a pass over the weights
_MARGIN = 1.25  # a round that falls short costs another pass, surplus prompts cost little
_MOST = 8  # times as many prompts as asked for, in all


@dataclass(frozen=True)
class Refilled:
    """Prompts, those drawn further among them, and their baseline."""

    prompts: PromptSets
    baseline: Baseline


def refill(prompts: PromptSets, baseline: Baseline, measure: Callable[[PromptSets], Baseline]) -> Refilled:
    """Draw further prompts for the sets of which fewer than half pass the filter, until as many pass as were drawn at first.

    A set ends with the prompt that completes it, so its prompts do not depend on the sizes of the rounds.

    Args:
        prompts: as drawn at first, with reserves.
        baseline: of these prompts.
        measure: runs further prompts.
    """
    asked = {which: len(prompts[which]) for which in SETS_FOR_SELECTION}
    drawn = prompts
    for _ in range(_ROUNDS):
        passing = _passing(drawn, baseline)
        further = {
            which: count_further(
                int(passing[which].sum()),
                len(drawn[which]),
                asked=asked[which],
                left=len(drawn.reserves.get(which, ())),
            )
            for which in SETS_FOR_SELECTION
        }
        if not any(further.values()):
            break
        more = drawn.reserved(further)
        order = _set_after_set(drawn, more)
        drawn, baseline = drawn.extended(further), baseline.joined(measure(more)).renumbered(order)
    return Refilled(prompts, baseline) if drawn is prompts else _ended(prompts, drawn, baseline)


def count_further(passing: int, drawn: int, *, asked: int, left: int) -> int:
    """The number of further prompts to run for a set, by the share that has passed so far; 0 if it needs none.

    Args:
        passing: the number of prompts that pass the filter.
        drawn: of this many.
        asked: the number drawn at first; a set that has further prompts already is filled up to it.
        left: the number of prompts left in its reserve.
    """
    enough = passing >= asked if drawn > asked else 2 * passing >= asked
    if enough:
        return 0
    share = (passing + 1) / (drawn + 2)  # not 0 where none has passed
    return max(0, min(math.ceil(_MARGIN * (asked - passing) / share), left, _MOST * asked - drawn))


def _passing(prompts: PromptSets, baseline: Baseline) -> dict[PromptSet, Bool[Tensor, "prompt"]]:
    return {which: passes(which[0], baseline.refusal[members]) for which, members in prompts.indices().items()}


def _set_after_set(first: PromptSets, second: PromptSets) -> list[int]:
    """The numbers of the prompts of both, those of the second after all of the first, in the order of the sets joined."""
    ours, theirs, begin = first.indices(), second.indices(), len(first.for_selection)
    return [i for which in SETS_FOR_SELECTION for i in (*ours[which], *(begin + index for index in theirs[which]))]


def _ended(prompts: PromptSets, drawn: PromptSets, baseline: Baseline) -> Refilled:
    """End each set with the prompt that completes it."""
    passing, members = _passing(drawn, baseline), drawn.indices()
    sizes: Mapping[PromptSet, int] = {
        which: _completed(passing[which], asked=len(prompts[which])) for which in SETS_FOR_SELECTION
    }
    order = [index for which, size in sizes.items() for index in members[which][:size]]
    further = {which: size - len(prompts[which]) for which, size in sizes.items()}
    return Refilled(prompts.extended(further), baseline.renumbered(order))


def _completed(passing: Bool[Tensor, "prompt"], *, asked: int) -> int:
    """The number of prompts up to the one with which as many pass as were asked for, and at least these."""
    complete = (passing.cumsum(0) >= asked).nonzero()
    return max(asked, int(complete[0]) + 1) if len(complete) else len(passing)
