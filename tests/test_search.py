"""The pruned search selects what exhaustive selection selects, whatever the scores: no model, tables of scores only."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refusal_direction.candidates import CandidateLabel
from refusal_direction.config import TEXT, VISION, Config, Rules, Thresholds
from refusal_direction.scoring.metrics import LEAST_REFUSAL, Measure
from refusal_direction.scoring.scores import CandidateScore, ScoreRequest
from refusal_direction.selection.conditions import Conditions, Rejection
from refusal_direction.selection.decision import Decision, decide
from refusal_direction.selection.pruned import planner
from refusal_direction.selection.pruned.bounds import SLACK, Table
from refusal_direction.selection.pruned.planner import Hints
from refusal_direction.selection.pruned.search import PrunedResult, search
from refusal_direction.selection.pruned.verdicts import SearchSpace, judge

NAN = float("nan")
KL_FLOOR = -0.01
PUBLISHED = ("gemma-2b-it", "gemma-7b-it", "llama-3-8b-instruct")
Draw = Callable[[random.Random], float]
seeds = st.integers(0, 2**32)


@dataclass(frozen=True)
class Problem:
    """Every score of every candidate on every prompt, and the rules to select by."""

    scores: dict[Measure, Tensor]
    n_layers: int
    zero: frozenset[int] = frozenset()
    """Candidates of length zero."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    baseline: float = 0.0
    """The harmless baseline, from which the steering threshold counts by the rules for images with text."""
    rules: Rules = TEXT
    mixed: tuple[CandidateLabel, ...] = ()
    """Labels of the candidates; by default those of a grid."""

    def __len__(self) -> int:
        return len(self.scores[Measure.KL])

    @property
    def labels(self) -> tuple[CandidateLabel, ...]:
        grid = (
            CandidateLabel("test", index % self.n_layers, index // self.n_layers - len(self) // self.n_layers)
            for index in range(len(self))
        )
        return self.mixed or tuple(grid)

    @property
    def space(self) -> SearchSpace:
        return SearchSpace(self.labels, tuple(index in self.zero for index in range(len(self))))

    @property
    def conditions(self) -> Conditions:
        return Conditions.of(Config(rules=self.rules, thresholds=self.thresholds), self.n_layers, self.baseline)

    @property
    def floors(self) -> dict[Measure, Tensor]:
        least = {Measure.ABLATION: LEAST_REFUSAL, Measure.KL: KL_FLOOR, Measure.STEERING: LEAST_REFUSAL}
        return {measure: torch.full((table.shape[1],), least[measure]) for measure, table in self.scores.items()}

    @property
    def means(self) -> list[CandidateScore]:
        columns = {measure.value: table.mean(1).tolist() for measure, table in self.scores.items()}
        return [
            CandidateScore(label, **{name: column[index] for name, column in columns.items()})
            for index, label in enumerate(self.labels)
        ]

    def decided(self) -> Decision:
        """The package's decision by the means of all scores."""
        return decide(self.means, self.conditions, self.space.zero)

    def plainly(self) -> int | None:
        """The rules once more, independently: the selected candidate, None if there is none."""
        ablation, kl, steering = (self.scores[measure].mean(1).tolist() for measure in Measure)
        limit = math.floor(self.n_layers * (1 - Fraction(str(self.thresholds.prune_layers))))
        comparable = [i for i in range(len(self)) if i not in self.zero and kl[i] == kl[i]]
        admitted = [i for i in comparable if self.labels[i].layer < limit and kl[i] <= self.thresholds.kl_threshold]
        if self.rules.relaxing:
            admitted = admitted or comparable
        considered = sorted(admitted, key=lambda i: (kl[i], i))[: self.thresholds.top_k_candidates]
        scored = [i for i in considered if ablation[i] == ablation[i] and steering[i] == steering[i]]
        start = self.baseline if self.rules.relaxing else 0.0
        inducing = [i for i in scored if steering[i] >= start + self.thresholds.induce_threshold]
        if self.rules.relaxing:
            inducing = inducing or scored
        return min(inducing, key=lambda i: (ablation[i], i), default=None)


class Measuring:
    """Answers from a table, and records the requests."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.asked: list[list[ScoreRequest]] = []

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[float]:
        self.asked.append(list(requests))
        return [float(self.problem.scores[measure][candidate, prompt]) for candidate, measure, prompt in requests]

    @property
    def requests(self) -> list[ScoreRequest]:
        return [request for requests in self.asked for request in requests]


def random_hints(problem: Problem, rng: random.Random) -> Hints:
    candidates = list(range(len(problem)))
    rng.shuffle(candidates)
    shape = {
        measure: torch.tensor([abs(rng.gauss(0, 3)) for _ in range(table.shape[1])], dtype=torch.float64)
        for measure, table in problem.scores.items()
    }
    return Hints(candidates, shape, problem.n_layers)


def pruned(problem: Problem, rng: random.Random, hints: Hints | None = None) -> tuple[PrunedResult, Measuring]:
    measuring = Measuring(problem)
    hints = hints or random_hints(problem, rng)
    return search(problem.space, problem.conditions, problem.floors, hints=hints, ask=measuring), measuring


def every_request(problem: Problem) -> list[ScoreRequest]:
    """For all candidates that are not zero."""
    return [
        ScoreRequest(candidate, measure, prompt)
        for measure, scores in problem.scores.items()
        for candidate in range(len(problem))
        if candidate not in problem.zero
        for prompt in range(scores.shape[1])
    ]


# tables: spread out or close together, with ties, at the thresholds, at the bounds, with NaN

REFUSAL: tuple[Draw, ...] = (
    lambda rng: rng.uniform(LEAST_REFUSAL, -LEAST_REFUSAL),
    lambda rng: max(LEAST_REFUSAL, rng.gauss(-3, 2)),
    lambda rng: rng.choice((LEAST_REFUSAL, -5.0, -1.0, 0.0, 0.0, 2.5, -LEAST_REFUSAL)),
    lambda rng: -2.0 + rng.choice((0.0, 1e-5, -1e-5, 1e-15)),
)
STEERING: tuple[Draw, ...] = (*REFUSAL, lambda rng: min(-LEAST_REFUSAL, rng.gauss(2, 3)), lambda rng: rng.gauss(0, 1))
KL: tuple[Draw, ...] = (
    lambda rng: rng.expovariate(10),
    lambda rng: rng.expovariate(30),
    lambda rng: rng.uniform(0.08, 0.12),
    lambda rng: rng.choice((KL_FLOOR, 0.0, 0.05, 0.1, 0.1, 0.1, 0.15, 3.0)),
)


def random_problem(rng: random.Random, *, vision: bool) -> Problem:
    n_layers = rng.randint(1, 7)
    count, broken = n_layers * rng.randint(1, 4), rng.choice((0.0, 0.0, 0.0, 0.02, 0.2))
    n_harmful, n_harmless = rng.randint(1, 5), rng.randint(1, 5)

    def table(draw: Draw, n_prompts: int) -> Tensor:
        rows = [[NAN if rng.random() < broken else draw(rng) for _ in range(n_prompts)] for _ in range(count)]
        return torch.tensor(rows, dtype=torch.float64)

    return Problem(
        scores={
            Measure.ABLATION: table(rng.choice(REFUSAL), n_harmful),
            Measure.KL: table(rng.choice(KL), n_harmless),
            Measure.STEERING: table(rng.choice(STEERING), n_harmless),
        },
        n_layers=n_layers,
        zero=frozenset(index for index in range(count) if rng.random() < 0.1),
        thresholds=Thresholds(
            kl_threshold=rng.choice((0.1, 0.1, 0.1, 0.1, 0.05, -1.0, math.inf)),
            induce_threshold=rng.choice((0.0, 0.0, 1.0, -2.0, -5.0, 19.0)),
            prune_layers=rng.choice((0.2, 0.5, 0.0, 0.95)),
            top_k_candidates=rng.choice((1, 2, 3, 4, 4, 999)) if vision else None,
        ),
        baseline=rng.choice((0.0, -2.0)) if vision else 0.0,
        rules=VISION if vision else TEXT,
    )


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.extended) for block in (1, 2, 3))])
def test_it_selects_what_exhaustive_selection_selects(
    vision: bool, block: int, caplog: pytest.LogCaptureFixture
) -> None:
    """On 2400 random tables; the selected candidate is measured in full, nothing twice, and of length zero nothing."""
    caplog.set_level(logging.CRITICAL)
    outcomes = set()
    for seed in range(300 * block, 300 * (block + 1)):
        rng = random.Random(seed)
        problem = random_problem(rng, vision=vision)
        found, measuring = pruned(problem, rng)
        decided = problem.decided()
        expected = decided.selected
        assert found.best == expected, seed
        assert len(set(measuring.requests)) == len(measuring.requests)
        assert not {request.candidate for request in measuring.requests} & problem.zero
        assert expected is None or bool(found.table.whole()[expected])
        assert expected is None or found.conditions == decided.conditions
        reached = Decision(found.best, found.rejections, found.conditions)
        assert all(borne_out(reached, problem)), seed
        outcomes.add((expected is None, found.conditions.kl_threshold, found.conditions.induce_threshold == -math.inf))
    assert len(outcomes) >= 4  # the control: several ways to end were met


@pytest.mark.parametrize("vision", [False, True])
def test_the_decision_is_that_of_the_rules_stated_independently(vision: bool, caplog: pytest.LogCaptureFixture) -> None:
    """On 3000 random tables, and the reason for each rejection holds."""
    caplog.set_level(logging.CRITICAL)
    reasons = set()
    for seed in range(1500):
        problem = random_problem(random.Random(seed), vision=vision)
        decision = problem.decided()
        assert decision.selected == problem.plainly(), seed
        assert all(borne_out(decision, problem)), seed
        reasons.update(decision.rejections)
    assert reasons == {None, *Rejection} - (set() if vision else {Rejection.RANK})


def borne_out(decision: Decision, problem: Problem) -> Iterator[bool]:
    """For each candidate, whether the reason for its rejection holds by its means, which NaN never speaks against.

    A pruned search need not come upon a NaN. The selected candidate alone has no reason.
    """
    means, conditions, best = problem.means, decision.conditions, decision.selected
    fitting = [
        (score.kl_div, index)
        for index, score in enumerate(means)
        if index not in problem.zero
        and score.layer < conditions.layer_limit
        and score.kl_div <= conditions.kl_threshold
    ]
    for index, (score, rejection) in enumerate(zip(means, decision.rejections, strict=True)):
        ahead = sum(not (score.kl_div, index) <= other for other in fitting)
        yield {
            None: index == best,
            Rejection.ZERO_LENGTH: index in problem.zero,
            Rejection.NAN: any(math.isnan(score.of(measure)) for measure in Measure),
            Rejection.LAYER: score.layer >= conditions.layer_limit,
            Rejection.KL: not score.kl_div <= conditions.kl_threshold,
            Rejection.RANK: ahead >= (conditions.top_k_candidates or math.inf),
            Rejection.STEERING: not score.steering_refusal >= conditions.induce_threshold,
            Rejection.NOT_BEST: best is not None
            and not (score.ablation_refusal, index) < (means[best].ablation_refusal, best),
        }[rejection]


@pytest.mark.parametrize("vision", [False, True])
def test_of_a_label_the_layer_alone_matters(vision: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Methods, random directions and vectors without a position go through the search together."""
    caplog.set_level(logging.CRITICAL)
    for seed in range(40):
        problem = random_problem(random.Random(seed), vision=vision)
        kinds = [
            lambda layer: CandidateLabel("difference_of_means", layer, -1),
            lambda layer: CandidateLabel("median", layer, -2),
            lambda layer: CandidateLabel("random", layer, seed=layer),
            lambda layer: CandidateLabel("file", layer),
        ]
        mixed = tuple(kinds[index % len(kinds)](label.layer) for index, label in enumerate(problem.labels))
        (one, asked), (other, as_well) = (
            pruned(each, random.Random(seed)) for each in (problem, replace(problem, mixed=mixed))
        )
        assert (one.best, one.rejections, asked.asked) == (other.best, other.rejections, as_well.asked)
        assert replace(problem, mixed=mixed).decided() == problem.decided()


@settings(max_examples=400)
@given(seeds, st.booleans())
def test_hints_change_the_work_and_never_the_result(seed: int, vision: bool) -> None:
    rng = random.Random(seed)
    problem = random_problem(rng, vision=vision)
    (one, _), (other, _) = pruned(problem, rng), pruned(problem, rng)
    assert one.best == other.best
    assert one.conditions == other.conditions


@pytest.mark.parametrize("guess", [NAN, math.inf, -math.inf, 1e300])
def test_hints_that_are_no_numbers_do_not_stop_the_search(guess: float) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        problem = random_problem(rng, vision=bool(seed % 2))
        hints = random_hints(problem, rng)
        wild = replace(hints, shape={measure: torch.full_like(shape, guess) for measure, shape in hints.shape.items()})
        assert pruned(problem, rng, wild)[0].best == problem.decided().selected


def test_a_planner_without_an_idea_does_not_stop_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner._Planner, "requests", lambda self: [])
    for seed in range(40):
        rng = random.Random(seed)
        problem = random_problem(rng, vision=bool(seed % 2))
        assert pruned(problem, rng)[0].best == problem.decided().selected


