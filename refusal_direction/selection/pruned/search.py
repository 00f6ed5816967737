"""The loop of the pruned search: measure, judge, plan, until the selected candidate is proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import torch

from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Noise
from refusal_direction.scoring.scores import ScoreRequest
from refusal_direction.selection.conditions import Conditions, Rejection
from refusal_direction.selection.pruned.bounds import Table
from refusal_direction.selection.pruned.planner import Hints, first_round, next_round
from refusal_direction.selection.pruned.verdicts import SearchSpace, Verdicts, judge

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

__all__ = ["Ask", "PrunedResult", "search"]

Ask = Callable[[Sequence[ScoreRequest]], Iterable[float]]
"""Measures scores: each call is a pass over the weights. Requests come sorted by candidate and measure."""


@dataclass(frozen=True, eq=False)
class PrunedResult:
    """The outcome of a pruned search."""

    best: int | None
    """The selected candidate, measured in full; None if no candidate can be selected."""
    rejections: tuple[Rejection | None, ...]
    """Why each of the others is not selected."""
    conditions: Conditions
    """The conditions in force at the end: some are dropped if they are relaxing and no candidate meets them."""
    table: Table


def _no_noise() -> Noise:
    return Noise(0.0, 0.0, 0.0)


def search(
    space: SearchSpace,
    conditions: Conditions,
    floors: Mapping[Measure, Float[Tensor, "prompt"]],
    *,
    hints: Hints,
    ask: Ask,
    noise: Callable[[], Noise] = _no_noise,
) -> PrunedResult:
    """Measure until the selected candidate is proven.

    Args:
        space: the candidates.
        conditions: to be met by the selected one.
        floors: for each measure, the lowest possible cost (see `Table`) on each prompt.
        hints: guesses that save work if they are right.
        ask: measures scores; NaN is a possible value.
        noise: the effect of rounding on means, as known so far; candidates are rejected by a larger margin.
    """
    table = Table(len(space), floors)
    verdicts = judge(table, space, conditions)
    if verdicts.open:
        _measure(table, first_round(verdicts, hints), ask)
    while True:
        table.allow_for(noise())
        verdicts = judge(table, space, conditions)
        if verdicts.open:
            _measure(table, next_round(verdicts, hints), ask)
            continue
        relaxed = _relax(verdicts) if verdicts.best is None and conditions.relaxing else None
        if relaxed is None:
            return PrunedResult(verdicts.best, verdicts.rejections, conditions, table)
        conditions, requests = relaxed
        if requests:
            _measure(table, requests, ask)


def _measure(table: Table, requests: Sequence[ScoreRequest], ask: Ask) -> None:
    assert requests, "the search has nothing to measure, and yet nothing proven"
    order = list(Measure)
    requests = sorted(requests, key=lambda request: (request.candidate, order.index(request.measure)))
    table.enter(requests, ask(requests))


def _relax(verdicts: Verdicts) -> tuple[Conditions, list[ScoreRequest]] | None:
    """Where every candidate is rejected: the conditions with one dropped, and the scores needed first; None if all are."""
    table, conditions, fitting = verdicts.table, verdicts.conditions, verdicts.fitting
    known = table.complete(Measure.KL)
    if (fitting & known).any():  # they fail by the steering score
        return (conditions.without_steering(), []) if conditions.induce_threshold > -inf else None
    if fitting.any():  # rejected for another reason, but it matters whether they meet the condition on KL
        return conditions, _all_kl(table, fitting & ~known)
    if min(conditions.kl_threshold, conditions.layer_limit) < inf:
        return conditions.without_layer_and_kl(), _all_kl(table, ~torch.tensor(verdicts.space.zero))
    return None


def _all_kl(table: Table, among: Bool[Tensor, "candidate"]) -> list[ScoreRequest]:
    candidates = torch.nonzero(among).flatten().tolist()
    return [request for candidate in candidates for request in table.missing(candidate, Measure.KL)]
