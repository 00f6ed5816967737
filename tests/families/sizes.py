"""How small every configuration is made: each field that a family's configuration knows gets its size from one list."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

__all__ = ["D_MODEL", "N_LAYERS", "VOCAB", "is_installed", "small", "sizes_for"]

VOCAB = 160
D_MODEL = 32
N_LAYERS = 4

_HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
}
_EXPERTS = {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_RECURRENCE = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
}
_DECODER_OF_A_PAIR = {
    "d_model": D_MODEL,
    "ffn_dim": 48,
    "decoder_layers": N_LAYERS,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "attention_heads": 4,
    "num_layers": N_LAYERS,
}
_NO_DROPOUT = dict.fromkeys(
    ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
    0.0,
)
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "max_position_embeddings": 128,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_HEADS,
    **_EXPERTS,
    **_RECURRENCE,
    **_DECODER_OF_A_PAIR,
    **_NO_DROPOUT,
}


def is_installed(model_type: str) -> bool:
    """Whether this version of transformers has the model type."""
    return model_type in CONFIG_MAPPING


def sizes_for(model_type: str) -> dict[str, Any]:
    """The sizes, under the names that the type's configuration has for them."""
    config_class = CONFIG_MAPPING[model_type]
    if dataclasses.is_dataclass(config_class):
        known = {field.name for field in dataclasses.fields(config_class)}
    else:
        known = set(inspect.signature(config_class.__init__).parameters)
    renamed = {config_class.attribute_map.get(name, name): size for name, size in _SIZES.items()}
    return {name: size for name, size in {**renamed, **_SIZES}.items() if name in known}


def small(model_type: str, **chosen: Any) -> PretrainedConfig:
    """A small configuration of the type; what is `chosen` goes over the list."""
    return CONFIG_MAPPING[model_type](**{**sizes_for(model_type), **chosen})