@settings(max_examples=200)
@given(seeds, st.booleans())
def test_a_bound_never_exceeds_the_mean_that_it_bounds(seed: int, vision: bool) -> None:
    rng = random.Random(seed)
    problem = random_problem(rng, vision=vision)
    table = Table(len(problem), problem.floors)
    everything = every_request(problem)
    some = rng.sample(everything, rng.randint(0, len(everything)))
    table.enter(some, Measuring(problem)(some))
    for measure, scores in problem.scores.items():
        mean = measure.sign * scores.mean(1)
        bound, exact = table.least(measure), table.complete(measure)
        assert not (bound > mean).any()  # NaN exceeds nothing
        assert torch.equal(bound[exact].nan_to_num(99), mean[exact].nan_to_num(99))  # to the last bit


@settings(max_examples=200)
@given(seeds, st.booleans())
def test_what_is_dropped_early_is_never_selected_later(seed: int, vision: bool) -> None:
    """A verdict on some of the scores holds whatever the others turn out to be."""
    rng = random.Random(seed)
    problem = random_problem(rng, vision=vision)
    table, requests = Table(len(problem), problem.floors), every_request(problem)
    rng.shuffle(requests)
    dropped: set[int] = set()
    for begin in range(0, len(requests), 7):
        table.enter(requests[begin : begin + 7], Measuring(problem)(requests[begin : begin + 7]))
        verdicts = judge(table, problem.space, problem.conditions)
        assert not dropped & {*verdicts.open, verdicts.best}
        dropped |= {index for index, rejection in enumerate(verdicts.rejections) if rejection is not None}
    best = judge(table, problem.space, problem.conditions).best
    assert best is None or best not in dropped


