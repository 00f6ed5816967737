"""A small trained model made wide without changing what it computes, so that arithmetic dominates and structure stays.

Every weight of the decoder stands in the corner of a larger one whose other elements are zero: more channels, more heads of
the same size, more hidden units, which carry nothing. Norms average over more channels, most of them zero; their weights
and epsilon make up for it, as does the embedding for the factor that Gemma puts on it. A random model of that size would
have no refusal to find, and nothing to prune.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["widened"]

_Model = TypeVar("_Model", bound=PreTrainedModel)


def widened(model: _Model, *, times: int) -> _Model:
    """The same function with a decoder of so many times the width, for Gemma, Gemma 2 and PaliGemma.

    The output head is no longer tied to the embedding.
    """
    config = deepcopy(model.config)
    text = config.get_text_config()
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(text, name, times * getattr(text, name))
    text.rms_norm_eps /= times
    config.tie_word_embeddings = text.tie_word_embeddings = False
    if hasattr(config, "vision_config"):
        config.projection_dim = config.vision_config.projection_dim = config.hidden_size = text.hidden_size
    wide = type(model)(config).to(model.dtype).eval()
    weights = model.state_dict()
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(_in_the_corner(name, weights[name], parameter.shape, times))
    return wide


def _in_the_corner(name: str, small: Tensor, shape: torch.Size, times: int) -> Tensor:
    if "vision_tower" in name:
        return small
    if "norm" in name:  # they scale by 1 + weight
        small = (1 + small) / times**0.5 - 1
    elif "embed_tokens" in name:
        small = small / times**0.5
    large = torch.zeros(shape, dtype=small.dtype)
    large[tuple(slice(size) for size in small.shape)] = small
    return large
