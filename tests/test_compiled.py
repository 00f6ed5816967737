"""`ablated` and `steered` on models that are compiled, changed while in use, or looked at by several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier
from typing import Any

import pytest
import torch

from refusal_direction.engine.interventions import ablated, intervened, residual_stream, steered
from tests.families import FAMILIES, build
from tests.oracles import reference
from tests.problems import known
from tests.test_interventions import direction, logits, same


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("in place", marks=pytest.mark.extended),
        pytest.param("the stack's forward", marks=pytest.mark.extended),
        "a layer",
    ],
)
def test_compiled_code_is_passed_over(way: str) -> None:
    """torch.compile does not notice that hooks come and go."""
    model, r = build(FAMILIES["llama"]), direction()
    plain = logits(model)
    with ablated(model, r):
        ablation = logits(model)
    with steered(model, r, layer=1):
        steering = logits(model)
    if way == "in place":
        model.compile(backend="eager")
    elif way == "the stack's forward":
        model.model.forward = torch.compile(model.model.forward, backend="eager")
    else:
        model.model.layers[1].compile(backend="eager")
    assert same(logits(model), plain)  # compiled now
    with ablated(model, r):
        assert same(logits(model), ablation)
    with steered(model, r, layer=1):
        assert same(logits(model), steering)
    assert same(logits(model), plain)


def test_a_compiled_model_need_not_have_been_looked_at_before() -> None:
    model, r = build(FAMILIES["llama"]), direction()
    with ablated(deepcopy(model), r) as other:
        expected = logits(other)
    model.compile(backend="eager")
    logits(model)
    with ablated(model, r):
        assert same(logits(model), expected)


def test_a_compiled_wrapper_and_its_model_are_one() -> None:
    model, first, second = build(FAMILIES["llama"]), direction(0), direction(0) + direction(1)
    wrapper: Any = torch.compile(model, backend="eager")
    with ablated(model, first), ablated(model, second):
        expected = logits(model)
    with ablated(wrapper, first):
        assert intervened(model)
        with ablated(model, second):
            assert same(logits(wrapper), expected)


def test_compiled_code_is_used_again_once_the_last_context_has_ended() -> None:
    """Also where contexts of two models end in another order than by nesting, as on two threads."""
    traced: list[object] = []

    def backend(graph: Any, inputs: object) -> Any:
        traced.append(graph)
        return graph.forward

    twice = torch.compile(lambda x: 2 * x, backend=backend)
    one, other = (ablated(build(FAMILIES["llama"]), direction()) for _ in range(2))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    twice(torch.ones(2))
    assert not traced
    other.__exit__(None, None, None)
    twice(torch.ones(3))
    assert len(traced) == 1


def test_layers_that_are_replaced_within_a_context_are_an_error() -> None:
    model, r = build(FAMILIES["llama"]), direction()
    with ablated(model, r):
        model.model.layers[2] = deepcopy(model.model.layers[2])
        with pytest.raises(ValueError, match="layers were replaced"), ablated(model, r):
            pass


@pytest.mark.parametrize("whole", [True, False])
def test_layers_that_are_replaced_are_noticed(whole: bool) -> None:
    model, other, r = build(FAMILIES["llama"]), build(FAMILIES["llama"]), direction()
    with ablated(other, r):
        expected = logits(other)
    with ablated(model, r):
        pass
    if whole:
        model.model.layers = deepcopy(model.model.layers)
    else:
        model.model.layers[2] = deepcopy(model.model.layers[2])
    with ablated(model, r):
        assert same(logits(model), expected)


def test_several_threads_may_be_the_first_to_look_at_a_model() -> None:
    """One of them looks, and all find the same; no forward is left replaced, no hook behind."""
    model, r, ready = build(FAMILIES["llama"]), direction(), Barrier(4)
    plain = logits(model)
    with reference.ablated(known(model, FAMILIES["llama"]), r):
        expected = logits(model)

    def look(_: int) -> object:
        ready.wait()
        return residual_stream(model)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(look, range(4)))
    assert len({id(one) for one in found}) == 1
    with ablated(model, r):
        assert same(logits(model), expected)
    assert same(logits(model), plain)