# single cases to the letter


def constant(ablation: Sequence[float], kl: Sequence[float], steering: Sequence[float], **other: Any) -> Problem:
    """Four prompts of each kind, alike."""
    columns = {Measure.ABLATION: ablation, Measure.KL: kl, Measure.STEERING: steering}
    scores = {m: torch.tensor(values, dtype=torch.float64).unsqueeze(1).repeat(1, 4) for m, values in columns.items()}
    return Problem(scores, **{"n_layers": 10, **other})


def test_of_equal_ablation_scores_the_first_is_selected() -> None:
    for seed in range(20):
        found, _ = pruned(constant([-5.0] * 4, [0.0] * 4, [-1.0, 1, 1, 1]), random.Random(seed))
        assert found.best == 1
        assert found.rejections[2] is Rejection.NOT_BEST


def test_the_thresholds_themselves_are_enough() -> None:
    thresholds = Thresholds(kl_threshold=0.25, induce_threshold=0.5)  # means of four of them are exact
    edge = constant([-9.0, -5.0], [0.25, 0.0], [0.5, 1.0], thresholds=thresholds)
    assert pruned(edge, random.Random(0))[0].best == 0
    above = constant([-9.0, -5.0], [math.nextafter(0.25, 1), 0.0], [0.5, 1.0], thresholds=thresholds)
    assert pruned(above, random.Random(0))[0].best == 1
    below = constant([-9.0, -5.0], [0.25, 0.0], [math.nextafter(0.5, 0), 1.0], thresholds=thresholds)
    assert pruned(below, random.Random(0))[0].best == 1


