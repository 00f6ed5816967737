"""Rounding is measured, and candidates that it cannot tell apart are said to be tied."""

from __future__ import annotations

import json
import math
import random
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from refusal_direction.selection.rules import CandidateScore

from refusal_direction import ChatModel, RunResult, extract
from refusal_direction.config import TEXT, VISION, Config, ModelSource, Rules, Thresholds
from refusal_direction.engine import Intervention, Row
from refusal_direction.output import artifacts
from refusal_direction.output import text as report
from refusal_direction.scoring import passes as sweeps
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Repeats, rounded_otherwise, ties
from refusal_direction.selection.searches import select_direction
from tests.candidates import at_layers
from tests.test_choice import scoring_by, setting_of, silent
from tests.test_search import Problem

NOISE = {Measure.ABLATION: 0.1, Measure.STEERING: 0.2, Measure.KL: 0.01}
NONE = dict.fromkeys(Measure, 0.0)


def score(ablation: float, *, steering: float = 1.0, kl: float = 0.05) -> CandidateScore:
    return CandidateScore(-1, 0, ablation, steering, kl)


def tied(*scores: CandidateScore, noise: dict[Measure, float] = NOISE) -> tuple[int, ...]:
    """With the first of the candidates, which was selected."""
    return ties(scores, 0, range(len(scores)), kl=0.1, steering=0.0, noise=noise)


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
    assert tied(score(-5.0), score(-5.0), score(-4.999), noise=dict.fromkeys(Measure, math.nan)) == (1,)


# how noise is measured


