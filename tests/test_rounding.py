"""The effect of rounding is measured, and candidates that it cannot tell apart are named as ties."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from refusal_direction import ChatModel, RunResult, extract
from refusal_direction.candidates import CandidateLabel
from refusal_direction.config import TEXT, VISION, Config, ModelSource, Rules, Thresholds
from refusal_direction.output import artifacts
from refusal_direction.scoring import passes
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Noise, Repeats, perturbed
from refusal_direction.scoring.scores import CandidateScore, ScoreRequest
from refusal_direction.selection.conditions import Conditions, Rejection
from refusal_direction.selection.searches import select_direction
from refusal_direction.selection.ties import ties
from tests.candidates import at_layers
from tests.test_search import Problem
from tests.test_searches import context_of, scores_of, silent

NOISE = Noise(ablation_refusal=0.1, steering_refusal=0.2, kl_div=0.01)
NONE = Noise(0.0, 0.0, 0.0)


def score(ablation: float, *, steering: float = 1.0, kl: float = 0.05) -> CandidateScore:
    return CandidateScore(CandidateLabel("test", 0, -1), ablation, steering, kl)


def tied(*scores: CandidateScore, noise: Noise = NOISE) -> tuple[int, ...]:
    """With the first of the candidates, which was selected."""
    conditions = Conditions.of(Config(), 10, harmless_baseline=0.0)
    return ties(scores, 0, range(len(scores)), conditions=conditions, noise=noise)


# which are tied


def test_a_candidate_within_the_noise_of_the_lowest_ablation_score_is_tied() -> None:
    assert tied(score(-5.0), score(-4.95), score(-4.85), score(-4.901)) == (1, 3)


def test_without_noise_only_equals_are_tied() -> None:
    assert tied(score(-5.0), score(-5.0), score(-4.999), noise=NONE) == (1,)


@pytest.mark.parametrize(
    ("just", "far"),
    [(score(-9.0, kl=0.105), score(-9.0, kl=0.12)), (score(-9.0, steering=-0.1), score(-9.0, steering=-0.3))],
)
def test_a_better_candidate_that_breaks_a_condition_by_less_than_the_noise_is_tied(
    just: CandidateScore, far: CandidateScore
) -> None:
    assert tied(score(-5.0), just, far) == (1,)


def test_where_the_selected_one_barely_meets_a_condition_the_next_that_surely_does_is_tied_too() -> None:
    assert tied(score(-5.0, kl=0.095), score(-3.0), score(-2.5)) == (1,)


def test_a_score_that_is_no_number_is_no_tie_and_noise_that_is_none_counts_as_nothing() -> None:
    assert tied(score(-5.0), score(math.nan), score(-5.0, kl=math.nan)) == ()
    assert tied(score(-5.0), score(-5.0), score(-4.999), noise=Noise(math.nan, math.nan, math.nan)) == (1,)


# how noise is measured


def test_a_copy_is_off_by_at_most_one_rounding_and_always_the_same() -> None:
    vectors = torch.randn(6, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        copy = perturbed(vectors, dtype)
        off = ((copy - vectors) / vectors).abs()
        assert 0.9 * torch.finfo(dtype).eps < float(off.max()) <= torch.finfo(dtype).eps
        assert torch.equal(copy, perturbed(vectors, dtype))
        assert not torch.equal(copy.to(dtype), vectors.to(dtype))


def repeats(order: Sequence[int] = range(20)) -> Repeats:
    return Repeats(at_layers(torch.randn(20, 4), range(20)), torch.float32, order)


def requests() -> list[ScoreRequest]:
    return [
        ScoreRequest(candidate, measure, prompt)
        for candidate in range(20)
        for measure in Measure
        for prompt in range(9)
    ]


def record(into: Repeats, measure: Measure, *differences: float) -> None:
    """As if so many scores had been repeated."""
    some = [ScoreRequest(20, measure, prompt) for prompt in range(len(differences))]
    into.record(some, [3.0 + difference for difference in differences], [3.0] * len(differences))


def test_a_few_scores_of_the_most_promising_candidates_are_repeated_by_their_copies() -> None:
    of = repeats((7, 3, 12, 5, 19, 0, 1, 2, 4, 6))
    again = of.plan(requests())
    assert len(again) == len(set(again)) == 3 * 16
    assert {request.candidate - 20 for request in again} == {7, 3, 12, 5, 19, 0, 1, 2}
    assert {of.original(request) for request in again} <= set(requests())
    assert all(of.original(request) == request._replace(candidate=request.candidate - 20) for request in again)
    assert len(of.candidates) == 40
    assert of.candidates.labels[20:] == of.candidates.labels[:20]


def test_what_has_been_repeated_often_enough_is_not_repeated_again() -> None:
    of = repeats()
    record(of, Measure.KL, *[0.0] * 16)
    record(of, Measure.STEERING, 0.0)
    measures = [request.measure for request in of.plan(requests())]
    assert {measure: measures.count(measure) for measure in Measure} == {
        Measure.ABLATION: 16, Measure.KL: 0, Measure.STEERING: 15
    }  # fmt: skip
    assert of.count == 17


def test_noise_is_twice_the_root_mean_square_of_what_is_finite() -> None:
    of = repeats()
    record(of, Measure.ABLATION, 0.3, -0.4, math.nan)
    assert of.noise.of(Measure.ABLATION) == pytest.approx(2 * math.sqrt((0.09 + 0.16) / 2))
    assert math.isnan(of.noise.of(Measure.KL))


# in a selection


def random_problem(rng: random.Random, rules: Rules, top_k: int | None = None) -> Problem:
    """Many candidates close to each other and to the thresholds, on four prompts."""
    n_layers, count = 5, 30

    def table(mean: float, spread: float, within: float) -> torch.Tensor:
        means = [rng.gauss(mean, spread) for _ in range(count)]
        return torch.tensor([[rng.gauss(of, within) for _ in range(4)] for of in means], dtype=torch.float64)

    return Problem(
        scores={
            Measure.ABLATION: table(-3, 0.3, 0.5),
            Measure.KL: table(0.07, 0.04, 0.01).clamp_min(0),
            Measure.STEERING: table(1.0, 1.0, 0.3),
        },
        n_layers=n_layers,
        zero=frozenset({4}),
        thresholds=Thresholds(top_k_candidates=top_k),
        rules=rules,
    )


@pytest.mark.parametrize(
    "noise",
    [0.02, pytest.param(0.0, marks=pytest.mark.extended), pytest.param(0.05, marks=pytest.mark.extended)],
)
def test_a_pruned_search_finds_the_same_ties_as_an_exhaustive_one(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may name more: candidates as good within the noise that it never had to measure in full, since others are better."""
    equal, found = 0, 0
    for seed in range(60):
        problem = random_problem(random.Random(seed), TEXT)
        monkeypatch.setattr(passes, "measure", scores_of(problem, noise / 2))
        context = context_of(problem, torch.Generator().manual_seed(seed))
        config = Config(thresholds=problem.thresholds)
        every, some = (
            select_direction(context, replace(config, search=search), progress=silent)[0]
            for search in ("exhaustive", "pruned")
        )
        assert [*astuple(every.noise), *astuple(some.noise)] == pytest.approx([noise] * 6)
        assert some.evaluations < every.evaluations
        assert every.score == some.score
        more = set(some.ties) - set(every.ties)
        assert set(every.ties) <= set(some.ties)
        assert all(any(math.isnan(some.means[index].of(measure)) for measure in Measure) for index in more)
        equal += not more
        found += len(every.ties)
    assert equal > 20
    assert (found > 0) == (noise > 0)