def test_scores_that_differ_in_the_last_bit_are_told_apart() -> None:
    a = -5.0
    close = constant([a, math.nextafter(a, -9), a], [0.0] * 3, [1.0] * 3)
    assert all(pruned(close, random.Random(seed))[0].best == 1 for seed in range(10))


def test_the_last_layers_and_candidates_of_length_zero_are_not_measured() -> None:
    problem = constant([-5.0] * 10, [0.0] * 10, [1.0] * 10, zero=frozenset({0}))
    found, measuring = pruned(problem, random.Random(0))
    assert {request.candidate for request in measuring.requests} == set(range(1, 8))
    assert [found.rejections[index] for index in (0, 8, 9)] == [
        Rejection.ZERO_LENGTH, Rejection.LAYER, Rejection.LAYER
    ]  # fmt: skip


def test_a_kl_far_above_the_threshold_takes_a_prompt_to_tell() -> None:
    problem = constant([-9.0] + [-5.0] * 4, [8.0] + [0.0] * 4, [1.0] * 5)
    found, measuring = pruned(problem, random.Random(0))
    assert found.rejections[0] is Rejection.KL
    assert sum(request.candidate == 0 and request.measure is Measure.KL for request in measuring.requests) == 1


def test_a_single_nan_ends_the_measuring_of_a_candidate() -> None:
    problem = constant([-9.0, -5.0], [0.0] * 2, [1.0] * 2)
    for measure in Measure:
        scores = {**problem.scores, measure: problem.scores[measure].clone()}
        scores[measure][0] = NAN
        found, measuring = pruned(replace(problem, scores=scores), random.Random(0))
        assert (found.best, found.rejections[0]) == (1, Rejection.NAN)
        assert sum(request.candidate == 0 for request in measuring.requests) <= 6  # of 12; the first round is under way


