"""A layer's products by oneDNN, with weights in blocks: the same numbers, and nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from refusal_direction.engine import products
from refusal_direction.engine.products import BlockedWeights, blocked_bytes
from tests.families import FAMILIES, build
from tests.problems import engine_of, make_problem, solve

pytestmark = pytest.mark.skipif(not products._AVAILABLE, reason="this torch multiplies by MKL and oneDNN on no CPU")


@pytest.fixture(autouse=True)
def every_product(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small products, too."""
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    with torch.no_grad():
        yield


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what is multiplied by oneDNN."""
    shapes: list[tuple[int, ...]] = []
    own = BlockedWeights._linear

    def counting(self: BlockedWeights, inputs: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(inputs.shape))
        return own(self, inputs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockedWeights, "_linear", counting)
        yield shapes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 77), (3, 9, 77), (2, 3, 4, 77), (77,), (0, 77)])
def test_the_product_is_the_same(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, inputs = nn.Linear(77, 33, bias=bias), torch.randn(shape)
    exact = nn.Linear(77, 33, bias=bias).double()
    exact.load_state_dict(linear.state_dict())
    with counted(monkeypatch) as shapes, BlockedWeights():
        first, again = linear(inputs), linear(inputs)
    assert shapes == [shape, shape]
    assert torch.equal(first, again)
    torch.testing.assert_close(first, exact(inputs.double()).float(), atol=1e-5, rtol=0)


def test_inputs_need_not_lie_in_one_piece() -> None:
    linear, inputs = nn.Linear(16, 8), torch.randn(3, 5, 32)[..., ::2].transpose(0, 1)
    expected = linear(inputs)
    with BlockedWeights():
        torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reason", ["a gradient", "half precision", "a slice of a parameter", "little work"])
def test_other_products_are_left_to_torch(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = torch.randn(4, 16), nn.Parameter(torch.randn(8, 16))
    if reason == "half precision":
        inputs, weight = inputs.bfloat16(), nn.Parameter(weight.bfloat16())
    elif reason == "little work":
        monkeypatch.setattr(products, "_LEAST_WORK", 4 * 16 * 8 + 1)
    served = weight[:5] if reason == "a slice of a parameter" else weight
    with counted(monkeypatch) as shapes, BlockedWeights(), torch.set_grad_enabled(reason == "a gradient"):
        found = functional.linear(inputs, served)
    assert not shapes
    assert torch.equal(found, functional.linear(inputs, served))


def test_blocks_are_gone_with_their_context() -> None:
    linear, blocked = nn.Linear(16, 8), BlockedWeights()
    with blocked:
        linear(torch.randn(4, 16))
    (blocks,) = blocked._blocks.values()
    seen = weakref.ref(blocks)
    del blocked, blocks
    gc.collect()
    assert seen() is None
    assert blocked_bytes(nn.Sequential(linear, nn.LayerNorm(8))) == 16 * 8 * 4


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt_neox"])
def test_scores_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, model = make_problem(), build(FAMILIES[name])
    with counted(monkeypatch) as shapes:
        found = solve(engine_of(model, problem), problem)
    assert shapes
    monkeypatch.setattr(products, "_AVAILABLE", False)
    with counted(monkeypatch) as shapes:
        expected = solve(engine_of(model, problem), problem)
    assert not shapes
    for measure in ("ablation", "steering", "kl"):
        torch.testing.assert_close(getattr(found.scores, measure), getattr(expected.scores, measure), atol=1e-5, rtol=0)


def test_where_a_layer_in_blocks_would_take_much_of_the_memory_torch_multiplies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, model = make_problem(), build(FAMILIES["llama"])
    engine = engine_of(model, problem)
    roomy = max(map(blocked_bytes, engine.stream.layers)) * 8
    monkeypatch.setattr("refusal_direction.engine.budget.free_bytes", lambda device: roomy - 1)
    engine.budget.reserve(0)
    with counted(monkeypatch) as shapes:
        solve(engine, problem)
    assert not shapes
