"""The choice by each search: the same candidate, the same warnings, the same errors, and an account of the work."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refusal_direction import ChatModel, RunResult, cli, extract
from refusal_direction.candidates import Candidates
from refusal_direction.config import TEXT, VISION, VISION_CONFIG, Config, ModelSource, PromptSource, Rules
from refusal_direction.demo import vision
from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.errors import ConfigurationError, NoCandidateError
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.output import artifacts
from refusal_direction.output import text as report
from refusal_direction.scoring import passes as sweeps
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.scores import Baseline, Scores, ScoringContext, null_candidates
from refusal_direction.selection.searches import SelectionResult, search_name, select_direction
from tests.test_search import Problem, random_problem

VOCAB, D_MODEL, N_TRAIN = 11, 5, 4
BY_RULE = {True: replace(VISION, top_k=3), False: TEXT}
MEASURES = {"ablation_refusal": Measure.ABLATION, "steering_refusal": Measure.STEERING, "kl_div": Measure.KL}


class FakeEngine:
    """Rows are not run: their scores stand in a table."""

    dtype = torch.float32

    def work(self, rows: Sequence[Row], candidates: Candidates) -> int:
        return len(rows)


def setting_of(problem: Problem, generator: torch.Generator) -> ScoringContext:
    """What the pipeline would hand on, if the model's scores were those of the problem."""
    n_harmful, n_harmless = problem.scores[Measure.ABLATION].shape[1], problem.scores[Measure.KL].shape[1]
    kept: dict[str, list[int]] = {}
    for name, size in (
        ("harmful_train", N_TRAIN), ("harmless_train", N_TRAIN), ("harmful_val", n_harmful), ("harmless_val", n_harmless)
    ):  # fmt: skip
        begin = sum(map(len, kept.values()))
        kept[name] = list(range(begin, begin + size))
    n_prompts, n_positions = sum(map(len, kept.values())), len(problem) // problem.n_layers
    refusal = torch.randn(n_prompts, generator=generator).double()
    refusal[kept["harmless_val"]] += problem.baseline - refusal[kept["harmless_val"]].mean()
    shape = (n_positions, problem.n_layers, D_MODEL)
    candidates = torch.randn(*shape, generator=generator).double()
    candidates.flatten(0, 1)[list(problem.null)] = 0
    baseline = Baseline(
        refusal=refusal,
        mass=refusal.sigmoid(),
        activations=torch.randn(2 * N_TRAIN, *shape, generator=generator),
        logits={prompt: torch.randn(VOCAB, generator=generator) for prompt in kept["harmless_val"]},
    )
    tokens = RefusalTokens((0,), ("I",), "a test")
    return ScoringContext(cast(Engine, FakeEngine()), tokens, candidates, baseline, kept)


def scoring_by(problem: Problem, noise: float = 0.0) -> Any:
    """Stands for `score_candidates`: reads the scores of the rows from the problem's table; copies are off by `noise`."""

    def score(setting: ScoringContext, candidates: Candidates, *, rows: Sequence[Row], tick: object) -> Scores:
        kept = setting.kept
        unmeasured = torch.where(null_candidates(candidates), 0.0, torch.nan).unsqueeze(1)
        found = {measure: unmeasured + table.new_zeros(table.shape[1]) for measure, table in problem.scores.items()}
        for row in rows:
            harmful = row.prompt in kept["harmful_val"]
            measure = (
                Measure.STEERING if row.kind is Intervention.STEERING else Measure.ABLATION if harmful else Measure.KL
            )
            prompt = kept["harmful_val" if harmful else "harmless_val"].index(row.prompt)
            copy, original = divmod(row.candidate, len(problem))
            found[measure][row.candidate, prompt] = problem.scores[measure][original, prompt] + copy * noise
        return Scores(found[Measure.ABLATION], found[Measure.STEERING], found[Measure.KL])

    return score


def silent(description: str, total: int) -> AbstractContextManager[Any]:
    return nullcontext(lambda done: None)


