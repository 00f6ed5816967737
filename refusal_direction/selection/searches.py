"""The searches: how much is measured before the selection. They differ in cost; `pruned` selects what its default would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from refusal_direction.config import Config, search_name
from refusal_direction.directions import unit
from refusal_direction.methods import difference_of_means
from refusal_direction.prompts.sets import Kind
from refusal_direction.scoring.metrics import LEAST_REFUSAL, Measure, entropy, kl_floor
from refusal_direction.scoring.passes import Progress, ScoringPasses
from refusal_direction.scoring.requests import ScoringContext, request_all
from refusal_direction.scoring.scores import CandidateScore, ScoreRequest, Scores
from refusal_direction.selection.conditions import Conditions, Rejection
from refusal_direction.selection.decision import (
    Decision,
    decide,
    finalists,
    nearest_misses,
    relax_layer_and_kl,
    warn_layer_and_kl,
    warn_nearest,
    warn_steering,
)
from refusal_direction.selection.pruned.planner import Hints
from refusal_direction.selection.pruned.search import PrunedResult, search
from refusal_direction.selection.pruned.verdicts import SearchSpace, best_possible
from refusal_direction.selection.result import SelectionResult
from refusal_direction.selection.ties import ties

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["rank_heuristic", "select_direction"]


@dataclass(frozen=True)
class _Outcome:
    """A decision, and the candidates among which ties are looked for."""

    decision: Decision
    among: Sequence[int]
    """The candidates that meet the conditions that rounding does not affect: length, layer and rank; none without a selection."""
    at_best: Sequence[CandidateScore] = ()
    """If not every candidate was measured in full: the best that their means may be."""


class _Run:
    """One selection under way."""

    def __init__(self, context: ScoringContext, config: Config, progress: Progress) -> None:
        self.context, self.candidates = context, context.candidates
        self.zero: list[bool] = context.candidates.zero.tolist()
        self.n_layers = len(context.engine.stream.layers)
        self.conditions = Conditions.of(config, self.n_layers, float(context.refusal(Kind.HARMLESS).mean()))
        self.hints = _hints(context, self.n_layers)
        layers = context.candidates.layers
        order = [index for index in self.hints.candidates if layers[index] < self.conditions.layer_limit]
        self.passes = ScoringPasses(context, progress, order)

    def decide(self, conditions: Conditions) -> Decision:
        """The decision by all scores measured."""
        return decide(self.passes.means(), conditions, self.zero)

    def nearest(self, decision: Decision) -> int | None:
        """The nearest miss, with a warning; None if nothing comes near."""
        for miss in nearest_misses(self.passes.means(), decision.conditions, self.zero, self.n_layers):
            warn_nearest(miss.score, decision.conditions)
            return miss.index
        return None


def select_direction(context: ScoringContext, config: Config, *, progress: Progress) -> tuple[SelectionResult, Scores]:
    """Score the candidates as the configuration asks, and select one; also returns the scores per prompt.

    If no candidate meets the conditions, the nearest miss is selected where the configuration asks for it, else none.
    """
    name, run = search_name(config), _Run(context, config, progress)
    search = {"exhaustive": _exhaustive, "kl_first": _kl_first, "pruned": _pruned}[name]
    outcome = _all_zero(run) if all(run.zero) else search(run)
    index = outcome.decision.selected
    if index is None and config.select == "nearest":
        index = run.nearest(outcome.decision)
    return _result(run, name, outcome, index), run.passes.scores


def _all_zero(run: _Run) -> _Outcome:
    """Nothing to measure: candidates of length zero change nothing."""
    return _Outcome(Decision(None, (Rejection.ZERO_LENGTH,) * len(run.zero), run.conditions), ())


def _result(run: _Run, name: str, outcome: _Outcome, index: int | None) -> SelectionResult:
    passes, decision = run.passes, outcome.decision
    means, noise = passes.means(), passes.repeats.noise
    tied: tuple[int, ...] = ()
    if decision.selected is not None:
        tied = ties(
            means,
            decision.selected,
            outcome.among,
            conditions=decision.conditions,
            noise=noise,
            at_best=outcome.at_best,
        )
    return SelectionResult(
        index=index,
        means=means,
        rejections=decision.rejections,
        conditions_asked=run.conditions,
        conditions=decision.conditions,
        n_layers=run.n_layers,
        search=name,
        measured={measure: tuple(counts.tolist()) for measure, counts in passes.measured.items()},
        n_passes=passes.n_passes,
        exhaustive_evaluations=len(request_all(run.context)),
        noise=noise,
        n_repeated=passes.repeats.count,
        ties=tied,
    )


def _exhaustive(run: _Run) -> _Outcome:
    """Score every candidate, and consider them all."""
    run.passes.run("Pass 2: interventions", request_all(run.context))
    conditions = replace(run.conditions, top_k_candidates=None)
    decision = run.decide(conditions)
    limit, layers = decision.conditions.layer_limit, run.candidates.layers
    return _Outcome(decision, [i for i, layer in enumerate(layers) if layer < limit and not run.zero[i]])


def _kl_first(run: _Run) -> _Outcome:
    """The published rule for images with text: the KL of all candidates, then the rest for those of lowest KL."""
    run.passes.run("Pass 2: KL divergence", request_all(run.context, [Measure.KL]))
    means = run.passes.means()
    conditions = relax_layer_and_kl(means, run.conditions, run.zero)
    considered = finalists(means, conditions, run.zero)
    rest = request_all(run.context, [Measure.ABLATION, Measure.STEERING], considered)
    run.passes.run("Pass 3: ablation and steering", rest)
    return _Outcome(run.decide(conditions), considered)


def _pruned(run: _Run) -> _Outcome:
    """The same candidate, proven by bounds (pruned/)."""
    space = SearchSpace(run.candidates.labels, tuple(run.zero))

    def ask(requests: Sequence[ScoreRequest]) -> list[float]:
        name = f"Pass {run.passes.n_passes + 2}: {len({request.candidate for request in requests})} candidates"
        return run.passes.run(name, requests)

    found = search(
        space,
        run.conditions,
        _floors(run.context),
        hints=run.hints,
        ask=ask,
        noise=lambda: run.passes.repeats.noise,
    )
    if found.best is None:
        return _nothing_found(run, found)
    if found.conditions.layer_limit != run.conditions.layer_limit or (
        found.conditions.kl_threshold != run.conditions.kl_threshold
    ):
        warn_layer_and_kl(run.conditions)
    if found.conditions.induce_threshold != run.conditions.induce_threshold:
        warn_steering(run.conditions)
    ruled_out = (Rejection.ZERO_LENGTH, Rejection.NAN, Rejection.LAYER, Rejection.RANK)
    return _Outcome(
        decision=Decision(found.best, found.rejections, found.conditions),
        among=[index for index, rejection in enumerate(found.rejections) if rejection not in ruled_out],
        at_best=best_possible(found.table, space, slack=False),
    )


def _nothing_found(run: _Run, found: PrunedResult) -> _Outcome:
    """Measure the rest, for the nearest misses, and decide as an exhaustive search does."""
    if not run.conditions.relaxing:
        alive = [index for index, zero in enumerate(run.zero) if not zero]
        missing = [request for index in alive for m in Measure for request in found.table.missing(index, m)]
        run.passes.run("No candidate passes: the rest, for the nearest misses", missing)
    return _Outcome(run.decide(run.conditions), ())


def _floors(context: ScoringContext) -> dict[Measure, Float[Tensor, "prompt"]]:
    """The lowest possible costs: a refusal score is bounded on either side, the KL by each prompt's own baseline."""
    harmful, harmless = context.prompts(Kind.HARMFUL), context.prompts(Kind.HARMLESS)
    return {
        Measure.ABLATION: torch.full((len(harmful),), LEAST_REFUSAL),
        Measure.KL: torch.cat([kl_floor(context.baseline.logits[prompt][None]) for prompt in harmless]),
        Measure.STEERING: torch.full((len(harmless),), LEAST_REFUSAL),
    }


