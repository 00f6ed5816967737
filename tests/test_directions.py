"""Theorems about the mathematics of directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refusal_direction.candidates import ZERO_NORM
from refusal_direction.directions import (
    ablate,
    residual_component,
    unit,
    widest_dtype,
)

sizes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 40))
seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([1e-3, 1.0, 1e3])


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_unit(*shape: int, seed: int) -> Tensor:
    """Units of directions of length 1, and so 1e-8 short of it."""
    r = randn(*shape, seed=seed)
    return unit(r / r.norm(dim=-1, keepdim=True))


def size_of(x: Tensor) -> float:
    return float(x.norm(dim=-1).max())


@given(sizes, seeds, scales)
def test_ablated_vectors_are_orthogonal_to_their_direction(size: tuple[int, int, int], seed: int, scale: float) -> None:
    rows, tokens, d_model = size
    x, u = scale * randn(rows, tokens, d_model, seed=seed), random_unit(rows, d_model, seed=seed + 1)
    along = torch.einsum("rtd,rd->rt", ablate(x, u), u)
    assert along.abs().max() < 1e-7 * size_of(x)


@given(sizes, seeds, scales)
def test_ablation_is_idempotent(size: tuple[int, int, int], seed: int, scale: float) -> None:
    rows, tokens, d_model = size
    x, u = scale * randn(rows, tokens, d_model, seed=seed), random_unit(rows, d_model, seed=seed + 1)
    once = ablate(x, u)
    assert (ablate(once, u) - once).norm(dim=-1).max() < 1e-7 * size_of(x)


@given(sizes, seeds)
def test_ablation_leaves_the_orthogonal_complement_unchanged(size: tuple[int, int, int], seed: int) -> None:
    rows, tokens, d_model = size
    x, u = randn(rows, tokens, d_model, seed=seed), random_unit(rows, d_model, seed=seed + 1)
    complement = x - torch.einsum("rtd,rd->rt", x, u).unsqueeze(-1) * u.unsqueeze(1)
    assert torch.allclose(ablate(complement, u), complement, atol=1e-6, rtol=0)
    assert torch.allclose(ablate(x, u), complement, atol=1e-12)


@given(sizes, seeds)
def test_ablation_removes_the_direction_itself(size: tuple[int, int, int], seed: int) -> None:
    """Control: what lies along the direction goes."""
    rows, tokens, d_model = size
    u = random_unit(rows, d_model, seed=seed)
    x = 7 * u.unsqueeze(1).expand(rows, tokens, d_model).contiguous()
    assert size_of(ablate(x, u)) < 1e-6


@given(sizes, seeds)
def test_flattened_rows_equal_unflattened_ones(size: tuple[int, int, int], seed: int) -> None:
    rows, tokens, d_model = size
    x, u = randn(rows, tokens, d_model, seed=seed), random_unit(rows, d_model, seed=seed + 1)
    flattened = ablate(x.flatten(0, 1), u)
    assert flattened.shape == (rows * tokens, d_model)
    assert torch.equal(flattened, ablate(x, u).flatten(0, 1))


@given(sizes, seeds)
def test_one_direction_for_all_is_each_row_having_it(size: tuple[int, int, int], seed: int) -> None:
    rows, tokens, d_model = size
    x, u = randn(rows, tokens, d_model, seed=seed), random_unit(d_model, seed=seed + 1)
    assert torch.allclose(ablate(x, u), ablate(x, u.expand(rows, d_model)), atol=1e-12)


@given(sizes, seeds)
def test_each_row_loses_its_own_direction_only(size: tuple[int, int, int], seed: int) -> None:
    rows, tokens, d_model = size
    x, u = randn(rows, tokens, d_model, seed=seed), random_unit(rows, d_model, seed=seed + 1)
    together = ablate(x, u)
    for row in range(rows):
        assert torch.allclose(together[row], ablate(x[row], u[row]), atol=1e-12)


def test_rows_that_are_not_contiguous_are_ablated_alike() -> None:
    x, u = randn(4, 6, 8, seed=0), unit(randn(6, 8, seed=1))
    assert torch.equal(ablate(x.transpose(0, 1), u), ablate(x.transpose(0, 1).contiguous(), u))


def test_directions_that_do_not_match_the_rows_are_refused() -> None:
    """Three rows of four tokens are not two rows of six."""
    with pytest.raises(ValueError, match="2 directions for 3 rows"):
        ablate(randn(3, 4, 8, seed=0), unit(randn(2, 8, seed=1)))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ],
)
def test_unit_of_zero_is_zero_in_every_dtype(dtype: torch.dtype) -> None:
    assert torch.equal(unit(torch.zeros(3, 8, dtype=dtype)), torch.zeros(3, 8, dtype=dtype))


@given(st.integers(1, 40), seeds, st.sampled_from([1e-2, 1.0, 1e4]))
def test_unit_has_unit_length_and_the_same_direction(d_model: int, seed: int, scale: float) -> None:
    r = randn(3, d_model, seed=seed)
    r = scale * r / r.norm(dim=-1, keepdim=True)
    u = unit(r)
    assert torch.allclose(u.norm(dim=-1), torch.ones(3, dtype=torch.float64), atol=2e-6)
    assert torch.allclose(u * r.norm(dim=-1, keepdim=True), r, rtol=2e-6, atol=0)
    assert torch.allclose(unit(-r), -u)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unit_and_ablation_keep_the_dtype(dtype: torch.dtype) -> None:
    r = randn(3, 8, seed=0).to(dtype)
    assert unit(r).dtype == dtype
    assert ablate(randn(3, 4, 8, seed=1).to(dtype), unit(r)).dtype == dtype


def test_ablation_of_a_zero_direction_is_invisible() -> None:
    r = randn(1, 8, seed=0)
    r = 0.999 * ZERO_NORM * r / r.norm()
    x = randn(1, 5, 8, seed=1)
    assert torch.allclose(ablate(x, unit(r)), x, rtol=1e-7, atol=1e-7)


def test_what_an_exact_ablation_leaves_along_a_direction_is_no_leak() -> None:
    """Not even by a u that is a little too short: of what lay along it that leaves 1 - |u|^2."""
    x, u = randn(3, 4, 8, seed=0), unit(randn(3, 8, seed=1))
    assert residual_component(ablate(x, u), u) < 1e-6
    short = 0.99 * u
    assert residual_component(ablate(x, short), short) < 1e-6
    assert residual_component(ablate(x, 0.98 * u), short) > 1e-3  # control: ablated by less than u says


def test_a_leak_is_the_largest_share_of_any_token() -> None:
    x, u = randn(2, 3, 8, seed=0), unit(randn(2, 8, seed=1))
    clean = ablate(x, u)
    leaking = clean.clone()
    leaking[1, 2] += 0.25 * clean[1, 2].norm() * u[1]
    assert residual_component(leaking, u) == pytest.approx(0.25 / (1 + 0.25**2) ** 0.5, rel=1e-5)


def test_a_stream_that_is_not_a_number_is_no_leak() -> None:
    x, u = randn(1, 2, 8, seed=0), unit(randn(1, 8, seed=1))
    x[0, 0] = torch.nan
    assert residual_component(ablate(x, u), u) < 1e-6


def test_no_argument_is_changed() -> None:
    x, r = randn(3, 4, 8, seed=0), randn(3, 8, seed=1)
    copies = x.clone(), r.clone()
    u = unit(r)
    ablate(x, u)
    ablate(x, u[0])
    ablate(x.flatten(0, 1), u)
    residual_component(x, u)
    assert all(torch.equal(one, copy) for one, copy in zip((x, r), copies, strict=True))


def test_float32_is_the_most_precise_on_mps_only() -> None:
    assert widest_dtype("mps") == torch.float32
    assert widest_dtype("cpu") == widest_dtype(torch.device("cuda", 0)) == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [False, True])
def test_ablation_is_exact_where_most_lies_along_the_direction(dtype: torch.dtype, rows: bool) -> None:
    """As in a channel of massive activations: what is left along u is within rounding of what is left of the rest."""
    torch.manual_seed(0)
    u = unit(torch.randn(3, 64)).to(dtype)
    u = u if rows else u[:1].expand(3, -1)
    x = (50 * u.float().unsqueeze(1) + 0.2 * torch.randn(3, 20, 64)).to(dtype)
    left = ablate(x, u if rows else u[0]).double()
    along = (left @ unit(u.double()).unsqueeze(-1)).squeeze(-1).abs() / left.norm(dim=-1)
    assert float(along.max()) <= max(1e-4, torch.finfo(dtype).eps)


@pytest.mark.parametrize("rows", [False, True])
def test_autocast_does_not_round_an_ablation(rows: bool) -> None:
    x, u = torch.randn(3, 20, 64), unit(torch.randn(3, 64))
    u = u if rows else u[0]
    expected = ablate(x, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x[0] @ x[0].T).dtype == torch.bfloat16  # control
        assert torch.equal(ablate(x, u), expected)
        assert residual_component(expected, u.expand(3, -1)) < 1e-6
