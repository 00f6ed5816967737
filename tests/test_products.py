"""A layer's products by oneDNN, with weights in blocks: the same numbers, and nothing left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from refusal_direction import cli
from refusal_direction.engine.shortcuts import products as products
from refusal_direction.engine.shortcuts.products import BlockedWeights, blocked_bytes
from tests.families import FAMILIES, build
from tests.problems import engine_of, make_problem, solve

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


@pytest.fixture(autouse=True)
def every_product(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Small products too, of few rows, on any processor."""
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    for name in ("_CPU_TOKENS", "_BLOCKED_TOKENS"):
        monkeypatch.setattr(f"refusal_direction.engine.budget.{name}", 16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    describe_processors(monkeypatch, tmp_path, "AuthenticAMD")
    for name in products._CAPACITIES:
        monkeypatch.setenv(name, str(products._KERNELS))
    with torch.no_grad():
        yield


def describe_processors(monkeypatch: pytest.MonkeyPatch, folder: Path, maker: str) -> None:
    """As Linux does."""
    description = folder / "cpuinfo"
    description.write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(products, "_PROCESSORS", description)


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


@needs_onednn
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


@needs_onednn
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


@needs_onednn
def test_blocks_are_gone_with_their_context() -> None:
    linear, blocked = nn.Linear(16, 8), BlockedWeights()
    with blocked:
        linear(torch.randn(4, 16))
    (blocks,) = blocked._blocks.values()
    seen = weakref.ref(blocks)
    del blocked, blocks
    gc.collect()
    assert seen() is None


def test_blocks_are_counted_as_memory_with_what_kernels_keep_from_use() -> None:
    layer = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))
    assert blocked_bytes(layer, tokens=10, widest=16) == 16 * 8 * 4 + products._KERNELS * 10 * 16 * 4 // 2


@needs_onednn
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt_neox"])
def test_scores_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, model = make_problem(), build(FAMILIES[name])
    with counted(monkeypatch) as shapes:
        found = solve(engine_of(model, problem), problem)
    assert shapes
    monkeypatch.setattr(products, "available", lambda: False)
    with counted(monkeypatch) as shapes:
        expected = solve(engine_of(model, problem), problem)
    assert not shapes
    for measure in ("ablation", "steering", "kl"):
        torch.testing.assert_close(getattr(found.scores, measure), getattr(expected.scores, measure), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "reason", ["little memory", "few tokens", "AVX2", "GenuineIntel", "no Linux", "many kernels", "no number", "unset"]
)
def test_torch_multiplies_where_oneDNN_would_not_pay(
    reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problem, model = make_problem(), build(FAMILIES["llama"])
    if reason == "few tokens":
        monkeypatch.setattr("refusal_direction.engine.budget._BLOCKED_TOKENS", 1 << 20)
    elif reason == "AVX2":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: reason)
    elif reason == "GenuineIntel":
        describe_processors(monkeypatch, tmp_path, reason)
    elif reason == "no Linux":
        products._PROCESSORS.unlink()
    elif reason == "unset":
        monkeypatch.delenv(products._CAPACITIES[1])
    elif reason != "little memory":
        monkeypatch.setenv(products._CAPACITIES[0], "1024" if reason == "many kernels" else "few")
    engine = engine_of(model, problem)
    if reason == "little memory":
        roomy = 8 * max(blocked_bytes(layer, 16, engine.budget._widest) for layer in engine.stream.layers)
        monkeypatch.setattr("refusal_direction.engine.budget.free_bytes", lambda device: roomy - 1)
        engine.budget.reserve(0)
    with counted(monkeypatch) as shapes:
        solve(engine, problem)
    assert not shapes


def test_the_command_line_keeps_few_kernels_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(products._CAPACITIES[0])
    monkeypatch.setenv(products._CAPACITIES[1], "1024")
    assert cli.main(["inspect", str(tmp_path / "no model")]) == 2
    assert [os.environ[name] for name in products._CAPACITIES] == [str(products._KERNELS), "1024"]


ROUNDS = """
import torch
from torch import nn
from refusal_direction.engine.shortcuts import products as products
{first}
linear, inputs = nn.Linear(512, 2048), torch.randn(1200, 512)
with torch.no_grad(), products.BlockedWeights():
    for _ in range(3):
        for kernel in range(products._KERNELS + 1):
            linear(inputs[kernel:])
"""


@needs_onednn
@pytest.mark.parametrize(("first", "rounds_compiled"), [("", 1), ("products.keep_few_kernels()", 3)])
def test_few_kernels_are_kept(first: str, rounds_compiled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that comes back after eight others finds its kernel by default; where few are kept it is compiled again."""
    for name in products._CAPACITIES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ONEDNN_VERBOSE", "profile_create")
    run = subprocess.run([sys.executable, "-c", ROUNDS.format(first=first)], capture_output=True, text=True, check=True)
    compiled = [line for line in run.stdout.splitlines() if "create:cache_miss" in line and "inner_product" in line]
    assert len(compiled) == rounds_compiled * (products._KERNELS + 1)
