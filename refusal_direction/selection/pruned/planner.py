"""The planner: which scores to measure next. It cannot change the result, only the work until it is proven.

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
from refusal_direction.scoring.scores import ScoreRequest
from refusal_direction.selection.pruned.bounds import Table
from refusal_direction.selection.pruned.verdicts import Verdicts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

__all__ = ["Hints", "first_round", "next_round"]

_UNCERTAINTY = 0.5  # of an estimate from one prompt, in units of the refusal score
_RARELY_CHEAPEST = 0.75  # of the prompts: a way to drop candidates that takes more is rarely the cheapest one
_FIRST = 3  # contenders measured at once
_PORTION, _GROWTH = 8, 3  # prompts of a contender measured first, and then times as many as before
_KL_UNCERTAINTY = 4  # prompts without any KL that are added to those measured: it varies by orders of magnitude


@dataclass(frozen=True)
class Hints:
    """Guesses, which may be wrong: they save work where they are right."""

    candidates: Sequence[int]
    """Indices of the candidates, the most promising first."""
    shape: Mapping[Measure, Float[Tensor, "prompt"]]
    """How the costs are expected to differ between prompts."""
    depth: int
    """Number of layers: an ablated row goes through all, a steered one through those from its candidate's layer on."""


def first_round(verdicts: Verdicts, hints: Hints) -> list[ScoreRequest]:
    """One prompt of each measure for every candidate; all prompts of the ablation score for the most promising one.

    Where only the candidates of lowest KL are considered, and there are many more, the KL decides more: an eighth of its
    prompts. Where nearly any steering score is enough, it will drop few candidates: none of its prompts.
    """
    table, conditions = verdicts.table, verdicts.conditions
    forecasts = _forecasts(table, hints)
    tried = dict.fromkeys(Measure, 1)
    if int(verdicts.fitting.sum()) > 2 * verdicts.top_k:
        tried[Measure.KL] = ceil(len(table.floors[Measure.KL]) / 8)
    if _least_share(table.floors[Measure.STEERING], -conditions.induce_threshold) > _RARELY_CHEAPEST:
        tried[Measure.STEERING] = 0
    open_ = set(verdicts.open)
    leader = next(candidate for candidate in hints.candidates if candidate in open_)
    requests = [
        request
        for candidate in verdicts.open
        for measure, forecast in forecasts.items()
        for request in forecast.rest(candidate)[: tried[measure]]
    ]
    return list(dict.fromkeys([*requests, *forecasts[Measure.ABLATION].rest(leader)]))


def _least_share(floors: Float[Tensor, "prompt"], limit: float) -> float:
    """The smallest share of prompts that can drop a candidate whose costs lie between floor and -floor."""
    floor = float(floors.mean())
    return (limit - floor) / (-2 * floor) if floor < 0 else 1.0


def next_round(verdicts: Verdicts, hints: Hints) -> list[ScoreRequest]:
    """The requests most likely to settle the open candidates.

    At least one request, if there is an open candidate: whatever the hints are, the search goes on.
    """
    planned = list(dict.fromkeys(_Planner(verdicts, hints).requests()))
    if planned:
        return planned
    table = verdicts.table
    missing = [
        request for candidate in verdicts.open for measure in Measure for request in table.missing(candidate, measure)
    ]
    rivals = torch.nonzero(verdicts.fitting).flatten().tolist()
    return missing or [request for candidate in rivals for request in table.missing(candidate, Measure.KL)]