def test_a_copy_is_off_by_at_most_one_rounding_and_always_the_same() -> None:
    vectors = torch.randn(6, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        copy = rounded_otherwise(vectors, dtype)
        off = ((copy - vectors) / vectors).abs()
        assert 0.9 * torch.finfo(dtype).eps < float(off.max()) <= torch.finfo(dtype).eps
        assert torch.equal(copy, rounded_otherwise(vectors, dtype))
        assert not torch.equal(copy.to(dtype), vectors.to(dtype))


def repeats(order: tuple[int, ...] = tuple(range(20))) -> Repeats:
    def measure(row: Row) -> Measure:
        return (
            Measure.STEERING
            if row.kind is Intervention.STEERING
            else Measure.ABLATION
            if row.prompt < 9
            else Measure.KL
        )

    return Repeats(at_layers(torch.randn(20, 4), tuple(range(20))), torch.float32, order, measure)


def rows() -> list[Row]:
    return [
        Row(prompt, kind, candidate)
        for candidate in range(20)
        for kind, first in ((Intervention.ABLATION, 0), (Intervention.ABLATION, 9), (Intervention.STEERING, 9))
        for prompt in range(first, first + 9)
    ]


def test_a_few_rows_of_the_most_promising_candidates_are_run_again_by_their_copies() -> None:
    again = repeats((7, 3, 12, 5, 19, 0, 1, 2, 4, 6)).of(rows())
    assert len(again) == len(set(again)) == 3 * 16
    assert {row.candidate - 20 for row in again} == {7, 3, 12, 5, 19, 0, 1, 2}
    assert {replace(row, candidate=row.candidate - 20) for row in again} <= set(rows())


def test_what_has_been_repeated_often_enough_is_not_repeated_again() -> None:
    of = repeats()
    for _ in range(16):
        of.enter(Measure.KL, 0.0)
    of.enter(Measure.STEERING, 0.0)
    measures = [of.measure(row) for row in of.of(rows())]
    assert {measure: measures.count(measure) for measure in Measure} == {
        Measure.ABLATION: 16, Measure.KL: 0, Measure.STEERING: 15
    }  # fmt: skip


def test_noise_is_twice_the_root_mean_square_of_what_is_finite() -> None:
    of = repeats()
    for value in (0.3, -0.4, math.nan):
        of.enter(Measure.ABLATION, value)
    assert of.noise[Measure.ABLATION] == pytest.approx(2 * math.sqrt((0.09 + 0.16) / 2))
    assert math.isnan(of.noise[Measure.KL])


# in a choice


def random_problem(rng: random.Random, rules: Rules) -> Problem:
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
        null=frozenset({4}),
        thresholds=Thresholds(),
        baseline=0.0,
        top_k=rules.top_k,
    )


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_a_pruned_search_finds_the_same_ties_as_an_exhaustive_one(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may name more: candidates as good within the noise that it never had to measure in full, since others are better."""
    equal, found = 0, 0
    for seed in range(60):
        problem = random_problem(random.Random(seed), TEXT)
        monkeypatch.setattr(sweeps, "score_candidates", scoring_by(problem, noise / 2))
        setting = setting_of(problem, torch.Generator().manual_seed(seed))
        config = Config(thresholds=problem.thresholds)
        every, some = (
            select_direction(setting, replace(config, search=search), progress=silent)
            for search in ("exhaustive", "pruned")
        )
        assert [*astuple(every.noise), *astuple(some.noise)] == pytest.approx([noise] * 6)
        assert some.evaluations < every.evaluations
        assert every.selection.score == some.selection.score
        more = set(some.ties) - set(every.ties)
        assert set(every.ties) <= set(some.ties)
        assert all(math.isnan(sum(astuple(some.means[index]))) for index in more)
        equal += not more
        found += len(every.ties)
    assert equal > 20
    assert (found > 0) == (noise > 0)


def test_among_images_the_finalists_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = replace(VISION, top_k=6)
    found: set[int] = set()
    for seed in range(40):
        problem = random_problem(random.Random(seed), rules)
        monkeypatch.setattr(sweeps, "score_candidates", scoring_by(problem, 0.1))
        choice = select_direction(
            setting_of(problem, torch.Generator().manual_seed(seed)), Config(rules=rules), progress=silent
        )
        assert all(choice.selection.dropped[index] != "not among those of lowest KL" for index in choice.ties)
        assert all(
            choice.means[index].ablation_refusal <= choice.selection.score.ablation_refusal + 0.2
            or choice.selection.score.steering_refusal < problem.baseline + 0.2
            or choice.selection.score.kl_div > 0.1 - 0.2
            for index in choice.ties
        )
        found |= set(choice.ties)
    assert found


# on a real model


@pytest.fixture(scope="module")
def rounded(extraction: RunResult) -> RunResult:
    return extract("demo", replace(extraction.config, model=ModelSource("demo", dtype="bfloat16")))


def test_in_bfloat16_the_same_direction_is_selected_as_in_float32(extraction: RunResult, rounded: RunResult) -> None:
    assert rounded.chat.model.dtype == torch.bfloat16
    places = {rounded.selection.index, *rounded.choice.ties}
    assert extraction.selection.index in places
    one, other = extraction.direction.vector, rounded.direction.vector
    assert torch.cosine_similarity(one, other, dim=0) > 0.999


def test_the_noise_measured_in_bfloat16_is_that_of_its_rounding(extraction: RunResult, rounded: RunResult) -> None:
    """Its size is right: most mean scores are no further from those in float32."""
    for name, most in (("ablation_refusal", 0.2), ("steering_refusal", 0.2), ("kl_div", 0.05)):
        noise = getattr(rounded.choice.noise, name)
        assert 100 * getattr(extraction.choice.noise, name) < noise < most
        pairs = zip(extraction.means, rounded.means, strict=True)
        off = torch.tensor([getattr(one, name) - getattr(other, name) for one, other in pairs])
        assert (off.abs() <= noise).double().mean() > 0.8
        assert off.abs().max() > 0.01 * noise


def test_ties_are_named_in_the_metadata_and_at_the_end_of_the_run(extraction: RunResult, tmp_path: Path) -> None:
    assert "Tied" not in report.results(extraction)
    index = (extraction.selection.index + 1) % len(extraction.means)
    same = replace(extraction, choice=replace(extraction.choice, ties=(index,)))
    artifacts.write(same, tmp_path)
    metadata = json.loads((tmp_path / "direction_metadata.json").read_text())
    score = extraction.means[index]
    assert metadata["ties"] == [{"position": score.position, "layer": score.layer}]
    assert 0 < metadata["rounding"]["ablation_refusal"] < 1e-4
    assert f"position {score.position}, layer {score.layer}. Another precision" in report.results(same)


def test_measuring_it_costs_a_few_rows(chat: ChatModel, extraction: RunResult) -> None:
    assert extraction.choice.n_repeated == 3 * 16
