"""Each search on the same scores: the same candidate, the same warnings, the same errors, and the work recorded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refusal_direction import ChatModel, RunResult, extract
from refusal_direction.candidates import CandidateLabel, Candidates
from refusal_direction.config import VISION, VISION_CONFIG, Config, ModelSource, PromptSource, search_name
from refusal_direction.demo import vision
from refusal_direction.engine import Engine, Row
from refusal_direction.errors import ConfigurationError
from refusal_direction.flags import parse
from refusal_direction.methods import make_candidates
from refusal_direction.output import artifacts
from refusal_direction.pipeline import prepared
from refusal_direction.prompts.sets import Kind, PromptSet, Split
from refusal_direction.scoring import passes
from refusal_direction.scoring.baseline import Baseline, measure_baseline
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.requests import ScoringContext
from refusal_direction.scoring.scores import ScoreRequest, Scores
from refusal_direction.selection.conditions import Rejection
from refusal_direction.selection.result import SelectionResult
from refusal_direction.selection.searches import rank_heuristic, select_direction
from tests.test_search import Problem, random_problem

VOCAB, D_MODEL, N_TRAIN = 11, 5, 4


class FakeEngine:
    """Rows are not run: their scores stand in a table."""

    dtype = torch.float32

    def __init__(self, n_layers: int) -> None:
        self.stream = SimpleNamespace(layers=[None] * n_layers)

    def work(self, rows: Sequence[Row], candidates: Candidates) -> int:
        return len(rows)


def context_of(problem: Problem, generator: torch.Generator) -> ScoringContext:
    """What the pipeline would hand on, if the model's scores were those of the problem."""
    sizes = {Split.TRAIN: (N_TRAIN, N_TRAIN), Split.VALIDATION: (
        problem.scores[Measure.ABLATION].shape[1], problem.scores[Measure.KL].shape[1]
    )}  # fmt: skip
    kept: dict[PromptSet, list[int]] = {}
    for split, counts in sizes.items():
        for kind, count in zip(Kind, counts, strict=True):
            begin = sum(map(len, kept.values()))
            kept[kind, split] = list(range(begin, begin + count))
    harmless = kept[Kind.HARMLESS, Split.VALIDATION]
    n_prompts, n_positions = sum(map(len, kept.values())), len(problem) // problem.n_layers
    refusal = torch.randn(n_prompts, generator=generator).double()
    refusal[harmless] += problem.baseline - refusal[harmless].mean()
    vectors = torch.randn(len(problem), D_MODEL, generator=generator).double()
    vectors[list(problem.zero)] = 0
    baseline = Baseline(
        refusal=refusal,
        probability=refusal.sigmoid(),
        activations=torch.randn(2 * N_TRAIN, n_positions, problem.n_layers, D_MODEL, generator=generator),
        activations_of=tuple(range(2 * N_TRAIN)),
        logits={prompt: torch.randn(VOCAB, generator=generator) for prompt in harmless},
    )
    engine = cast(Engine, FakeEngine(problem.n_layers))
    return ScoringContext(engine, (0,), Candidates(vectors, problem.labels), baseline, kept)


def scores_of(problem: Problem, noise: float = 0.0) -> Callable[..., Tensor]:
    """Stands for `measure`: reads the scores from the problem's table; those of perturbed copies are off by `noise`."""

    def measure(
        context: ScoringContext, candidates: Candidates, requests: Sequence[ScoreRequest], tick: object
    ) -> Tensor:
        assert len(set(requests)) == len(requests)
        values = []
        for candidate, by, prompt in requests:
            copy, original = divmod(candidate, len(problem))
            assert candidates.labels[candidate] == problem.labels[original]
            values.append(float(problem.scores[by][original, prompt]) + copy * noise)
        return torch.tensor(values, dtype=torch.float64)

    return measure


def silent(description: str, total: int) -> AbstractContextManager[Any]:
    return nullcontext(lambda done: None)


def outcome(problem: Problem, search: str, seed: int, *, select: str = "best") -> tuple[SelectionResult, Scores] | str:
    """The selection and the scores per prompt, or the explanation why there is none."""
    context = context_of(problem, torch.Generator().manual_seed(seed))
    config = Config(rules=problem.rules, thresholds=problem.thresholds, search=search, select=select)
    selection, scores = select_direction(context, config, progress=silent)
    return selection.explanation if selection.index is None else (selection, scores)


def random_labels(problem: Problem, rng: random.Random) -> tuple[CandidateLabel, ...]:
    """Of two methods, of random directions, and of vectors without a position; the layers stay."""
    return tuple(
        rng.choice(
            (
                label,
                replace(label, method="median"),
                CandidateLabel("random", label.layer, seed=rng.randint(0, 9)),
                CandidateLabel("a file", label.layer),
            )
        )
        for label in problem.labels
    )


