"""The package reproduces the results of the method's reference implementation, and the choices of the paper's authors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refusal_direction.candidates import CandidateLabel
from refusal_direction.config import Config, Thresholds
from refusal_direction.models.loading import load_chat_model
from refusal_direction.pipeline import extract
from refusal_direction.prompts.sampling import SampleSizes, sample_splits
from refusal_direction.prompts.sets import SETS_FOR_SELECTION, Prompt, PromptSet, PromptSets, set_name
from refusal_direction.results import RunResult
from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions
from refusal_direction.selection.decision import decide

SCORES = {"ablation_refusal": "refusal_score", "steering_refusal": "steering_score", "kl_div": "kl_div_score"}
"""Our name for each score, and the reference implementation's."""


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Run:
    """The package's result, and the folder of the reference implementation's for the same model."""

    result: RunResult
    prompts: PromptSets
    expected: Path

    def kept(self, which: PromptSet) -> list[str]:
        return [self.prompts[which][index].text for index in self.result.prompts[which].kept]


@pytest.fixture(scope="module")
def run(golden: Path, splits: Path) -> Run:
    published = {
        which: [
            Prompt(f"{set_name(which)}/{i}", entry["instruction"])
            for i, entry in enumerate(load(splits / f"{set_name(which)}.json"))
        ]
        for which in SETS_FOR_SELECTION
    }
    prompts = sample_splits(published, SampleSizes(n_train=128, n_val=32, seed=42))
    model = str(golden / "tiny_gemma" / "model")
    return Run(extract(load_chat_model(model), prompts=prompts), prompts, golden / "tiny_gemma")


def test_same_prompts_are_sampled(run: Run) -> None:
    sampled = load(run.expected / "sampled_prompts.json")
    drawn = {set_name(which): [prompt.text for prompt in run.prompts[which]] for which in SETS_FOR_SELECTION}
    assert drawn == sampled


def test_filter_keeps_the_same_prompts(run: Run) -> None:
    filtered = load(run.expected / "filtered_prompts.json")
    assert {set_name(which): run.kept(which) for which in SETS_FOR_SELECTION} == filtered
    drawn = {set_name(which): len(run.prompts[which]) for which in SETS_FOR_SELECTION}
    assert any(len(texts) < drawn[name] for name, texts in filtered.items())  # control: the filter had something to do


def test_candidates_agree_within_1e_5(run: Run) -> None:
    expected: Tensor = torch.load(run.expected / "mean_diffs.pt", weights_only=True)
    found = run.result.candidates.laid_out()
    assert found.shape == expected.shape == (7, 8, 96)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    lengths = expected.norm(dim=-1)
    assert ((found - expected).norm(dim=-1) <= 1e-5 * lengths.clamp_min(1e-3 * float(lengths.max()))).all()


@pytest.mark.parametrize("score", SCORES)
def test_every_score_agrees_within_1e_4(score: str, run: Run) -> None:
    evaluations = load(run.expected / "direction_evaluations.json")
    assert len(evaluations) == len(run.result.means) == 56
    for expected, found in zip(evaluations, run.result.means, strict=True):
        assert (found.label.position, found.label.layer) == (expected["position"], expected["layer"])
        assert getattr(found, score) == pytest.approx(expected[SCORES[score]], abs=1e-4, rel=0)


def test_same_direction_is_selected(run: Run) -> None:
    expected = load(run.expected / "direction_metadata.json")
    direction = run.result.direction
    assert (direction.position, direction.layer) == (expected["pos"], expected["layer"]) == (-6, 4)
    vector = torch.load(run.expected / "mean_diffs.pt", weights_only=True)[-6, 4]
    assert (direction.vector - vector).norm() < 1e-5 * vector.norm()


def test_run_was_layer_major_and_left_nothing_along_the_directions(run: Run) -> None:
    assert run.result.engine.name == "layer-major"
    assert 0 < run.result.engine.largest_leak < 1e-5


def test_a_pruned_search_selects_the_same_with_a_quarter_of_the_work(run: Run) -> None:
    found = extract(run.result.model.model_id, Config(search="pruned"), prompts=run.prompts)
    assert found.selection.index == run.result.selection.index
    for score in SCORES:  # rows are run together with other rows, so rounded differently
        assert getattr(found.selection.score, score) == pytest.approx(getattr(run.result.selection.score, score))
    assert run.result.selection.evaluations == found.selection.exhaustive_evaluations
    assert found.selection.evaluations <= 0.25 * found.selection.exhaustive_evaluations
    assert torch.equal(found.direction.vector, run.result.direction.vector)


PUBLISHED = ("gemma-2b-it", "gemma-7b-it", "llama-3-8b-instruct")


@pytest.fixture
def published_runs(golden: Path) -> dict[str, Any]:
    """Real models' tables of scores, and what was chosen from each."""
    return {name: load(golden / "published_runs" / f"{name}.json") for name in PUBLISHED}


def _selected(published_run: dict[str, Any], thresholds: Thresholds) -> dict[str, int | None]:
    """Position and layer of the package's choice by the published scores."""
    scores = []
    for score in published_run["scores"]:
        label = CandidateLabel("difference_of_means", score["layer"], score["position"])
        scores.append(CandidateScore(label, *(score[name] for name in SCORES)))
    conditions = Conditions.of(Config(thresholds=thresholds), published_run["n_layers"], harmless_baseline=0.0)
    selected = decide(scores, conditions, [False] * len(scores)).selected
    assert selected is not None
    return {"position": scores[selected].label.position, "layer": scores[selected].label.layer}


@pytest.mark.parametrize("name", PUBLISHED)
def test_selection_reproduces_the_published_choice(name: str, published_runs: dict[str, Any]) -> None:
    published_run = published_runs[name]
    assert _selected(published_run, Thresholds()) == published_run["selected"]


@pytest.mark.parametrize("name", ["gemma-2b-it", "gemma-7b-it"])
def test_lowest_ablation_score_alone_is_another_candidates(name: str, published_runs: dict[str, Any]) -> None:
    """Control: without the three conditions the choice would differ."""
    published_run = published_runs[name]
    anything = Thresholds(kl_threshold=float("inf"), induce_threshold=-float("inf"), prune_layers=0.0)
    assert _selected(published_run, anything) != published_run["selected"]
