"""The structural search finds the writes that a person reads in each family's source, and refuses to guess."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.errors import UnsupportedModelError
from refusal_direction.models.layers import find_layers
from refusal_direction.models.writes import WriteSite, find_writes, kind_of
from tests.families import D_MODEL, FAMILIES, N_LAYERS, SHARING_FAMILY, Family, build, layers_of

all_families = pytest.mark.parametrize("family", [*FAMILIES.values(), SHARING_FAMILY], ids=[*FAMILIES, "gemma4"])
HIDDEN = torch.randn(2, 6, D_MODEL, generator=torch.Generator().manual_seed(0))


def _found(family: Family, dtype: torch.dtype = torch.float32) -> list[tuple[str, ...]]:
    stream = ResidualStream(build(family, dtype=dtype))
    return [tuple(site.module for site in writes) for writes in stream.writes]


@all_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_finder_returns_the_hand_written_truth(family: Family, dtype: torch.dtype) -> None:
    """Where the last submodule of the truth hands its output on unchanged, the finder may name that one."""
    found = _found(family, dtype)
    assert len(found) == N_LAYERS
    for writes in found:
        assert len(writes) == len(family.writes)
        for name, truth in zip(writes, family.writes, strict=True):
            assert name == truth or name.startswith(f"{truth}.")


@all_families
def test_what_is_found_puts_out_what_the_truth_puts_out(family: Family) -> None:
    model = build(family)
    found = _found(family)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            output = output[0] if isinstance(output, tuple) else output
            outputs[name] = output.detach().clone().flatten(0, -2)  # before Falcon adds into it

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(layers_of(model, family)):
            for name in {*found[index], *family.writes}:
                hooks.callback(layer.get_submodule(name).register_forward_hook(keep(f"{index}.{name}")).remove)
        model(torch.arange(12, 24).view(2, 6), use_cache=False)
    for index, writes in enumerate(found):
        for name, truth in zip(writes, family.writes, strict=True):
            assert torch.equal(outputs[f"{index}.{name}"], outputs[f"{index}.{truth}"])


@all_families
def test_layers_are_found_by_structure(family: Family) -> None:
    model = build(family)
    assert find_layers(model) is layers_of(model, family)


def test_nested_and_shorter_stacks_are_not_taken_for_the_layers() -> None:
    model, others = build(FAMILIES["llama"]), build(FAMILIES["llama"], seed=1).get_decoder().layers
    decoder = model.get_decoder()
    decoder.few = nn.ModuleList(others[:2])
    decoder.layers[0].nested = nn.ModuleList([*others, *others])
    assert find_layers(model) is decoder.layers


def test_model_without_a_stack_of_layers_is_refused() -> None:
    model = build(FAMILIES["llama"])
    model.get_decoder().layers = nn.ModuleList([nn.Linear(D_MODEL, D_MODEL)])
    with pytest.raises(UnsupportedModelError, match="No stack of decoder layers"):
        find_layers(model)


class Layer(nn.Module):
    """A residual layer with two writes, one of them scaled, and a reading norm whose name suggests a write."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(D_MODEL, D_MODEL)
        self.post_attention_layernorm = nn.LayerNorm(D_MODEL)
        self.mlp = nn.Sequential(nn.Linear(D_MODEL, D_MODEL), nn.GELU(), nn.Linear(D_MODEL, D_MODEL))
        self.norm = nn.LayerNorm(D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return 0.8 * (x + 0.3 * self.mlp(self.post_attention_layernorm(x)))


class PostNormLayer(Layer):
    """Normalises the stream itself, as BERT and the first transformer do."""

    def __init__(self) -> None:
        super().__init__()
        self.second_norm = nn.RMSNorm(D_MODEL)
        nn.init.normal_(self.second_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x))
        return self.second_norm(0.5 * x + 2 * self.mlp(x))


class NormedLayer(PostNormLayer):
    """Normalises the stream before it adds to it, as MiniMax does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = 3 * x + self.attention(x)
        return self.second_norm(x) + self.mlp(x)


class MixingLayer(PostNormLayer):
    """What stands on the stream is no norm: inside it the direction could come back unseen."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(x))


class FunctionalLayer(Layer):
    """What it adds is no submodule's output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.attention(x))


class TupleModule(nn.Module):
    """Puts out its write second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(1), 2 * self.inner(x)


class TupleLayer(Layer):
    """Adds the second element of a submodule's output."""

    def __init__(self) -> None:
        super().__init__()
        self.both = TupleModule()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.both(x)[1].clamp(-9, 9)


class GatedLayer(Layer):
    """Adds a submodule's output times a learned gate for each coordinate: not a scalar multiple of any output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(0.1, 2, D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.attention(x)


class ReusingLayer(Layer):
    """Adds the output of one submodule that it calls twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.attention(x)


