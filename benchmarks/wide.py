"""A small trained model made wide without changing what it computes, so that arithmetic dominates and structure stays.

Every weight of the decoder stands in the corner of a larger one whose other elements are zero: more channels, more heads of
the same size, more hidden units, which carry nothing. Norms average over more channels, most of them zero; their weights
and epsilon make up for it, as does the embedding for the factor that Gemma puts on it. A random model of that size would
have no refusal to find, and nothing to prune.

A vision tower is made wide by repeating its channels, since its norms subtract their mean. More words are words that are
never said: one of the new channels holds a constant too small for any norm to notice, and their logits are far below zero by it.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["widened"]

_Model = TypeVar("_Model", bound=PreTrainedModel)

_CONSTANT, _LOUDER = 1e-4, 1e8  # what the channel of the unsaid words holds, and how much the final norm makes of it
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def widened(model: _Model, *, times: int, tower: int = 1, words: int = 1) -> _Model:
    """The same function with a decoder of so many times the width, for Gemma, Gemma 2 and PaliGemma.

    The output head is no longer tied to the embedding.

    Args:
        model: the small one.
        times: how many times as wide the decoder becomes.
        tower: likewise the vision tower.
        words: how many times as many tokens the vocabulary has.
    """
    config = deepcopy(model.config)
    text = config.get_text_config()
    said = text.vocab_size
    _multiply(text, times)
    text.rms_norm_eps /= times
    text.vocab_size *= words
    config.tie_word_embeddings = text.tie_word_embeddings = False
    if hasattr(config, "vision_config"):
        _multiply(config.vision_config, tower)
        config.projection_dim = config.vision_config.projection_dim = config.hidden_size = text.hidden_size
    wide = type(model)(config).to(model.dtype).eval()
    weights = model.state_dict()
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            small = weights[name]
            if "vision_tower" in name:
                parameter.copy_(_repeated(small, parameter.shape))
                continue
            if "projector" in name and small.ndim == 2:
                small = small.repeat(1, tower) / tower
            parameter.copy_(_in_the_corner(name, small, parameter.shape, times))
        if words > 1:
            _leave_unsaid(wide, said)
    return wide


def _multiply(config: Any, times: int) -> None:
    for name in _WIDTHS:
        if hasattr(config, name):
            setattr(config, name, times * getattr(config, name))


def _repeated(small: Tensor, shape: torch.Size) -> Tensor:
    """Each channel so many times; a matrix sums over them, so its elements are smaller by as much."""
    times = [wide // narrow for wide, narrow in zip(shape, small.shape, strict=True)]
    all_sum = times[1] if len(times) == 2 and times[0] > 1 else 1  # a position embedding has no more rows
    return small.repeat(times) / all_sum


def _in_the_corner(name: str, small: Tensor, shape: torch.Size, times: int) -> Tensor:
    if "norm" in name:  # they scale by 1 + weight
        small = (1 + small) / times**0.5 - 1
    elif "embed_tokens" in name:
        small = small / times**0.5
    large = torch.zeros(shape, dtype=small.dtype)
    large[tuple(slice(size) for size in small.shape)] = small
    return large


def _leave_unsaid(model: PreTrainedModel, said: int) -> None:
    """Give the words after those that are `said` a logit that no temperature brings back."""
    decoder = model.get_decoder()
    model.get_input_embeddings().weight[:, -1] = _CONSTANT
    decoder.norm.weight[-1] = _LOUDER
    model.get_output_embeddings().weight[said:, -1] = -1.0