def test_among_images_the_finalists_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[int] = set()
    for seed in range(40):
        problem = random_problem(random.Random(seed), VISION, top_k=6)
        monkeypatch.setattr(passes, "measure", scores_of(problem, 0.1))
        context = context_of(problem, torch.Generator().manual_seed(seed))
        config = Config(rules=VISION, thresholds=problem.thresholds)
        selection, _ = select_direction(context, config, progress=silent)
        assert all(selection.rejections[index] is not Rejection.RANK for index in selection.ties)
        assert all(
            selection.means[index].ablation_refusal <= selection.score.ablation_refusal + 0.2
            or selection.score.steering_refusal < problem.baseline + 0.2
            or selection.score.kl_div > 0.1 - 0.2
            for index in selection.ties
        )
        found |= set(selection.ties)
    assert found


# on a real model


@pytest.fixture(scope="module")
def rounded(extraction: RunResult) -> RunResult:
    return extract("demo", replace(extraction.config, model=ModelSource("demo", dtype="bfloat16")))


def test_in_bfloat16_the_same_direction_is_selected_as_in_float32(extraction: RunResult, rounded: RunResult) -> None:
    assert rounded.model.dtype == "bfloat16"
    places = {rounded.selection.index, *rounded.selection.ties}
    assert extraction.selection.index in places
    one, other = extraction.direction.vector, rounded.direction.vector
    assert torch.cosine_similarity(one, other, dim=0) > 0.999


def test_the_noise_measured_in_bfloat16_is_that_of_its_rounding(extraction: RunResult, rounded: RunResult) -> None:
    """Its size is right: most mean scores are no further from those in float32."""
    for measure, most in ((Measure.ABLATION, 0.2), (Measure.STEERING, 0.2), (Measure.KL, 0.05)):
        noise = rounded.selection.noise.of(measure)
        assert 100 * extraction.selection.noise.of(measure) < noise < most
        pairs = zip(extraction.means, rounded.means, strict=True)
        off = torch.tensor([one.of(measure) - other.of(measure) for one, other in pairs])
        assert (off.abs() <= noise).double().mean() > 0.8
        assert off.abs().max() > 0.01 * noise


def test_ties_are_named_in_the_metadata_and_at_the_end_of_the_run(extraction: RunResult, tmp_path: Path) -> None:
    assert "Tied" not in str(extraction)
    index = (extraction.selection.index + 1) % len(extraction.means)
    same = replace(extraction, selection=replace(extraction.selection, ties=(index,)))
    artifacts.write(same, tmp_path)
    metadata = json.loads((tmp_path / "direction_metadata.json").read_text())
    score = extraction.means[index]
    assert metadata["ties"] == [{"method": "difference_of_means", "position": score.position, "layer": score.layer}]
    assert 0 < metadata["rounding"]["ablation_refusal"] < 1e-4
    assert f"position {score.position}, layer {score.layer}. Another precision" in str(same)


def test_measuring_it_costs_a_few_rows(chat: ChatModel, extraction: RunResult) -> None:
    assert extraction.selection.n_repeated == 3 * 16