class _Forecast:
    """The expected scores of every candidate by one measure."""

    def __init__(self, table: Table, measure: Measure, hints: Hints) -> None:
        self.measure, shape, self._slack = measure, hints.shape[measure], table.slack[measure]
        costs, known, floors = table.costs(measure), table.known[measure], table.floors[measure]
        expected, cautious = (_expected(costs, known, shape, measure, cautious=cautious) for cautious in (False, True))
        self.means: list[float] = torch.where(known, costs, torch.maximum(expected, floors)).mean(1).tolist()
        """Estimates of mean costs."""
        self._gains: list[list[float]] = (cautious - floors).clamp_min(0).tolist()  # expected rise of the bounds
        self._bounds: list[float] = torch.where(known, costs, floors).sum(1).tolist()
        self._known: list[list[bool]] = known.tolist()
        self._informative = shape.argsort(descending=True, stable=True).tolist()

    def rest(self, candidate: int) -> list[ScoreRequest]:
        """Requests for the scores of a candidate not measured yet, the most telling prompts first."""
        known = self._known[candidate]
        return [ScoreRequest(candidate, self.measure, prompt) for prompt in self._informative if not known[prompt]]

    def towards(self, candidate: int, limit: float, least: int) -> list[ScoreRequest] | None:
        """The requests, at least `least` of them, that are likely to raise the bound of a candidate's mean above a limit.

        None if even all that are left are not likely to.
        """
        rest, gains = self.rest(candidate), self._gains[candidate]
        lacking = (limit + 2 * self._slack) * len(gains) - self._bounds[candidate]
        if lacking <= 0:
            return []
        for count, request in enumerate(rest, start=1):
            lacking -= gains[request.prompt]
            if lacking <= 0:
                return rest[: max(count, least)]
        return None


def _expected(
    costs: Float[Tensor, "candidate prompt"],
    known: Bool[Tensor, "candidate prompt"],
    shape: Float[Tensor, "prompt"],
    measure: Measure,
    *,
    cautious: bool,
) -> Float[Tensor, "candidate prompt"]:
    """Expected costs of candidates on prompts, from the known ones; lower by the uncertainty if `cautious`."""
    count = known.sum(1, keepdim=True).clamp_min(1)
    if measure is Measure.KL:  # in proportion to the shape
        weight = torch.where(known, shape, 0.0).sum(1, keepdim=True) + cautious * _KL_UNCERTAINTY * shape.mean()
        return shape * torch.where(known, costs, 0.0).sum(1, keepdim=True) / weight.clamp_min(1e-9)
    above = torch.where(known, costs - shape, 0.0).sum(1, keepdim=True) / count
    return shape + above - cautious * _UNCERTAINTY / count.sqrt()


def _forecasts(table: Table, hints: Hints) -> dict[Measure, _Forecast]:
    return {measure: _Forecast(table, measure, hints) for measure in Measure}