@pytest.fixture
def problems(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Problem]]:
    """Random problems by text's or images' rules (the parameter), each in force while it is looked at."""

    def generate() -> Iterator[tuple[int, Problem]]:
        for seed in range(150):
            problem = random_problem(random.Random(seed), vision=request.param)
            kl = problem.scores[Measure.KL].clamp_min(0)  # the floor of such a small vocabulary
            problem = replace(problem, scores={**problem.scores, Measure.KL: kl})
            if seed % 2:
                problem = replace(problem, mixed=random_labels(problem, random.Random(seed)))
            monkeypatch.setattr(passes, "measure", scores_of(problem))
            yield seed, problem

    return generate()


@pytest.mark.parametrize("problems", [False, True], indirect=True)
def test_a_pruned_search_ends_as_the_rule_does(
    problems: Iterator[tuple[int, Problem]], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """In the same candidate with the same means and warnings, or without one and with the same nearest misses."""
    vision = request.node.callspec.params["problems"]
    errors, warnings = 0, set()
    for seed, problem in problems:
        caplog.clear()
        expected = outcome(problem, problem.rules.searches[0], seed)
        said = list(caplog.messages)
        caplog.clear()
        found = outcome(problem, "pruned", seed)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
            errors += 1
            continue
        (ours, _), (theirs, _) = found, expected
        assert (ours.index, ours.score, ours.conditions) == (theirs.index, theirs.score, theirs.conditions)
        assert caplog.messages == said
        warnings.add(len(said))
        for selection in (ours, theirs):
            unexplained = [index for index, reason in enumerate(selection.reasons) if reason is None]
            assert unexplained == [selection.index]
            assert sum(selection.discarded.values()) == sum(
                rejection not in (None, Rejection.NOT_BEST) for rejection in selection.rejections
            )
    assert errors
    assert warnings == ({0, 1, 2} if vision else {0})


@pytest.mark.parametrize("problems", [False], indirect=True)
def test_the_nearest_miss_is_selected_where_nothing_else_is(
    problems: Iterator[tuple[int, Problem]], caplog: pytest.LogCaptureFixture
) -> None:
    """The same by either search; where a candidate meets every condition, asking for the nearest changes nothing."""
    used = 0
    for seed, problem in islice(problems, 60):
        best, said = outcome(problem, "exhaustive", seed), list(caplog.messages)
        caplog.clear()
        (exhaustive, pruned) = (outcome(problem, search, seed, select="nearest") for search in ("exhaustive", "pruned"))
        if isinstance(exhaustive, str) or isinstance(pruned, str):
            assert exhaustive == pruned == best
            assert "nearest misses" not in exhaustive
            continue
        assert exhaustive[0].index == pruned[0].index
        if not isinstance(best, str):
            assert repr(exhaustive[0]) == repr(best[0])
            assert exhaustive[0].misses == []
            continue
        used += 1
        nearest = exhaustive[0].misses[0]
        assert (exhaustive[0].selected_as, exhaustive[0].index, exhaustive[0].ties) == ("nearest", nearest.index, ())
        assert exhaustive[0].rejections[nearest.index] in nearest.violated
        assert str(nearest) in best
        assert [str(nearest.score.label) in message for message in caplog.messages if message not in said] == [True] * 2
        caplog.clear()
    assert used > 5


@pytest.mark.parametrize("problems", [True], indirect=True)
@pytest.mark.extended
def test_among_images_there_is_no_nearer_miss_than_the_relaxed_conditions_admit(
    problems: Iterator[tuple[int, Problem]],
) -> None:
    unselected = 0
    for seed, problem in islice(problems, 40):
        for search in ("kl_first", "pruned"):
            one, other = (outcome(problem, search, seed, select=select) for select in ("best", "nearest"))
            assert repr(one) == repr(other)
            unselected += isinstance(one, str)
    assert unselected


@pytest.mark.parametrize("problems", [True], indirect=True)
def test_among_images_an_exhaustive_search_considers_every_rank(problems: Iterator[tuple[int, Problem]]) -> None:
    """It selects what KL first does where no rank is too low, and rejects no candidate for its rank."""
    compared = 0
    for seed, problem in problems:
        unranked = replace(problem, thresholds=replace(problem.thresholds, top_k_candidates=None))
        found, expected = outcome(problem, "exhaustive", seed), outcome(unranked, "kl_first", seed)
        if isinstance(found, str) or isinstance(expected, str):
            assert found == expected
            continue
        assert (found[0].index, found[0].score) == (expected[0].index, expected[0].score)
        assert Rejection.RANK not in found[0].rejections
        assert found[0].evaluations == found[0].exhaustive_evaluations
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("problems", [False, True], indirect=True)
def test_what_was_measured_is_recorded(problems: Iterator[tuple[int, Problem]]) -> None:
    fewer = 0
    for seed, problem in problems:
        found = outcome(problem, "pruned", seed)
        if isinstance(found, str):
            continue
        selection, scores = found
        zero = torch.tensor(problem.space.zero)
        for measure, numbers in selection.measured.items():
            counts = torch.tensor(numbers)
            assert (counts[zero] == 0).all()
            seen = (~scores.of(measure)[~zero].isnan()).sum(1)
            broken = problem.scores[measure][~zero].isnan().any(1)
            assert torch.equal(seen[~broken], counts[~zero][~broken])
        whole = sum(table[~zero].numel() for table in problem.scores.values())
        assert selection.evaluations <= selection.exhaustive_evaluations == whole
        fewer += selection.evaluations < selection.exhaustive_evaluations
    assert fewer > 20


def test_a_search_that_the_rules_do_not_have_is_an_error_before_the_work() -> None:
    assert search_name(Config()) == "exhaustive"
    assert search_name(Config(rules=VISION)) == "kl_first"
    with pytest.raises(ConfigurationError, match="--search kl_first: must be one of exhaustive, pruned"):
        extract("nowhere", Config(search="kl_first"))


def test_the_more_a_candidate_has_of_what_the_head_reads_the_more_promising_it_is() -> None:
    end = torch.tensor([3.0, 0.0, 0.0, 0.0]).double()
    across = torch.tensor([0.0, 3.0, 0.0, 0.0]).double()
    candidates = torch.stack([0.1 * end, across, end, -end, end])
    stream = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    stream /= stream.norm(dim=-1, keepdim=True)
    copies = candidates.clone(), stream.clone()
    ranked = rank_heuristic(candidates, stream, end)
    assert ranked.argsort(descending=True, stable=True).tolist() == [2, 4, 0, 1, 3]
    assert torch.equal(candidates, copies[0])
    assert torch.equal(stream, copies[1])
    stream[:, 2] *= 50  # where the stream is long, a difference of means says less
    assert rank_heuristic(candidates, stream, end).argmax() == 4


# on a real model


def test_methods_random_directions_and_given_vectors_are_selected_among_together(chat: ChatModel) -> None:
    """The pruned search agrees with the exhaustive one, and a vector has its scores whatever its label."""
    config = Config(model=ModelSource("demo"), prompts=PromptSource(n_train=16, n_val=8))
    with prepared(chat, config) as ready:
        sets = ready.prompts.indices()
        train = [sets[kind, Split.TRAIN] for kind in Kind]
        baseline = measure_baseline(
            ready.engine,
            ready.tokens.ids,
            n_positions=chat.n_positions,
            activations_of=[*train[0], *train[1]],
            logits_of=sets[Kind.HARMLESS, Split.VALIDATION],
        )
        made = make_candidates(config.methods, *map(baseline.activations_at, train))
        layers = [index for index, layer in enumerate(made.layers) if layer in (2, 4)]
        given = Candidates(made.vectors[layers], tuple(CandidateLabel("a file", made.layers[i]) for i in layers))
        seeds = [CandidateLabel("random", layer, seed=seed) for seed, layer in enumerate((1, 2, 3, 4, 5, 7))]
        noise = torch.randn(len(seeds), made.vectors.shape[1], generator=torch.Generator().manual_seed(0)).double()
        random_ones = Candidates(noise * made.vectors.norm(dim=-1).mean() / noise.norm(dim=-1).mean(), tuple(seeds))
        candidates = Candidates.concatenate([random_ones, made, given])
        context = ScoringContext(ready.engine, ready.tokens.ids, candidates, baseline, sets)
        every, some = (
            select_direction(context, replace(config, search=search), progress=silent)[0]
            for search in ("exhaustive", "pruned")
        )
    assert some.index == every.index
    assert some.evaluations < every.evaluations
    assert [score.label for score in every.means] == list(candidates.labels)
    assert every.score.label.method != "random"
    assert every.rejections[len(seeds) - 1] is some.rejections[len(seeds) - 1] is Rejection.LAYER
    for place, original in enumerate(layers, start=len(seeds) + len(made)):
        for measure in Measure:
            scores = [every.means[index].of(measure) for index in (place, len(seeds) + original)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.fixture(scope="module")
def found(chat: ChatModel) -> RunResult:
    config = Config(model=ModelSource("demo"), search="pruned")
    return extract("demo", config)


def test_on_the_demo_model_a_quarter_of_the_evaluations_proves_the_choice(chat: ChatModel, found: RunResult) -> None:
    everything = extract(chat, Config(model=ModelSource("demo")))
    assert (found.direction.position, found.direction.layer) == (
        everything.direction.position,
        everything.direction.layer,
    )
    assert (
        everything.selection.evaluations
        == everything.selection.exhaustive_evaluations
        == found.selection.exhaustive_evaluations
    )
    assert found.selection.evaluations <= 0.25 * everything.selection.evaluations
    assert found.selection.n_passes <= 8
    for one, other in zip(found.means, everything.means, strict=True):
        for measure in Measure:
            value = one.of(measure)
            assert value != value or value == pytest.approx(other.of(measure), abs=1e-4)


def test_the_scores_file_says_what_was_measured_and_why_a_candidate_was_dropped(
    found: RunResult, tmp_path: Path
) -> None:
    artifacts.write(found, tmp_path)
    text = (tmp_path / "all_direction_scores.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    rows = json.loads(text)
    kept = {kind: len(found.prompts[kind, Split.VALIDATION].kept) for kind in Kind}
    sizes = {
        "ablation_refusal": kept[Kind.HARMFUL],
        "steering_refusal": kept[Kind.HARMLESS],
        "kl_div": kept[Kind.HARMLESS],
    }
    per_prompt: dict[str, Tensor] = load_file(tmp_path / "per_prompt_scores.safetensors")
    chosen = 0
    for index, row in enumerate(rows):
        if row["dropped"] == "length zero":
            assert set(row["measured"].values()) == {0}
            continue
        chosen += row["dropped"] is None
        for name, size in sizes.items():
            assert (row[name] is None) == (row["measured"][name] < size)
            assert int((~per_prompt[name][index].isnan()).sum()) == row["measured"][name]
    assert chosen == 1
    assert {row["dropped"] for row in rows} > {None, "layer >= 6 (--prune_layers 0.2)", "length zero"}


def test_the_work_done_is_recorded_and_shown(found: RunResult, extraction: RunResult, tmp_path: Path) -> None:
    artifacts.write(found, tmp_path)
    search = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["search"]
    assert search == {
        "name": "pruned",
        "prompt_evaluations": found.selection.evaluations,
        "prompt_evaluations_of_exhaustive": found.selection.exhaustive_evaluations,
        "rows_repeated_for_rounding": found.selection.n_repeated,
        "sweeps": found.selection.n_passes,
    }
    assert f"Pruned search: {found.selection.evaluations} prompt evaluations" in str(found)
    assert "Pruned" not in str(extraction)


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@pytest.mark.parametrize("search", [pytest.param("exhaustive", marks=pytest.mark.extended), "pruned"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_end(
    chat: ChatModel, search: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Config(
        model=ModelSource("demo"), prompts=PromptSource(n_train=24, n_val=12), search=search, memory_budget=13 * 2**19
    )
    runs = 0
    intervene = Engine.intervene

    def counted(self: Engine, *args: Any, **named: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == last:
            raise Killed
        intervene(self, *args, **named)

    monkeypatch.setattr(Engine, "intervene", counted)
    last = -1
    expected = extract(chat, few)
    whole, runs, last = runs, 0, 3
    with pytest.raises(Killed):
        extract(chat, few, checkpoint_dir=tmp_path)
    runs, last = 0, -1
    found = extract(chat, replace(few, resume=True), checkpoint_dir=tmp_path)
    assert runs == whole - 2
    assert whole >= 3
    assert replace(found.selection, means=()) == replace(expected.selection, means=())
    # a pruned search keeps rows between its passes, which are in other batches where a pass is not run again
    rounding = {"rtol": 0.0, "atol": 1e-5 if search == "pruned" else 0.0, "equal_nan": True}
    for measure in Measure:
        torch.testing.assert_close(found.scores.of(measure), expected.scores.of(measure), **rounding)
        means = (torch.tensor([score.of(measure) for score in one.means]) for one in (found, expected))
        torch.testing.assert_close(*means, **rounding)


# PaliGemma's processor makes NumPy arrays of tensors
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.*")
@pytest.mark.extended
def test_on_the_vision_language_demo_the_choice_is_that_of_the_published_rule() -> None:
    weights = vision.MODEL_DIR / "model.safetensors"
    if not weights.is_file():
        pytest.skip(f"{weights} is not here: the vision-language demo has not been trained yet")
    config = replace(VISION_CONFIG, model=ModelSource("demo"), prompts=PromptSource(n_train=24, n_val=12))
    published, pruned = (extract("demo", replace(config, search=search)) for search in ("kl_first", "pruned"))
    assert pruned.selection.index == published.selection.index
    assert pruned.warnings == published.warnings
    assert pruned.selection.evaluations < 0.75 * published.selection.evaluations
    whole = replace(config, prompts=PromptSource(), skip_filter=True, search="pruned")
    found = extract("demo", whole)
    assert found.selection.evaluations <= 0.25 * found.selection.exhaustive_evaluations


def test_the_flag_asks_for_it() -> None:
    assert parse(["--search", "pruned"], Config()).search == "pruned"
    with pytest.raises(SystemExit):
        parse(["--search", "kl_first"], Config())