def test_only_the_rules_for_images_drop_conditions() -> None:
    text = constant([-5.0, -4.0], [0.5, 0.4], [-1.0, -2.0])
    found, _ = pruned(text, random.Random(0))
    assert (found.best, found.conditions) == (None, text.conditions)
    vision = replace(
        text, rules=VISION, thresholds=Thresholds(top_k_candidates=1)
    )  # neither has a low KL: the lowest; and that does not steer
    found, _ = pruned(vision, random.Random(0))
    assert found.best == 1
    assert found.conditions == vision.conditions.without_layer_and_kl().without_steering()


def test_of_those_of_lowest_kl_not_even_a_better_one_beyond_the_top_is_selected() -> None:
    problem = constant(
        [-9.0, -5.0, -6.0], [0.09, 0.01, 0.02], [1.0] * 3, rules=VISION, thresholds=Thresholds(top_k_candidates=2)
    )
    found, _ = pruned(problem, random.Random(0))
    assert (found.best, found.rejections[0]) == (2, Rejection.RANK)


# real models' scores


def published(golden: Path, name: str, seed: int) -> Problem:
    """Prompts that scatter around the published means, and KLs of a long tail."""
    run = json.loads((golden / "published_runs" / f"{name}.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(seed)

    def scattered(key: str, floor: float) -> Tensor:
        means = torch.tensor([[score[key]] for score in run["scores"]], dtype=torch.float64)
        noise = torch.randn(len(means), 32, generator=generator).double() + torch.randn(1, 32, generator=generator)
        if key == "kl_div":
            factor = (0.8 * noise).exp()
            return means * factor / factor.mean(1, keepdim=True)
        return (means + noise - noise.mean(1, keepdim=True)).clamp(floor, -floor)

    names = {Measure.ABLATION: "ablation_refusal", Measure.KL: "kl_div", Measure.STEERING: "steering_refusal"}
    zero = frozenset(index for index, score in enumerate(run["scores"]) if score["kl_div"] == 0)
    return Problem({m: scattered(key, LEAST_REFUSAL) for m, key in names.items()}, run["n_layers"], zero)


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_take_a_fraction_of_the_work(
    golden: Path, name: str, vision: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    for seed in range(3):
        problem = published(golden, name, seed)
        if vision:
            problem = replace(problem, rules=VISION, thresholds=Thresholds(top_k_candidates=15))
        found, measuring = pruned(problem, random.Random(seed))
        assert found.best == problem.decided().selected
        assert found.best is not None
        share = len(measuring.requests) / ((len(problem) - len(problem.zero)) * 96)
        assert share < (0.35 if vision else 0.2)
        assert len(measuring.asked) <= 12


def test_the_slack_is_more_than_float32_rounds() -> None:
    """Of a KL over 256k tokens: sums of terms up to 14, in whatever order."""
    terms = torch.rand(262_144, generator=torch.Generator().manual_seed(0))
    terms = terms / terms.sum() * 14
    assert abs(float(terms.cumsum(0)[-1]) - float(terms.double().sum())) < SLACK
