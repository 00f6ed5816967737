"""In the last layer only the last token goes through the MLP, where that changes nothing."""

import pytest
import torch

from refusal_direction.engine.interventions import ResidualStream
from tests.families import FAMILIES, build


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "bloom", "mixtral"])
def test_the_mlp_of_the_last_layer_may_see_the_last_token_alone(name: str):
    model = build(FAMILIES[name])
    stream = ResidualStream(model)
    last = stream.layers[-1]
    assert stream.token_wise is (last.mlp if hasattr(last, "mlp") else last.block_sparse_moe)


def test_attention_may_not(monkeypatch: pytest.MonkeyPatch):
    """Even as the largest child: it needs the other tokens."""
    model = build(FAMILIES["llama"])
    layer = ResidualStream(model).layers[-1]
    monkeypatch.setattr(type(layer), "children", lambda self: iter([self.self_attn]))
    assert ResidualStream(model).token_wise is None


def test_a_layer_that_adds_in_place_keeps_all_its_tokens():
    assert ResidualStream(build(FAMILIES["falcon"])).token_wise is None


def test_no_hook_is_left_behind():
    model = build(FAMILIES["gemma2"])
    stream = ResidualStream(model)
    ids = torch.arange(3, 15).unsqueeze(0)
    before = model(input_ids=ids).logits
    with stream.last_token_only():
        inside = model(input_ids=ids).logits
    assert torch.allclose(inside[:, -1], before[:, -1], atol=1e-5)
    assert not torch.allclose(inside[:, 0], before[:, 0], atol=1e-3)
    assert torch.equal(model(input_ids=ids).logits, before)
