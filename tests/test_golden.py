"""The package reproduces what the method's reference implementation computed, and what the paper's authors chose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal_direction.selection.rules import CandidateScore, select
from torch import Tensor

from refusal_direction.config import Config, Thresholds
from refusal_direction.models.loading import load_chat_model
from refusal_direction.pipeline import RunResult, extract
from refusal_direction.prompts.sets import Prompt, sample_splits

SETS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val")
SCORES = {"ablation_refusal": "refusal_score", "steering_refusal": "steering_score", "kl_div": "kl_div_score"}
"""Our name for each score, and the reference implementation's."""


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Run:
    """What the package found, and where the reference implementation's results for the same model are."""

    extraction: RunResult
    expected: Path

    def texts(self, members: Sequence[int]) -> list[str]:
        return [self.extraction.prompts.everything[index].text for index in members]


@pytest.fixture(scope="module")
def run(golden: Path, splits: Path) -> Run:
    published = {
        name: [Prompt(f"{name}/{i}", entry["instruction"]) for i, entry in enumerate(load(splits / f"{name}.json"))]
        for name in SETS
    }
    prompts = sample_splits(published, n_train=128, n_val=32, seed=42)
    chat = load_chat_model(str(golden / "tiny_gemma" / "model"))
    return Run(extract(chat, prompts=prompts), golden / "tiny_gemma")


def test_same_prompts_are_sampled(run: Run) -> None:
    sampled = load(run.expected / "sampled_prompts.json")
    drawn = {name: [prompt.text for prompt in getattr(run.extraction.prompts, name)] for name in SETS}
    assert drawn == sampled


def test_filter_keeps_the_same_prompts(run: Run) -> None:
    filtered = load(run.expected / "filtered_prompts.json")
    assert {name: run.texts(run.extraction.kept[name]) for name in SETS} == filtered
    drawn = {name: len(getattr(run.extraction.prompts, name)) for name in SETS}
    assert any(len(filtered[name]) < drawn[name] for name in SETS)  # control: the filter had something to do


def test_candidates_agree_within_1e_5(run: Run) -> None:
    expected: Tensor = torch.load(run.expected / "mean_diffs.pt", weights_only=True)
    found = run.extraction.candidates
    assert found.shape == expected.shape == (7, 8, 96)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    lengths = expected.norm(dim=-1)
    assert ((found - expected).norm(dim=-1) <= 1e-5 * lengths.clamp_min(1e-3 * float(lengths.max()))).all()


@pytest.mark.parametrize("score", SCORES)
def test_every_score_agrees_within_1e_4(score: str, run: Run) -> None:
    evaluations = load(run.expected / "direction_evaluations.json")
    assert len(evaluations) == len(run.extraction.means) == 56
    for expected, found in zip(evaluations, run.extraction.means, strict=True):
        assert (found.position, found.layer) == (expected["position"], expected["layer"])
        assert getattr(found, score) == pytest.approx(expected[SCORES[score]], abs=1e-4, rel=0)


def test_same_direction_is_selected(run: Run) -> None:
    expected = load(run.expected / "direction_metadata.json")
    direction = run.extraction.direction
    assert (direction.position, direction.layer) == (expected["pos"], expected["layer"]) == (-6, 4)
    vector = torch.load(run.expected / "mean_diffs.pt", weights_only=True)[-6, 4]
    assert (direction.vector - vector).norm() < 1e-5 * vector.norm()


def test_run_was_layer_major_and_left_nothing_along_the_directions(run: Run) -> None:
    assert run.extraction.engine == "layer-major"
    assert 0 < run.extraction.leak < 1e-5


def test_a_pruned_search_selects_the_same_with_a_quarter_of_the_work(run: Run) -> None:
    found = extract(run.extraction.chat, Config(search="pruned"), prompts=run.extraction.prompts)
    assert found.selection.index == run.extraction.selection.index
    for score in SCORES:  # rows are run together with other rows, so rounded differently
        assert getattr(found.selection.score, score) == pytest.approx(getattr(run.extraction.selection.score, score))
    assert run.extraction.choice.evaluations == found.choice.exhaustive_evaluations
    assert found.choice.evaluations <= 0.25 * found.choice.exhaustive_evaluations
    assert torch.equal(found.direction.vector, run.extraction.direction.vector)


PUBLISHED = ("gemma-2b-it", "gemma-7b-it", "llama-3-8b-instruct")


@pytest.fixture
def published_runs(golden: Path) -> dict[str, Any]:
    """Real models' tables of scores, and what was chosen from each."""
    return {name: load(golden / "published_runs" / f"{name}.json") for name in PUBLISHED}


def _scores(published_run: dict[str, Any]) -> list[CandidateScore]:
    return [CandidateScore(**score) for score in published_run["scores"]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_selection_reproduces_the_published_choice(name: str, published_runs: dict[str, Any]) -> None:
    published_run = published_runs[name]
    selection = select(_scores(published_run), published_run["n_layers"], thresholds=Config().thresholds)
    assert {"position": selection.score.position, "layer": selection.score.layer} == published_run["selected"]


@pytest.mark.parametrize("name", ["gemma-2b-it", "gemma-7b-it"])
def test_lowest_ablation_score_alone_is_another_candidates(name: str, published_runs: dict[str, Any]) -> None:
    """Control: without the three conditions the choice would differ."""
    published_run = published_runs[name]
    anything = Thresholds(kl=float("inf"), induce=-float("inf"), prune_layers=0.0)
    best = select(_scores(published_run), published_run["n_layers"], thresholds=anything).score
    assert {"position": best.position, "layer": best.layer} != published_run["selected"]