class _Planner:
    """The plan of one round."""

    def __init__(self, verdicts: Verdicts, hints: Hints) -> None:
        self.verdicts, self.depth = verdicts, hints.depth
        self.table, self.conditions = table, conditions = verdicts.table, verdicts.conditions
        self.forecasts = _forecasts(table, hints)
        self.ablation, self.kl, self.steering = (
            self.forecasts[measure].means for measure in (Measure.ABLATION, Measure.KL, Measure.STEERING)
        )
        n_prompts = max(map(len, table.floors.values()))
        self.least = ceil(n_prompts / max(1, len(verdicts.open)))  # a round of a few requests is not worth a pass
        self.leader = self._leader()
        self.limits = {
            Measure.ABLATION: self.ablation[self.leader],
            Measure.KL: conditions.kl_threshold,
            Measure.STEERING: -conditions.induce_threshold,
        }

    def _leader(self) -> int:
        """The best proven candidate, otherwise the likely best."""
        if self.verdicts.best is not None:
            return self.verdicts.best
        likely = [
            candidate
            for candidate in self.verdicts.open
            if self.kl[candidate] <= self.conditions.kl_threshold
            and self.steering[candidate] <= -self.conditions.induce_threshold
        ]
        return min(likely or self.verdicts.open, key=self.ablation.__getitem__)

    def requests(self) -> list[ScoreRequest]:
        """The cheapest requests to settle each candidate; or first those that settle the rank by KL, if these are fewer."""
        ways = {candidate: self._way(candidate) for candidate in self.verdicts.open}
        contenders = sorted((c for c, way in ways.items() if way is None), key=self.ablation.__getitem__)
        requests = [request for way in ways.values() if way for request in way]
        requests += [
            request for place, c in enumerate(contenders) for request in self._in_full(c, first=place < _FIRST)
        ]
        whole = self.table.whole()
        waiting = [candidate for candidate in ways if whole[candidate]]
        proof = self._proof_of_rank(min(waiting, key=self.ablation.__getitem__) if waiting else self.leader)
        core, ranking = self._ranking()
        after = sum(len(ways.get(c) or self.forecasts[Measure.ABLATION].rest(c)) for c in core if c in ways)
        if ranking and len(ranking) + after < len(requests) + len(proof):
            return ranking
        return requests + proof if waiting else requests

    def _way(self, candidate: int) -> list[ScoreRequest] | None:
        """The cheapest requests that are likely to drop a candidate, if there are any."""
        ways = (f.towards(candidate, self.limits[measure], self.least) for measure, f in self.forecasts.items())
        return min((way for way in ways if way is not None), key=self._price, default=None)

    def _price(self, requests: Sequence[ScoreRequest]) -> float:
        """The price of one candidate's requests: halfway between prompts evaluated and layers run."""
        spared = 0.0
        if requests and requests[0].measure is Measure.STEERING:
            spared = 0.5 * int(self.verdicts.space.layers[requests[0].candidate])
        return len(requests) * (self.depth - spared)

    def _in_full(self, contender: int, *, first: bool) -> list[ScoreRequest]:
        """The ablation score of a contender, which may prove it worse; then the other scores, for the first contenders."""
        ablation = self.forecasts[Measure.ABLATION].rest(contender)
        if ablation or not first:
            return ablation
        return self._portion(contender, Measure.KL) + self._portion(contender, Measure.STEERING)

    def _portion(self, contender: int, measure: Measure) -> list[ScoreRequest]:
        """Some of a contender's scores: a few may show that it violates a condition."""
        known = int(self.table.known[measure][contender].sum())
        return self.forecasts[measure].rest(contender)[: max(_PORTION, _GROWTH * known)]

    def _proof_of_rank(self, candidate: int) -> list[ScoreRequest]:
        """Requests that prove whether a candidate is among those of lowest KL that are considered.

        Enough of its possible rivals must be shown to come after it; if that looks hopeless, the KL of all of them decides.
        """
        forecast, limit = self.forecasts[Measure.KL], self.kl[candidate]
        ahead = self.verdicts.fitting & (self.table.least(Measure.KL) <= limit)
        rivals = [rival for rival in torch.nonzero(ahead).flatten().tolist() if rival != candidate]
        too_many = max(0, len(rivals) - self.verdicts.top_k + 1)
        ways = (forecast.towards(rival, limit, self.least) for rival in rivals)
        promising = sorted((way for way in ways if way), key=len)[:too_many]
        if len(promising) < too_many:
            promising = [forecast.rest(rival) for rival in rivals]
        return [request for way in promising for request in way]

    def _ranking(self) -> tuple[list[int], list[ScoreRequest]]:
        """The candidates likely to be among those of lowest KL that are considered, and the requests that prove it."""
        forecast, top_k = self.forecasts[Measure.KL], self.verdicts.top_k
        fitting = sorted(torch.nonzero(self.verdicts.fitting).flatten().tolist(), key=self.kl.__getitem__)
        core, others = fitting[:top_k], fitting[top_k:]
        if not others:
            return core, []
        limit = self.kl[core[-1]]
        ways = [forecast.rest(candidate) for candidate in core]
        for candidate in others:
            way = forecast.towards(candidate, limit, self.least)
            ways.append(forecast.rest(candidate) if way is None else way)
        return core, [request for way in ways for request in way]
