"""What to measure next. Nothing here can change what is selected, only how much is measured until it is proven.

A candidate is dropped as soon as the lower bound of one of its costs is above a limit: of the ablation score above the
best candidate's, of the KL or the steering cost above the threshold. How many prompts each of these ways takes is
estimated from those measured, and the cheapest is taken. Candidates that no way promises to drop are contenders: they are
measured in full, the most promising first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch

from refusal_direction.scoring.metrics import Measure
from refusal_direction.selection.pruned.bounds import ScoreRequest, Table
from refusal_direction.selection.pruned.verdicts import Conditions, Verdicts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

__all__ = ["Hints", "first_round", "next_round"]

_DOUBT = 0.5  # of an estimate from one prompt, in units of the refusal score
_RARELY_CHEAPEST = 0.75  # of the prompts: a way to drop candidates that takes more is rarely the cheapest one
_KL_DOUBT = 4  # prompts without any KL that are added to those measured: it varies by orders of magnitude


@dataclass(frozen=True)
class Hints:
    """Guesses, which may be wrong."""

    candidates: Sequence[int]
    """The candidates, the most promising first."""
    shape: Mapping[Measure, Float[Tensor, "prompt"]]
    """How the prompts are thought to differ in what they cost a candidate."""
    depth: int
    """Layers of the model: an ablated row goes through all, a steered one through those from its candidate's on."""


def first_round(table: Table, conditions: Conditions, judgement: Verdicts, *, hints: Hints) -> list[ScoreRequest]:
    """A prompt of each measure for every candidate; the ablation score of the most promising in full.

    Where only the `top_k` of lowest KL are considered, and there are many more, the KL decides more: an eighth of the prompts.
    Where nearly any steering score is enough, few candidates will be dropped by it: no prompt.
    """
    forecasts = _forecasts(table, hints)
    tried = dict.fromkeys(Measure, 1)
    if int(judgement.fitting.sum()) > 2 * conditions.top_k:
        tried[Measure.KL] = ceil(len(table.floors[Measure.KL]) / 8)
    if _least_share(table.floors[Measure.STEERING], -conditions.steering) > _RARELY_CHEAPEST:
        tried[Measure.STEERING] = 0
    open_ = set(judgement.open)
    leader = next(candidate for candidate in hints.candidates if candidate in open_)
    cells = [
        cell
        for candidate in judgement.open
        for measure, forecast in forecasts.items()
        for cell in forecast.rest(candidate)[: tried[measure]]
    ]
    return list(dict.fromkeys([*cells, *forecasts[Measure.ABLATION].rest(leader)]))


def _least_share(floors: Float[Tensor, "prompt"], limit: float) -> float:
    """The least share of prompts that must be measured to drop a candidate whose costs lie between floor and -floor."""
    floor = float(floors.mean())
    return (limit - floor) / (-2 * floor) if floor < 0 else 1.0


def next_round(table: Table, conditions: Conditions, judgement: Verdicts, *, hints: Hints) -> list[ScoreRequest]:
    """What is likely to bring the open candidates to a verdict.

    At least one cell, if there is an open candidate: whatever the hints are, the search goes on.
    """
    planned = list(dict.fromkeys(_Planner(table, conditions, judgement, hints=hints).cells()))
    if planned:
        return planned
    missing = [
        cell for candidate in judgement.open for measure in Measure for cell in table.missing(candidate, measure)
    ]
    rivals = torch.nonzero(judgement.fitting).flatten().tolist()
    return missing or [cell for candidate in rivals for cell in table.missing(candidate, Measure.KL)]


class _Forecast:
    """What one measure is likely to come to, for every candidate."""

    def __init__(self, table: Table, measure: Measure, hints: Hints) -> None:
        self.measure, shape, self._slack = measure, hints.shape[measure], table.slack[measure]
        costs, known, floors = table.costs(measure), table.known[measure], table.floors[measure]
        expected, cautious = (_expected(costs, known, shape, measure, diagnose=diagnose) for diagnose in (False, True))
        self.means: list[float] = torch.where(known, costs, torch.maximum(expected, floors)).mean(1).tolist()
        """Estimates of mean costs."""
        self._gains: list[list[float]] = (cautious - floors).clamp_min(0).tolist()  # by which bounds are likely to rise
        self._bounds: list[float] = torch.where(known, costs, floors).sum(1).tolist()
        self._known: list[list[bool]] = known.tolist()
        self._telling = shape.argsort(descending=True, stable=True).tolist()

    def rest(self, candidate: int) -> list[ScoreRequest]:
        """What has not been measured of a candidate, the most telling prompts first."""
        known = self._known[candidate]
        return [ScoreRequest(candidate, self.measure, prompt) for prompt in self._telling if not known[prompt]]

    def towards(self, candidate: int, limit: float, least: int) -> list[ScoreRequest] | None:
        """The cells, at `least` so many, that are likely to bring the bound of a candidate's mean above a limit.

        None where all that are left are not likely to.
        """
        rest, gains = self.rest(candidate), self._gains[candidate]
        lacking = (limit + 2 * self._slack) * len(gains) - self._bounds[candidate]
        if lacking <= 0:
            return []
        for count, cell in enumerate(rest, start=1):
            lacking -= gains[cell.prompt]
            if lacking <= 0:
                return rest[: max(count, least)]
        return None


def _expected(
    costs: Float[Tensor, "candidate prompt"],
    known: Bool[Tensor, "candidate prompt"],
    shape: Float[Tensor, "prompt"],
    measure: Measure,
    *,
    diagnose: bool,
) -> Float[Tensor, "candidate prompt"]:
    """What candidates are likely to cost on prompts, by those known; less, the more `doubt` there is."""
    count = known.sum(1, keepdim=True).clamp_min(1)
    if measure is Measure.KL:  # in proportion to the shape
        weight = torch.where(known, shape, 0.0).sum(1, keepdim=True) + diagnose * _KL_DOUBT * shape.mean()
        return shape * torch.where(known, costs, 0.0).sum(1, keepdim=True) / weight.clamp_min(1e-9)
    above = torch.where(known, costs - shape, 0.0).sum(1, keepdim=True) / count
    return shape + above - diagnose * _DOUBT / count.sqrt()


def _forecasts(table: Table, hints: Hints) -> dict[Measure, _Forecast]:
    return {measure: _Forecast(table, measure, hints) for measure in Measure}


class _Planner:
    """What follows from the forecasts at one moment of the search."""

    def __init__(self, table: Table, conditions: Conditions, judgement: Verdicts, *, hints: Hints) -> None:
        self.table, self.conditions, self.judgement, self.depth = table, conditions, judgement, hints.depth
        self.forecasts = _forecasts(table, hints)
        self.ablation, self.kl, self.steering = (
            self.forecasts[measure].means for measure in (Measure.ABLATION, Measure.KL, Measure.STEERING)
        )
        n_prompts = max(map(len, table.floors.values()))
        self.least = ceil(n_prompts / max(1, len(judgement.open)))  # a round of a few cells is not worth a pass
        self.leader = self._leader()
        self.limits = {
            Measure.ABLATION: self.ablation[self.leader],
            Measure.KL: conditions.kl,
            Measure.STEERING: -conditions.steering,
        }

    def _leader(self) -> int:
        """The best candidate so far; where none is proven, the likely one."""
        if self.judgement.best is not None:
            return self.judgement.best
        likely = [
            candidate
            for candidate in self.judgement.open
            if self.kl[candidate] <= self.conditions.kl and self.steering[candidate] <= -self.conditions.steering
        ]
        return min(likely or self.judgement.open, key=self.ablation.__getitem__)

    def cells(self) -> list[ScoreRequest]:
        """One candidate after the other, each in the cheapest way; or their rank in KL first, where that is cheaper."""
        ways = {candidate: self._way(candidate) for candidate in self.judgement.open}
        contenders = sorted((c for c, way in ways.items() if way is None), key=self.ablation.__getitem__)
        cells = [cell for way in ways.values() if way for cell in way]
        cells += [cell for place, c in enumerate(contenders) for cell in self._in_full(c, first=place == 0)]
        whole = self.table.whole()
        waiting = [candidate for candidate in ways if whole[candidate]]
        proof = self._proof_of_rank(min(waiting, key=self.ablation.__getitem__) if waiting else self.leader)
        core, ranking = self._ranking()
        after = sum(len(ways.get(c) or self.forecasts[Measure.ABLATION].rest(c)) for c in core if c in ways)
        if ranking and len(ranking) + after < len(cells) + len(proof):
            return ranking
        return cells + proof if waiting else cells

    def _way(self, candidate: int) -> list[ScoreRequest] | None:
        """The cheapest way to drop a candidate, if one promises to."""
        ways = (f.towards(candidate, self.limits[measure], self.least) for measure, f in self.forecasts.items())
        return min((way for way in ways if way is not None), key=self._price, default=None)

    def _price(self, cells: Sequence[ScoreRequest]) -> float:
        """Of one candidate's cells: halfway between the prompts evaluated and the layers that they go through."""
        spared = 0.0
        if cells and cells[0].measure is Measure.STEERING:
            spared = 0.5 * int(self.conditions.layers[cells[0].candidate])
        return len(cells) * (self.depth - spared)

    def _in_full(self, contender: int, *, first: bool) -> list[ScoreRequest]:
        """The ablation score, by which it may turn out to be beaten; then, of the first contender, the rest."""
        ablation = self.forecasts[Measure.ABLATION].rest(contender)
        if ablation or not first:
            return ablation
        return self.forecasts[Measure.KL].rest(contender) + self.forecasts[Measure.STEERING].rest(contender)

    def _proof_of_rank(self, candidate: int) -> list[ScoreRequest]:
        """What proves whether a candidate is among the `top_k` of lowest KL.

        Of those that may come before it, as many as are too many must be shown not to; where that looks hopeless, the KL
        of all of them decides.
        """
        forecast, limit = self.forecasts[Measure.KL], self.kl[candidate]
        ahead = self.judgement.fitting & (self.table.least(Measure.KL) <= limit)
        rivals = [rival for rival in torch.nonzero(ahead).flatten().tolist() if rival != candidate]
        too_many = max(0, len(rivals) - self.conditions.top_k + 1)
        ways = (forecast.towards(rival, limit, self.least) for rival in rivals)
        promising = sorted((way for way in ways if way), key=len)[:too_many]
        if len(promising) < too_many:
            promising = [forecast.rest(rival) for rival in rivals]
        return [cell for way in promising for cell in way]

    def _ranking(self) -> tuple[list[int], list[ScoreRequest]]:
        """Who is likely to be among the `top_k` of lowest KL, and what proves it. Nothing, where none are too many."""
        forecast, top_k = self.forecasts[Measure.KL], self.conditions.top_k
        fitting = sorted(torch.nonzero(self.judgement.fitting).flatten().tolist(), key=self.kl.__getitem__)
        core, others = fitting[:top_k], fitting[top_k:]
        if not others:
            return core, []
        limit = self.kl[core[-1]]
        ways = [forecast.rest(candidate) for candidate in core]
        for candidate in others:
            way = forecast.towards(candidate, limit, self.least)
            ways.append(forecast.rest(candidate) if way is None else way)
        return core, [cell for way in ways for cell in way]