@torch.no_grad()
def _writes(layer: nn.Module) -> tuple[WriteSite, ...]:
    return find_writes(layer, layer, HIDDEN)


def test_scaled_writes_and_a_scaled_stream_are_found() -> None:
    assert [site.module for site in _writes(Layer())] == ["attention", "mlp.2"]


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-5])
def test_write_that_is_small_beside_the_others_is_not_left_out(share: float) -> None:
    layer = Layer()
    with torch.no_grad():
        layer.mlp[2].weight *= share
        layer.mlp[2].bias *= share
    assert [site.module for site in _writes(layer)] == ["attention", "mlp.2"]


@pytest.mark.parametrize("silent", [("attention",), ("mlp.2",), ("attention", "mlp.2")])
def test_write_that_is_nothing_in_this_layer_is_found(silent: tuple[str, ...]) -> None:
    """Added blocks start so, and pruned ones end so; another layer of the same kind writes there."""
    layer = Layer()
    for name in silent:
        for weight in layer.get_submodule(name).parameters():
            nn.init.zeros_(weight)
    assert [site.module for site in _writes(layer)] == ["attention", "mlp.2"]
    assert all(not weight.any() for name in silent for weight in layer.get_submodule(name).parameters())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_layers_that_write_nothing_do_not_hide_the_writes_of_others(name: str) -> None:
    expected = ResidualStream(build(FAMILIES[name])).writes
    model = build(FAMILIES[name])
    first = model.model.layers[0]
    nn.init.zeros_(first.self_attn.o_proj.weight)
    nn.init.zeros_(first.mlp.down_proj.weight)
    assert ResidualStream(model).writes == expected


@pytest.mark.parametrize("layer", [MixingLayer, FunctionalLayer, GatedLayer, ReusingLayer])
def test_layer_that_does_more_than_add_outputs_is_refused(layer: type[nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError, match="residual writes of .* were not found"):
        _writes(layer())


@pytest.mark.parametrize("affine", [True, False])
def test_norms_on_the_stream_are_writes(affine: bool) -> None:
    post, normed = PostNormLayer(), NormedLayer()
    if not affine:
        post.norm = normed.norm = nn.LayerNorm(D_MODEL, elementwise_affine=False)
    assert [site.module for site in _writes(post)] == ["attention", "norm", "mlp.2", "second_norm"]
    assert [site.module for site in _writes(normed)] == ["norm", "attention", "second_norm", "mlp.2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = build(FAMILIES["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(
        UnsupportedModelError, match="output of LlamaDecoderLayer is not finite.*Download them"
    ) as error:
        ResidualStream(model)
    assert "--dtype" not in str(error.value)  # it is float32 already


def test_dropout_in_training_is_refused_with_the_remedy() -> None:
    class WithDropout(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.dropout(self.attention(x), 0.5, self.training)

    layer = WithDropout()
    with pytest.raises(UnsupportedModelError, match=re.escape("call model.eval()")):
        _writes(layer)
    assert [site.module for site in _writes(layer.eval())] == ["attention"]


def test_layers_with_other_weights_are_of_another_kind() -> None:
    """GPT-NeoX Japanese adds a bias in its last layer, by a weight and not by a submodule."""
    plain, biased = Layer(), Layer()
    assert kind_of(plain) == kind_of(biased)
    biased.attention.register_parameter("added", nn.Parameter(torch.ones(D_MODEL)))
    assert kind_of(plain) != kind_of(biased)


def test_write_in_a_tuple_is_found_with_its_place() -> None:
    """TupleModule's second output is twice inner's, so either names the write; they are the same direction."""
    (site,) = _writes(TupleLayer())
    assert site in (WriteSite("both", 1), WriteSite("both.inner"))


def test_finder_leaves_the_layer_and_its_input_as_they_were() -> None:
    layer, before = Layer(), HIDDEN.clone()
    _writes(layer)
    assert torch.equal(HIDDEN, before)
    assert all(not module._forward_hooks for module in layer.modules())
    with pytest.raises(UnsupportedModelError):
        _writes(broken := FunctionalLayer())
    assert all(not module._forward_hooks for module in broken.modules())


@pytest.mark.parametrize(("name", "scale"), [("llama", 0.01), ("llama", 0.001), ("gemma2", 0.1), ("gemma2", 0.03)])
def test_a_small_write_is_found_in_half_precision_too(name: str, scale: float) -> None:
    """In bfloat16 it would drown in the rounding of the other write."""
    model = build(FAMILIES[name])
    for layer in model.model.layers:
        source = layer.self_attn.o_proj if name == "llama" else layer.post_attention_layernorm
        source.weight.data = (scale * (1 + source.weight.data) - 1) if name == "gemma2" else scale * source.weight.data
    exact = ResidualStream(model).writes
    half = model.to(torch.bfloat16)
    assert ResidualStream(half).writes == exact
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
