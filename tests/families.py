"""Tiny random models of many families, with what a person knows about each: where it writes into the residual stream.

Their weights are not as initialised: every write is about as large as the stream, norms are not 1, biases are not 0, so that
a missed write, a skipped norm or a wrong row shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 160
D_MODEL = 32
N_LAYERS = 4

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ALTERNATING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}


@dataclass(frozen=True)
class Family:
    """One architecture at its smallest, and the truth about it, written by hand from its source."""

    model_type: str
    writes: tuple[str, ...]
    """The submodules of a layer whose outputs are added to the stream, in that order."""
    config: dict[str, Any] = field(default_factory=dict)
    """In addition to, or instead of, the common sizes."""
    sizes: dict[str, Any] = field(default_factory=lambda: _SIZES)
    layers: str = "model.layers"
    needs_position_ids: bool = False
    """Whether a left-padded batch is only right with explicit position ids (learned absolute positions)."""


_ATTENTION_AND_MLP = ("self_attn", "mlp")
_NORMS_OF_BOTH = ("post_attention_layernorm", "post_feedforward_layernorm")

FAMILIES = {
    "llama": Family("llama", _ATTENTION_AND_MLP, {"attention_bias": True, "mlp_bias": True}),
    "gemma": Family("gemma", _ATTENTION_AND_MLP),
    "gemma2": Family("gemma2", _NORMS_OF_BOTH, {**_ALTERNATING, "query_pre_attn_scalar": 8}),
    "qwen2": Family("qwen2", _ATTENTION_AND_MLP),
    "phi": Family("phi", _ATTENTION_AND_MLP),
    "gpt_neox": Family("gpt_neox", ("attention", "mlp"), layers="gpt_neox.layers"),
    "olmo2": Family("olmo2", _NORMS_OF_BOTH),
    "mixtral": Family("mixtral", _ATTENTION_AND_MLP, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon": Family(
        "falcon",
        ("self_attention", "mlp"),
        {**_SPECIAL_TOKENS, "alibi": False, "new_decoder_architecture": False, "bias": True},
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4},
        layers="transformer.h",
    ),
    "granite": Family(
        "granite",
        _ATTENTION_AND_MLP,
        {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.3},
    ),
    "gemma3": Family("gemma3_text", _NORMS_OF_BOTH, {**_ALTERNATING, "query_pre_attn_scalar": 8}),
    "glm4": Family("glm4", ("post_self_attn_layernorm", "post_mlp_layernorm")),
    "gpt2": Family(
        "gpt2",
        ("attn", "mlp"),
        _SPECIAL_TOKENS,
        _GPT2_SIZES,
        layers="transformer.h",
        needs_position_ids=True,
    ),
    "opt": Family(
        "opt", ("self_attn", "fc2"), {"ffn_dim": 48, "word_embed_proj_dim": D_MODEL}, layers="model.decoder.layers"
    ),
    # the attention and MLP modules of Bloom add the stream to their outputs themselves
    "bloom": Family(
        "bloom",
        ("self_attention.dense", "mlp.dense_4h_to_h"),
        {**_SPECIAL_TOKENS, "n_layer": N_LAYERS, "n_head": 4},
        {"vocab_size": VOCAB, "hidden_size": D_MODEL},
        layers="transformer.h",
    ),
}
"""Families that run layer-major."""

SHARING_FAMILY = Family(
    "gemma4_text",
    (*_NORMS_OF_BOTH, "post_per_layer_input_norm"),
    {
        **_ALTERNATING,
        "num_kv_shared_layers": 2,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCAB,
    },
)
"""A family whose upper layers reuse the keys and values of lower ones, so that rows cannot go layer by layer."""


def build(family: Family, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the family with random, non-degenerate weights, in evaluation mode."""
    config = AutoConfig.for_model(family.model_type, **{**family.sizes, **family.config})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:  # norms and biases
                weight += 0.3 * noise
            else:
                weight.copy_(0.5 * noise if "emb" in name or "wte" in name else 1.5 * noise / weight.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.8)
    return model.eval().to(dtype)


def layers_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The decoder layers, by their name."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers
