"""Direction methods: the difference of means to the letter, and a second method by its name, from end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refusal_direction import ChatModel, RunResult, extract, load_run
from refusal_direction.candidates import CandidateLabel
from refusal_direction.config import Config, ModelSource, PromptSource
from refusal_direction.errors import ConfigurationError
from refusal_direction.methods import METHODS, check_methods, difference_of_means, make_candidates
from refusal_direction.output import artifacts
from tests.test_directions import randn, seeds

MEANS, MEDIANS = "difference_of_means", "difference_of_medians"
FEW = Config(model=ModelSource("demo"), prompts=PromptSource(n_train=16, n_val=8), methods=(MEANS, MEDIANS))


def difference_of_medians(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Coordinate by coordinate."""
    return harmful.double().quantile(0.5, dim=0) - harmless.double().quantile(0.5, dim=0)


@pytest.fixture
def medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a method, for as long as the test takes."""
    monkeypatch.setitem(METHODS, MEDIANS, difference_of_medians)


# the difference of means


@given(st.integers(1, 9), st.integers(1, 9), seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_difference_of_means_is_that_of_numpy_in_float64(m: int, n: int, seed: int, dtype: torch.dtype) -> None:
    harmful = (100 + randn(m, 2, 3, 4, seed=seed)).to(dtype)
    harmless = (100 + randn(n, 2, 3, 4, seed=seed + 1)).to(dtype)
    expected = np.mean(harmful.double().numpy(), axis=0) - np.mean(harmless.double().numpy(), axis=0)
    found = difference_of_means(harmful, harmless)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_difference_of_means_does_not_round_as_float32_does() -> None:
    """Control of the accumulation in float64: it matters."""
    harmful = (1e4 + randn(2000, 4, seed=0)).float()
    harmless = (1e4 + randn(2000, 4, seed=1)).float()
    exact = np.mean(harmful.double().numpy(), axis=0) - np.mean(harmless.double().numpy(), axis=0)
    assert np.abs(difference_of_means(harmful, harmless).numpy() - exact).max() < 1e-10
    assert np.abs((harmful.mean(0) - harmless.mean(0)).numpy() - exact).max() > 1e-6


@given(st.integers(1, 6), seeds)
def test_difference_of_means_is_antisymmetric_and_ignores_what_is_common(n: int, seed: int) -> None:
    harmful, harmless = randn(n, 5, seed=seed), randn(n + 1, 5, seed=seed + 1)
    shift = randn(5, seed=seed + 2)
    r = difference_of_means(harmful, harmless)
    assert torch.allclose(difference_of_means(harmless, harmful), -r)
    assert torch.allclose(difference_of_means(harmful + shift, harmless + shift), r, atol=1e-12)
    assert torch.allclose(difference_of_means(harmful + shift, harmless), r + shift, atol=1e-12)


def test_difference_of_means_changes_no_argument() -> None:
    x, harmless = randn(3, 4, 8, seed=0), randn(5, 4, 8, seed=2)
    copies = x.clone(), harmless.clone()
    difference_of_means(x, harmless)
    assert torch.equal(x, copies[0])
    assert torch.equal(harmless, copies[1])


# methods by name


@pytest.mark.usefixtures("medians")
def test_each_method_makes_a_candidate_for_every_position_and_layer() -> None:
    harmful, harmless = randn(4, 2, 3, 5, seed=0), randn(6, 2, 3, 5, seed=1)
    candidates = make_candidates((MEDIANS, MEANS), harmful, harmless)
    assert list(candidates.labels) == [
        CandidateLabel(method, layer, position)
        for method in (MEDIANS, MEANS)
        for position in (-2, -1)
        for layer in range(3)
    ]
    assert torch.equal(candidates.vectors[:6], difference_of_medians(harmful, harmless).flatten(0, 1))
    assert torch.equal(candidates.vectors[6:], difference_of_means(harmful, harmless).flatten(0, 1))


def test_a_method_that_is_not_known_or_named_twice_is_an_error_before_the_work() -> None:
    with pytest.raises(ConfigurationError, match=r"'medians' is not known\. Choose from difference_of_means\."):
        check_methods((MEANS, "medians"))
    with pytest.raises(ConfigurationError, match="names a method twice"):
        check_methods((MEANS, MEANS))
    with pytest.raises(ConfigurationError, match="'medians' is not known"):
        extract("nowhere", replace(FEW, methods=("medians",)))


# a second method, from end to end


@pytest.mark.usefixtures("medians")
def test_a_second_method_goes_through_every_search_and_is_read_back(chat: ChatModel, tmp_path: Path) -> None:
    every, some = (extract(chat, replace(FEW, search=search)) for search in ("exhaustive", "pruned"))
    assert some.label == every.label
    assert some.selection.evaluations < every.selection.evaluations
    for run in (every, some):
        both(run)
        artifacts.write(run, tmp_path / run.selection.search)
        both(load_run(tmp_path / run.selection.search))
        assert load_run(tmp_path / run.selection.search).label == run.label


def both(run: RunResult) -> None:
    """Candidates of either method at the same positions and layers, in this order, with vectors and scores of their own."""
    labels, half = run.candidates.labels, len(run.candidates) // 2
    assert [label.method for label in labels] == half * [MEANS] + half * [MEDIANS]
    assert [replace(label, method=MEDIANS) for label in labels[:half]] == list(labels[half:])
    assert tuple(score.label for score in run.means) == labels
    assert run.candidates.laid_out().shape == run.candidates.vectors.shape  # no single grid
    assert run.direction.method == run.label.method
    assert torch.equal(run.direction.vector, run.candidates.vectors[run.selection.index])
    alive = ~run.candidates.zero[:half]
    assert not torch.isclose(run.candidates.vectors[:half], run.candidates.vectors[half:])[alive].all(1).any()


@pytest.mark.usefixtures("medians")
@pytest.mark.parametrize("method", [MEANS, MEDIANS])
def test_a_method_alone_makes_one_grid(chat: ChatModel, method: str) -> None:
    run = extract(chat, replace(FEW, methods=(method,)))
    assert run.direction.method == run.label.method == method
    assert run.candidates.laid_out().shape[:2] == (chat.n_positions, run.model.n_layers)
