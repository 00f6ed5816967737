"""Decoder layers of any model, found by structure and not by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from refusal_direction.errors import UnsupportedModelError

__all__ = ["find_layers", "n_embeddings", "other_blocks", "unwrapped"]


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside of a wrapper of torch.compile or peft; a model without wrapper unchanged."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def n_embeddings(model: PreTrainedModel) -> int:
    """Number of tokens that the model knows. An adapter's wrapper of the embedding has its weight, but not its attributes."""
    return int(model.get_input_embeddings().weight.shape[0])


def _is_block(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether a module is a transformer block."""
    names = getattr(model, "_no_split_modules", None) or ()
    return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names


def other_blocks(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """Transformer blocks outside of the decoder layers, such as those of a vision tower."""
    inside = {id(module) for module in layers.modules()}
    return (module for module in model.modules() if id(module) not in inside and _is_block(module, model))


def _distinct(layers: nn.ModuleList, model: PreTrainedModel) -> nn.ModuleList:
    if len(set(layers)) < len(layers):
        raise UnsupportedModelError(
            f"In {type(model).__name__} one layer occurs several times in the stack, but a direction belongs to a layer that runs "
            "once. Put a copy of it (copy.deepcopy) at each place."
        )
    return layers


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, in order.

    They are the outermost, then longest, ModuleList with transformer blocks. The text decoder (`get_decoder`) is searched
    first, so that the layers of a vision tower are not mistaken for them.

    Raises UnsupportedModelError if there is no such list, or if a layer occurs in it twice.
    """
    for root in (model.get_decoder(), model):
        stacks = [
            (name.count("."), -len(module), module)
            for name, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and any(_is_block(member, model) for member in module)
        ]
        if stacks:
            return _distinct(min(stacks, key=lambda stack: stack[:2])[2], model)
    raise UnsupportedModelError(
        f"No stack of decoder layers was found in {type(model).__name__}. The method needs a transformer decoder from "
        "the transformers library; if this is one, please report it with the model's id."
    )
