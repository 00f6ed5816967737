"""In the last layer only the last token goes through the MLP, where that changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from refusal_direction.engine.arguments import map_tensors
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.shortcuts.token_wise import token_wise_child
from refusal_direction.engine.skeleton import LayerCall
from tests.families import TEXT_FAMILIES, build
from tests.problems import as_inputs


def last_layer(name: str) -> tuple[nn.Module, LayerCall, torch.Tensor]:
    skeleton = ResidualStream(build(TEXT_FAMILIES[name])).skeleton
    prelude = skeleton.prelude(as_inputs(list(range(3, 15))))
    return skeleton.layers[-1], prelude.calls[-1], prelude.hidden


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "bloom", "mixtral"])
def test_the_mlp_may_see_the_last_token_alone(name: str) -> None:
    layer, call, hidden = last_layer(name)
    assert token_wise_child(layer, call, hidden) is (layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe)


def test_attention_may_not_even_as_the_largest_child(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, call, hidden = last_layer("llama")
    monkeypatch.setattr(type(layer), "children", lambda self: iter([self.self_attn]))
    assert token_wise_child(layer, call, hidden) is None


def test_a_layer_that_adds_in_place_keeps_all_its_tokens() -> None:
    assert token_wise_child(*last_layer("falcon")) is None


def test_an_mlp_that_looks_at_its_neighbours_keeps_all_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, call, hidden = last_layer("llama")
    own = layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda x: own(x + x.mean(1, keepdim=True)))
    found = token_wise_child(layer, call, hidden)
    assert found is not layer.mlp


@pytest.mark.parametrize("size", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("name", ["opt", "llama", "llama4_text"])
def test_no_large_channel_hides_that_attention_needs_its_tokens(name: str, size: float) -> None:
    """Beside it, in half precision, all that attention adds to the stream is within rounding."""
    layer, call, hidden = last_layer(name)
    layer, hidden = layer.bfloat16(), hidden.bfloat16()
    call = replace(call, **dict(zip(("args", "kwargs"), half((call.args, call.kwargs)), strict=True)))
    hidden[..., 3] += size
    found = token_wise_child(layer, call, hidden)
    assert found is (layer.mlp if name == "llama" else None)  # the others flatten what their MLP is given


def half(nest: Any) -> Any:
    return map_tensors(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor, nest)


def test_no_hook_is_left_behind_and_no_input_changed() -> None:
    layer, call, hidden = last_layer("gemma2")
    before = hidden.clone()
    token_wise_child(layer, call, hidden)
    assert torch.equal(hidden, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in layer.modules())
