"""How far off hooks on attention and MLP modules are where a norm stands between module and residual stream.

    python benchmarks/writes.py

For tiny random models of each family a random direction is ablated twice: at the module outputs, as published code does,
and at the true residual writes. Shown are the largest share |x . u| / |x| left at a layer's output, and the largest
difference of the last logits between the two ways, relative to the largest logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from refusal_direction import ablated
from refusal_direction.directions import ablate, residual_component, unit
from refusal_direction.engine.interventions import residual_stream
from refusal_direction.engine.skeleton import hidden_states_of

SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "gemma", "gemma2", "gemma3_text", "olmo2", "glm4", "paligemma")


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "paligemma":
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
        }
        vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32}
        text = CONFIG_MAPPING["gemma2"](**SIZES).to_dict()
        config = CONFIG_MAPPING["paligemma"](
            vision_config=vision, text_config=text, image_token_index=159, projection_dim=32
        )
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES))
    for weight in model.parameters():  # writes of the size of the stream, norms that are not one
        torch.nn.init.normal_(weight, std=0.5 / weight.shape[-1] ** 0.5) if weight.ndim > 1 else weight.data.add_(
            0.3 * torch.randn_like(weight)
        )
    return model.eval()


@contextmanager
def at_modules(model: PreTrainedModel, u: Tensor) -> Iterator[None]:
    """The published way: every layer's input, and the outputs of attention and MLP."""

    def on_input(module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (ablate(args[0], u), *args[1:])

    def on_output(module: object, args: object, output: object) -> object:
        changed = ablate(hidden_states_of(output), u)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with ExitStack() as hooks:
        for layer in residual_stream(model).layers:
            hooks.callback(layer.register_forward_pre_hook(on_input).remove)
            for part in (layer.self_attn, layer.mlp):
                hooks.callback(part.register_forward_hook(on_output).remove)
        yield


@torch.no_grad()
def measured(model: PreTrainedModel, u: Tensor, ids: Tensor) -> tuple[Tensor, float]:
    """The last logits, and the largest share of the stream along u at a layer's output."""
    shares: list[float] = []

    def see(module: object, args: object, output: object) -> None:
        shares.append(residual_component(hidden_states_of(output), u.expand(len(ids), -1)))

    with ExitStack() as hooks:
        for layer in residual_stream(model).layers:
            hooks.callback(layer.register_forward_hook(see).remove)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
    return logits, max(shares)


def main() -> None:
    print(f"{'family':12s} {'left, modules':>14s} {'left, writes':>13s} {'logits differ by':>17s}   writes")
    for family in FAMILIES:
        model = tiny(family)
        ids = torch.randint(3, 150, (16, 12), generator=torch.Generator().manual_seed(1))
        u = unit(torch.randn(32, generator=torch.Generator().manual_seed(2)))
        sites = ", ".join(site.module for site in residual_stream(model).writes[0])
        with at_modules(model, u):
            theirs, left = measured(model, u, ids)
        with ablated(model, u):
            ours, kept = measured(model, u, ids)
        differ = float((ours - theirs).abs().max() / ours.abs().max())
        print(f"{family:12s} {left:14.1e} {kept:13.1e} {differ:17.1e}   {sites}")


if __name__ == "__main__":
    main()
