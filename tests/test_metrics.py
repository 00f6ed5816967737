"""Theorems about what is read off the logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refusal_direction.scoring import metrics
from refusal_direction.scoring.metrics import (
    LEAST_REFUSAL,
    entropy,
    kl_divergence,
    kl_floor,
    refusal_probability,
    refusal_score,
)

LEAST_SCORE = math.log(1e-8) - math.log(1 + 1e-8)  # -18.42
seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([0.01, 1.0, 10.0, 1000.0])


@st.composite
def logits(draw: st.DrawFn, rows: int = 3) -> Tensor:
    """Random logits, from nearly uniform to nearly certain."""
    vocab, seed, scale = draw(st.integers(3, 300)), draw(seeds), draw(scales)
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def softmax(values: Tensor) -> np.ndarray:
    exponentials = np.exp(values.double().numpy() - values.double().numpy().max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@given(logits())
def test_refusal_score_is_its_formula(values: Tensor) -> None:
    p = softmax(values)[:, [0, 2]].sum(-1)
    expected = np.log(p + 1e-8) - np.log(1 - p + 1e-8)
    np.testing.assert_allclose(refusal_score(values, (0, 2)).numpy(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(refusal_probability(values, (0, 2)).numpy(), p, rtol=1e-12, atol=1e-300)


@given(logits())
def test_refusal_score_keeps_within_its_bounds(values: Tensor) -> None:
    score = refusal_score(values, (0, 1))
    assert (score >= LEAST_SCORE - 1e-6).all()
    assert (score <= -LEAST_SCORE + 1e-6).all()


@pytest.mark.parametrize(("certain", "bound"), [(0, -LEAST_SCORE), (2, LEAST_SCORE)])
def test_bounds_of_the_refusal_score_are_reached(certain: int, bound: float) -> None:
    values = torch.full((1, 4), -1e4)
    values[0, certain] = 1e4
    assert refusal_score(values, (0, 1)).item() == pytest.approx(bound, abs=1e-9)
    assert abs(bound) == pytest.approx(18.42, abs=0.001)


@given(logits())
def test_refusal_score_of_half_is_zero_and_is_positive_above(values: Tensor) -> None:
    p, score = refusal_probability(values, (0,)), refusal_score(values, (0,))
    assert torch.equal(score > 0, p > 0.5)
    even = torch.tensor([[1.0, 1.0, -1e5]])
    assert refusal_score(even, (0,)).item() == pytest.approx(0, abs=1e-12)


@given(logits(), st.floats(-50, 50))
def test_scores_ignore_a_shift_of_all_logits(values: Tensor, shift: float) -> None:
    values = values.double()
    assert torch.allclose(refusal_score(values + shift, (0, 2)), refusal_score(values, (0, 2)), atol=1e-6)
    assert torch.allclose(kl_divergence(values, values + shift), torch.zeros(3, dtype=torch.float64), atol=1e-9)


@given(logits())
def test_refusal_score_rises_with_the_logit_of_a_refusal_token(values: Tensor) -> None:
    raised = values.clone()
    raised[:, 1] += 1
    assert (refusal_score(raised, (1,)) >= refusal_score(values, (1,)) - 1e-12).all()


@given(logits())
def test_kl_divergence_of_a_distribution_to_itself_is_zero(values: Tensor) -> None:
    assert torch.equal(kl_divergence(values, values), torch.zeros(3, dtype=torch.float64))


@given(logits(), seeds, scales)
def test_kl_divergence_keeps_within_its_bounds(p: Tensor, seed: int, scale: float) -> None:
    """Below 0 by less than log(1 + vocab * 1e-6), since 1e-6 is added; above by at most log(1 + 1e-6) - log(1e-6)."""
    q = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    kl = kl_divergence(p, q)
    assert (kl >= -math.log(1 + p.shape[-1] * 1e-6) - 1e-12).all()
    assert (kl <= math.log(1 + 1e-6) - math.log(1e-6) + 1e-9).all()


@given(logits(), seeds)
def test_kl_divergence_is_its_formula(p: Tensor, seed: int) -> None:
    q = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    of_p, of_q = softmax(p), softmax(q)
    expected = (of_p * (np.log(of_p + 1e-6) - np.log(of_q + 1e-6))).sum(-1)
    np.testing.assert_allclose(kl_divergence(p, q).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_kl_divergence_is_not_symmetric() -> None:
    """Control: which of the two is the baseline matters."""
    p, q = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert abs(float(kl_divergence(p, q) - kl_divergence(q, p))) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_computed_in_float64_whatever_the_logits(dtype: torch.dtype) -> None:
    values = (3 * torch.randn(4, 50)).to(dtype)
    other = (3 * torch.randn(4, 50)).to(dtype)
    for found, exact in (
        (refusal_score(values, (3, 4)), refusal_score(values.double(), (3, 4))),
        (refusal_probability(values, (3, 4)), refusal_probability(values.double(), (3, 4))),
        (kl_divergence(values, other), kl_divergence(values.double(), other.double())),
    ):
        assert found.dtype == torch.float64
        assert torch.equal(found, exact)


def test_no_argument_is_changed() -> None:
    p, q = torch.randn(3, 20), torch.randn(3, 20)
    copies = p.clone(), q.clone()
    _ = refusal_probability(p, (1,)), refusal_score(p, (1,)), kl_divergence(p, q), kl_floor(p), entropy(p)
    assert torch.equal(p, copies[0])
    assert torch.equal(q, copies[1])


# what no distribution can go below


def test_the_least_refusal_score_is_its_formula() -> None:
    assert abs(LEAST_REFUSAL - LEAST_SCORE) < 1e-12


@given(logits(), seeds, scales)
def test_no_distribution_has_a_kl_below_the_floor(values: Tensor, seed: int, scale: float) -> None:
    """Random ones, near ones, and those that put everything where the baseline has most."""
    generator = torch.Generator().manual_seed(seed)
    floor = kl_floor(values)
    others = scale * torch.randn(values.shape, generator=generator)
    tempered = [values.double() * factor for factor in (0.0, 0.5, 1.0, 1.001, 1.5, 5.0, 1e4)]
    for q in (others, values + 0.01 * others, *tempered):
        assert (kl_divergence(values.double(), q.double()) >= floor - 1e-12).all()
    assert (floor >= -math.log(1 + values.shape[-1] * 1e-6) - 1e-12).all()
    assert (floor <= 1e-12).all()  # the baseline itself has none


@given(logits())
def test_the_floor_of_the_kl_is_reached(values: Tensor) -> None:
    """By filling P up from the top: found by bisection for the level, independently."""
    p = softmax(values)
    for row, floor in zip(p, kl_floor(values).tolist(), strict=True):
        low, high = 0.0, 1e12
        for _ in range(200):
            level = (low + high) / 2
            low, high = (level, high) if np.maximum(level * row - 1e-6, 0).sum() < 1 else (low, level)
        q = np.maximum(low * row - 1e-6, 0)
        assert (row * (np.log(row + 1e-6) - np.log(q + 1e-6))).sum() == pytest.approx(floor, abs=1e-9)


def test_a_certain_baseline_has_a_far_higher_floor_than_any_baseline() -> None:
    """With 256k tokens the bound that holds for any is -0.23, far more than the threshold of 0.1."""
    values = torch.zeros(2, 256_000)
    values[0, 0] = 30.0
    certain, uniform = kl_floor(values).tolist()
    assert -1e-5 < certain <= 0
    assert uniform == pytest.approx(0.0, abs=1e-9)  # nothing is nearer to uniform than itself
    assert -math.log(1 + 256_000e-6) < -0.22


@given(logits())
def test_entropy_is_that_of_the_distribution(values: Tensor) -> None:
    p = softmax(values)
    expected = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    np.testing.assert_allclose(entropy(values).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_in_float32_too_a_sure_refusal_has_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the probabilities of several tokens may add up to more than 1."""
    monkeypatch.setattr(metrics, "widest_dtype", lambda device: torch.float32)
    torch.manual_seed(0)
    logits = torch.randn(5000, 50)
    tokens = (3, 4, 5)
    logits[:, list(tokens)] += 25
    assert bool((logits.softmax(-1)[:, list(tokens)].sum(-1) > 1).any())  # control
    scores = metrics.refusal_score(logits, tokens)
    assert bool((scores <= -metrics.LEAST_REFUSAL + 1e-4).all())  # NaN is not
