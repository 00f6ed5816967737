"""Finding the selected candidate without scoring every one in full: by bounds, so that the choice is the same, provably.

Pure decisions: nothing here knows a model. What the search wants to know it asks of a function that measures.

    table     scores so far, and what they prove of means
    verdicts  which candidates can still be selected
    plan      what to measure next; a matter of cost, never of the result
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import torch

from refusal_direction.scoring.metrics import Measure
from refusal_direction.selection.pruned.bounds import ScoreRequest, Table
from refusal_direction.selection.pruned.planner import Hints, first_round, next_round
from refusal_direction.selection.pruned.verdicts import Conditions, Verdicts, judge
from refusal_direction.selection.rules import Rejection

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

__all__ = ["Ask", "ScoreRequest", "Conditions", "Found", "Hints", "search"]

Ask = Callable[[Sequence[ScoreRequest]], Iterable[float]]
"""Measures what the cells stand for: each call is a pass over the weights. Cells come sorted by candidate and measure."""


@dataclass(frozen=True)
class Found:
    """What the search has proven."""

    best: int | None
    """The selected candidate, measured in full; None where no candidate can be selected."""
    fates: tuple[Rejection, ...]
    """Why each of the others is not selected."""
    conditions: Conditions
    """Those in force at the end: some are dropped where no candidate meets them."""
    table: Table


def search(
    conditions: Conditions,
    floors: Mapping[Measure, Float[Tensor, "prompt"]],
    *,
    hints: Hints,
    ask: Ask,
    fallbacks: bool,
    noise: Callable[[], Mapping[Measure, float]] = dict,
) -> Found:
    """Measure until it is proven which candidate is selected.

    Args:
        conditions: what it must meet.
        floors: for each measure, below what its cost (see `Table`) cannot fall on each prompt.
        hints: guesses that save work if they are right.
        ask: measures. NaN is an answer, too.
        fallbacks: whether conditions that no candidate meets are dropped (images with text).
        noise: how far rounding alone moves a mean, as known so far. What is dropped is further away than that.
    """
    table = Table(len(conditions.layers), floors)
    judgement = judge(table, conditions)
    if judgement.open:
        _measure(table, first_round(table, conditions, judgement, hints=hints), ask)
    while True:
        table.allow_for(noise())
        judgement = judge(table, conditions)
        if judgement.open:
            _measure(table, next_round(table, conditions, judgement, hints=hints), ask)
            continue
        step = _fall_back(table, conditions, judgement) if judgement.best is None and fallbacks else None
        if step is None:
            fates = tuple(map(Rejection, judgement.fates.tolist()))
            return Found(judgement.best, fates, conditions, table)
        conditions, cells = step
        if cells:
            _measure(table, cells, ask)


def _measure(table: Table, cells: Sequence[ScoreRequest], ask: Ask) -> None:
    assert cells, "the search has nothing to measure, and yet nothing proven"
    order = list(Measure)
    cells = sorted(cells, key=lambda cell: (cell.candidate, order.index(cell.measure)))
    table.enter(cells, ask(cells))


def _fall_back(
    table: Table, conditions: Conditions, judgement: Verdicts
) -> tuple[Conditions, list[ScoreRequest]] | None:
    """Where every candidate is out: which condition is dropped, and what must be measured first. None: all have been."""
    known = table.complete(Measure.KL)
    if (judgement.fitting & known).any():  # it is the steering that none of them meets
        return (conditions.without_steering(), []) if conditions.steering > -inf else None
    if judgement.fitting.any():  # dropped for something else; but it matters whether they meet the one on KL
        return conditions, _all_kl(table, judgement.fitting & ~known)
    if min(conditions.kl, conditions.limit) < inf:
        return conditions.without_kl(), _all_kl(table, ~conditions.null)
    return None


def _all_kl(table: Table, among: Bool[Tensor, "candidate"]) -> list[ScoreRequest]:
    candidates = torch.nonzero(among).flatten().tolist()
    return [cell for candidate in candidates for cell in table.missing(candidate, Measure.KL)]
