"""Candidates and their scores by the engine, for benchmarks that time its passes alone."""

from __future__ import annotations

from collections.abc import Sequence

from refusal_direction.engine import Engine
from refusal_direction.methods import make_candidates
from refusal_direction.prompts.sets import Kind, PromptSet, Split
from refusal_direction.scoring.baseline import Baseline
from refusal_direction.scoring.requests import ScoringContext, measure
from refusal_direction.scoring.scores import ScoreRequest, Scores

METHOD = "difference_of_means"


def context_of(
    engine: Engine, tokens: Sequence[int], baseline: Baseline, kept: dict[PromptSet, list[int]]
) -> ScoringContext:
    """Everything that the scores of the differences of means depend on."""
    activations = [baseline.activations_at(kept[kind, Split.TRAIN]) for kind in Kind]
    return ScoringContext(engine, tokens, make_candidates([METHOD], *activations), baseline, kept)


def with_measured(scores: Scores, context: ScoringContext, requests: Sequence[ScoreRequest]) -> Scores:
    """The scores with those requested, measured in one pass."""
    return scores.with_values(requests, measure(context, context.candidates, requests).tolist())