def outcome(problem: Problem, rules: Rules, search: str, seed: int) -> SelectionResult | str:
    """The choice, or the error's message."""
    setting = setting_of(problem, torch.Generator().manual_seed(seed))
    try:
        return select_direction(
            setting, Config(rules=rules, thresholds=problem.thresholds, search=search), progress=silent
        )
    except NoCandidateError as error:
        return str(error)


@pytest.fixture
def problems(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Problem]]:
    """Random problems by text's or images' rules (the parameter), each in force while it is looked at."""

    def generate() -> Iterator[tuple[int, Problem]]:
        for seed in range(150):
            problem = random_problem(random.Random(seed), vision=request.param)
            positive = {
                **problem.scores,
                Measure.KL: problem.scores[Measure.KL].clamp_min(0),
            }  # of such a small vocabulary
            problem = replace(problem, scores=positive)
            monkeypatch.setattr(sweeps, "score_candidates", scoring_by(problem))
            yield seed, problem

    return generate()


@pytest.mark.parametrize("problems", [False, True], indirect=True)
def test_a_pruned_search_ends_as_the_rule_does(
    problems: Iterator[tuple[int, Problem]], request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """In the same candidate with the same means and warnings, or in the same error with the same nearest misses."""
    vision = request.node.callspec.params["problems"]
    rules = BY_RULE[vision]
    errors, warnings = 0, set()
    for seed, problem in problems:
        caplog.clear()
        expected = outcome(problem, rules, rules.searches[0], seed)
        said = list(caplog.messages)
        caplog.clear()
        found = outcome(problem, rules, "pruned", seed)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
            errors += 1
            continue
        assert found.selection.index == expected.selection.index
        assert found.selection.score == expected.selection.score
        assert caplog.messages == said
        warnings.add(len(said))
        assert [place for place, reason in enumerate(found.selection.dropped) if reason is None] == [
            expected.selection.index
        ]
    assert errors
    assert warnings == ({0, 1, 2} if vision else {0})


@pytest.mark.parametrize("problems", [False, True], indirect=True)
def test_the_account_tells_what_was_measured(
    problems: Iterator[tuple[int, Problem]], request: pytest.FixtureRequest
) -> None:
    rules = BY_RULE[request.node.callspec.params["problems"]]
    fewer = 0
    for seed, problem in problems:
        found = outcome(problem, rules, "pruned", seed)
        if isinstance(found, str):
            continue
        for measure, counts in found.measured.items():
            scores, null = found.scores.of(measure), torch.tensor([i in problem.null for i in range(len(problem))])
            assert (counts[null] == 0).all()
            seen = (~scores[~null].isnan()).sum(1)
            broken = problem.scores[measure][~null].isnan().any(1)
            assert torch.equal(seen[~broken], counts[~null][~broken])
        whole = sum(table[~null].numel() for table in problem.scores.values())
        assert found.evaluations <= found.exhaustive_evaluations == whole
        fewer += found.evaluations < found.exhaustive_evaluations
    assert fewer > 20


def test_a_reason_is_true(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of candidates that were not measured in full: the means that they would have had bear it out."""
    caplog.set_level(logging.CRITICAL)
    reasons = set()
    for seed in range(100):
        problem = random_problem(random.Random(seed), vision=False)
        problem = replace(
            problem,
            scores={**problem.scores, Measure.KL: problem.scores[Measure.KL].clamp_min(0)},
        )
        monkeypatch.setattr(sweeps, "score_candidates", scoring_by(problem))
        found = outcome(problem, TEXT, "pruned", seed)
        if isinstance(found, str):
            continue
        ablation, kl, steering = (problem.scores[measure].mean(1) for measure in Measure)
        for index, reason in enumerate(found.selection.dropped):
            if reason is None:
                continue
            reasons.add(reason.split(" ")[0])
            holds = {
                "length": index in problem.null,
                "a": bool(ablation[index].isnan() or kl[index].isnan() or steering[index].isnan()),
                "layer": index % problem.n_layers >= int(problem.n_layers * (1 - problem.thresholds.prune_layers)),
                "KL": not kl[index] <= problem.thresholds.kl,
                "steering": not steering[index] >= problem.thresholds.induce,
                "another's": not ablation[index] < ablation[found.selection.index],
            }
            assert holds[reason.split(" ")[0]], (seed, index, reason)
    assert reasons == {"length", "a", "layer", "KL", "steering", "another's"}


def test_a_search_that_the_rules_do_not_have_is_an_error_before_the_work() -> None:
    assert search_name(Config()) == "exhaustive"
    assert search_name(Config(rules=VISION)) == "kl_first"
    with pytest.raises(ConfigurationError, match="--search kl_first: must be one of exhaustive, pruned"):
        extract("nowhere", Config(search="kl_first"))


# on a real model


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
        everything.choice.evaluations == everything.choice.exhaustive_evaluations == found.choice.exhaustive_evaluations
    )
    assert found.choice.evaluations <= 0.25 * everything.choice.evaluations
    assert found.choice.n_sweeps <= 8
    for one, other in zip(found.means, everything.means, strict=True):
        for name in MEASURES:
            value = getattr(one, name)
            assert value != value or value == pytest.approx(getattr(other, name), abs=1e-4)


def test_the_scores_file_says_what_was_measured_and_why_a_candidate_was_dropped(
    found: RunResult, tmp_path: Path
) -> None:
    artifacts.write(found, tmp_path)
    text = (tmp_path / "all_direction_scores.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    rows = json.loads(text)
    sizes = {"ablation_refusal": len(found.kept["harmful_val"]), **dict.fromkeys(("steering_refusal", "kl_div"), 0)}
    sizes.update(dict.fromkeys(("steering_refusal", "kl_div"), len(found.kept["harmless_val"])))
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
        "prompt_evaluations": found.choice.evaluations,
        "prompt_evaluations_of_exhaustive": found.choice.exhaustive_evaluations,
        "rows_repeated_for_rounding": found.choice.n_repeated,
        "sweeps": found.choice.n_sweeps,
    }
    assert f"Pruned search: {found.choice.evaluations} prompt evaluations" in report.results(found)
    assert "Pruned" not in report.results(extraction)


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@pytest.mark.parametrize("search", ["exhaustive", "pruned"])
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
        extract(chat, few, unfinished=tmp_path)
    runs, last = 0, -1
    found = extract(chat, replace(few, resume=True), unfinished=tmp_path)
    assert runs == whole - 2
    assert whole >= 3
    assert found.selection == expected.selection
    for measure in Measure:
        assert torch.equal(found.scores.of(measure).nan_to_num(99), expected.scores.of(measure).nan_to_num(99))


# PaliGemma's processor makes NumPy arrays of tensors
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.*")
def test_on_the_vision_language_demo_the_choice_is_that_of_the_published_rule() -> None:
    weights = vision.MODEL_DIR / "model.safetensors"
    if not weights.is_file():
        pytest.skip(f"{weights} is not here: the vision-language demo has not been trained yet")
    config = replace(VISION_CONFIG, model=ModelSource("demo"), prompts=PromptSource(n_train=24, n_val=12))
    published, pruned = (extract("demo", replace(config, search=search)) for search in ("kl_first", "pruned"))
    assert pruned.selection.index == published.selection.index
    assert pruned.warnings == published.warnings
    assert pruned.choice.evaluations < 0.75 * published.choice.evaluations
    whole = replace(config, prompts=PromptSource(), skip_filter=True, search="pruned")
    found = extract("demo", whole)
    assert found.choice.evaluations <= 0.25 * found.choice.exhaustive_evaluations


def test_the_flag_asks_for_it() -> None:
    assert cli.config_from(cli.parser().parse_args(["--search", "pruned"])).search == "pruned"
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["--search", "kl_first"])