def _hints(context: ScoringContext, n_layers: int) -> Hints:
    """Candidates by `rank_heuristic`. Prompts most refused or answered stay so; high-entropy prompts should move most."""
    refusal, logits = context.baseline.refusal.cpu(), context.baseline.logits
    harmful, harmless = list(context.prompts(Kind.HARMFUL)), list(context.prompts(Kind.HARMLESS))
    return Hints(
        candidates=_promising_first(context),
        shape={
            Measure.ABLATION: refusal[harmful],
            Measure.KL: torch.cat([entropy(logits[prompt][None]).cpu().double() for prompt in harmless]),
            Measure.STEERING: -refusal[harmless],
        },
        depth=n_layers,
    )


def _promising_first(context: ScoringContext) -> list[int]:
    candidates = context.candidates
    harmful, harmless = (context.train_activations(kind) for kind in Kind)
    positions = [-1 if label.position is None else label.position for label in candidates.labels]
    stream = harmless[:, positions, list(candidates.layers)]
    final = difference_of_means(harmful[:, -1, -1], harmless[:, -1, -1])
    return rank_heuristic(candidates.vectors, stream, final).argsort(descending=True).tolist()


def rank_heuristic(
    candidates: Float[Tensor, "candidate d_model"],
    harmless: Float[Tensor, "harmless candidate d_model"],
    final: Float[Tensor, "d_model"],
) -> Float[Tensor, "candidate"]:
    """A cheap guess at the candidates that carry refusal best: the higher, the more promising.

    The length of a candidate relative to that of the stream at its site, times its cosine with the final direction.

    Args:
        candidates: the vectors.
        harmless: activations of harmless prompts at each candidate's position and layer.
        final: the difference of means at the last token and layer, close to the one that the head reads.
    """
    lengths = harmless.norm(dim=-1).mean(0, dtype=candidates.dtype)
    return (unit(candidates) @ unit(final.to(candidates))) * candidates.norm(dim=-1) / lengths.clamp_min(1e-30)
