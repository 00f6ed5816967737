"""A model whose residual stream does not run once through its layers is refused, and the error says what it does instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from refusal_direction.engine.interventions import ResidualStream, ablated
from refusal_direction.engine.skeleton import Skeleton, replaced_forwards
from refusal_direction.errors import UnsupportedModelError
from refusal_direction.models.layers import other_blocks
from tests.families import D_MODEL, FAMILIES, TEXT_FAMILIES, build
from tests.problems import engine_of, make_problem, solve

Forward = Callable[..., Any]


@pytest.fixture
def llama() -> PreTrainedModel:
    return build(FAMILIES["llama"])


def around_norm(model: PreTrainedModel, extra: Forward) -> None:
    """Let the model do something with the stream after its layers."""
    own = model.model.norm.forward
    model.model.norm.forward = lambda hidden: own(extra(hidden))


def refusal(model: PreTrainedModel) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        ResidualStream(model)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return str(caught.value)


def test_layers_that_run_again_are_refused(llama: PreTrainedModel) -> None:
    first = llama.model.layers[0]
    around_norm(llama, lambda hidden: first(hidden, position_embeddings=(torch.ones(1), torch.ones(1))))
    assert "runs layer 0 again" in refusal(llama)


def test_layers_that_do_not_run_are_refused(llama: PreTrainedModel) -> None:
    llama.config.num_hidden_layers = 3
    assert "does not run layer 3 on text alone" in refusal(llama)


def test_blocks_beside_the_layers_are_refused(llama: PreTrainedModel) -> None:
    more = build(FAMILIES["llama"]).model.layers[0]
    llama.model.more = nn.ModuleList([more])
    assert [type(block).__name__ for block in other_blocks(llama, llama.model.layers)] == ["LlamaDecoderLayer"]
    around_norm(llama, lambda hidden: hidden + 0 * more.mlp(hidden))
    ResidualStream(llama)  # a part of a block is none
    around_norm(llama, lambda hidden: more(hidden, position_embeddings=(torch.ones(1), torch.ones(1))))
    assert "also runs through LlamaDecoderLayer" in refusal(llama)


def test_several_streams_are_refused_with_their_shape(llama: PreTrainedModel) -> None:
    own = llama.model.embed_tokens.forward

    def doubled(ids: Tensor) -> Tensor:
        return torch.cat([own(ids), own(ids)], dim=1)

    llama.model.embed_tokens.forward = doubled
    assert "in the shape (1, 24, 32)" in refusal(llama)


def test_a_model_that_transformers_itself_cannot_run_is_explained(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama 4 with images in transformers 5.24, which looks for an output that is not there."""

    def broken(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs).image_outputs

    original = type(llama).forward
    monkeypatch.setattr(type(llama), "forward", broken)
    explanation = refusal(llama)
    assert explanation.startswith(f"LlamaForCausalLM does not run in transformers {transformers.__version__}")
    assert "image_outputs" in explanation


def test_an_error_of_the_engine_is_not_blamed_on_the_model(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Skeleton, "tail", lambda *args: None.missing)
    with pytest.raises(AttributeError, match="missing"):
        ResidualStream(llama)


def test_training_mode_is_refused_where_dropout_is_at_work() -> None:
    model = build(TEXT_FAMILIES["opt"]).train()
    with ablated(model, torch.ones(D_MODEL)):  # its dropout is 0
        pass
    for layer in model.model.decoder.layers:
        layer.dropout = 0.1
    model.eval()
    with ablated(model, torch.ones(D_MODEL)):
        pass
    model.train()
    with pytest.raises(UnsupportedModelError, match="training mode"), ablated(model, torch.ones(D_MODEL)):
        pass


def test_a_layer_that_stands_at_two_places_is_refused_and_the_model_goes_on_running(llama: PreTrainedModel) -> None:
    layers = list(llama.model.layers)
    llama.model.layers = nn.ModuleList([*layers[:2], layers[1], *layers[2:]])
    llama.config.num_hidden_layers += 1
    ids = torch.arange(5, 9).unsqueeze(0)
    with torch.no_grad():
        before = llama(ids, use_cache=False).logits
        assert "one layer occurs several times in the stack" in refusal(llama)
        with replaced_forwards(llama.model.layers, lambda index, own: own):
            pass
        assert torch.equal(llama(ids, use_cache=False).logits, before)


def test_a_configuration_class_that_asks_for_more_stays_as_it_is(llama: PreTrainedModel) -> None:
    """As code that comes with a model may have it."""
    llama.config.__class__ = type("Chatty", (type(llama.config),), {"output_router_logits": True})
    before = dict(vars(llama.config))
    ResidualStream(llama)
    assert vars(llama.config) == before
    assert llama.config.output_router_logits is True


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("mixtral", "output_router_logits", True),
        ("llama", "output_hidden_states", True),
        ("llama", "output_attentions", True),
        ("falcon", "return_dict", False),
    ],
)
def test_what_a_model_is_configured_to_put_out_besides_its_logits_does_not_matter(
    name: str, flag: str, value: bool
) -> None:
    problem, model = make_problem(), build(FAMILIES[name])
    expected = solve(engine_of(model, problem), problem)
    model = build(FAMILIES[name])
    model.set_attn_implementation("eager")  # attentions come from nothing else
    setattr(model.config, flag, value)
    before, asked = dict(vars(model.config)), []
    hook = model.register_forward_pre_hook(lambda module, args: asked.append(getattr(module.config, flag)))
    answer = solve(engine_of(model, problem), problem)
    hook.remove()
    assert answer.engine.name == expected.engine.name == "layer-major"
    assert (answer.scores.ablation - expected.scores.ablation).abs().max() < 1e-4
    assert (answer.scores.kl - expected.scores.kl).abs().max() < 1e-4
    assert set(asked) == {not value}  # so that nothing more is kept
    assert vars(model.config) == before
    with torch.no_grad(), ablated(model, torch.randn(D_MODEL)):
        model(torch.arange(5, 9).unsqueeze(0))
