"""Decoders of latent or linear attention, state spaces, convolutions, and several of these."""

from __future__ import annotations

from tests.families.building import Family
from tests.families.sizes import D_MODEL
from tests.families.tables import words

__all__ = ["HYBRID"]

_ALL_HEADS = {"num_key_value_heads": 4}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}

_LATENT_ATTENTION = {
    "axk1": Family("axk1", _ALL_HEADS, notable=f"{words.LATENT}; {words.EXPERTS}"),
    "axk2": Family("axk2", _ALL_HEADS, notable=f"{words.LATENT}; {words.EXPERTS}"),
    "bailing_hybrid": Family("bailing_hybrid", notable=f"{words.LINEAR}; {words.EXPERTS}"),
    "deepseek_v2": Family("deepseek_v2", _ALL_HEADS, notable=f"{words.LATENT}; {words.EXPERTS}"),
    "deepseek_v3": Family("deepseek_v3", _ALL_HEADS, notable=f"{words.LATENT}; {words.EXPERTS}"),
    "deepseek_v32": Family("deepseek_v32", _ALL_HEADS, notable=f"sparse {words.LATENT}; {words.EXPERTS}"),
    "deepseek_v4": Family("deepseek_v4", notable="hyper-connections", refused=words.SEVERAL_STREAMS),
    "dots3_note_text": Family(
        "dots3_note_text",
        {
            **_ALL_HEADS,
            "layer_types": ["full_attention"] * 4,
            "index_topk": 4,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "shared_experts_intermediate_size": 24,
        },
        notable=f"sparse {words.LATENT}; {words.EXPERTS}",
    ),
    "glm4_moe_lite": Family("glm4_moe_lite", _ALL_HEADS, notable=f"{words.LATENT}; {words.EXPERTS}"),
    "glm_moe_dsa": Family("glm_moe_dsa", _ALL_HEADS, notable=f"sparse {words.LATENT}; {words.EXPERTS}"),
    "longcat_flash": Family(
        "longcat_flash",
        {
            **_ALL_HEADS,
            "num_layers": 2,
            "moe_topk": 2,
            "zero_expert_num": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
        },
        notable=f"two blocks a layer; {words.LATENT}; {words.EXPERTS}",
    ),
    "minicpm3": Family(
        "minicpm3",
        {**_ALL_HEADS, "dim_model_base": D_MODEL, "scale_emb": 2},
        notable=f"{words.LATENT}; {words.MULTIPLIER}",
    ),
    "sarvam_mla": Family("sarvam_mla", _ALL_HEADS, notable=f"{words.LATENT}; {words.EXPERTS}"),
    "youtu": Family("youtu", _ALL_HEADS, notable=words.LATENT),
}

_RECURRENT = {
    "bamba": Family("bamba", {**_MAMBA, "attn_layer_indices": [1, 3]}, notable=words.HYBRID),
    "falcon_h1": Family("falcon_h1", {**_MAMBA, "mamba_d_ssm": 64}, notable=f"{words.HYBRID} side by side"),
    "falcon_mamba": Family("falcon_mamba", layers="backbone.layers", notable=words.STATE_SPACE),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            **_MAMBA,
            "residual_multiplier": 0.22,
            "layer_types": ["mamba", "attention"] * 2,
            "shared_intermediate_size": 24,
        },
        notable=f"{words.HYBRID}; {words.EXPERTS}; {words.MULTIPLIER}",
    ),
    "inkling_text": Family(
        "inkling_text", {"logits_mup_width_multiplier": 1.0}, notable=f"{words.SLIDING}; short convolutions"
    ),
    "jamba": Family(
        "jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, notable=f"{words.HYBRID}; {words.EXPERTS}"
    ),
    "kimi_linear": Family(
        "kimi_linear",
        {
            **_ALL_HEADS,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "n_group": 1,
        },
        notable=f"{words.LINEAR}; {words.EXPERTS}",
    ),
    "lara_mini": Family("lara_mini", notable=f"{words.LINEAR}; {words.EXPERTS}"),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, notable=words.CONVOLUTIONS),
    "lfm2_moe": Family(
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
        notable=f"{words.CONVOLUTIONS}; {words.EXPERTS}",
    ),
    "lfm3": Family("lfm3", notable=f"{words.CONVOLUTIONS}; {words.NORMS_AFTER}"),
    "mamba": Family("mamba", layers="backbone.layers", notable=words.STATE_SPACE, scale=1.0),
    "mamba2": Family(
        "mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
        layers="backbone.layers",
        notable=words.STATE_SPACE,
    ),
    "minimax": Family(
        "minimax",
        norms=("input_layernorm", "post_attention_layernorm"),
        notable=f"{words.LINEAR}; {words.EXPERTS}; {words.NORMED_STREAM}",
    ),
    "nemotron_h": Family(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "moe_shared_expert_intermediate_size": 24,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
        notable=f"a state space, attention, {words.EXPERTS} or an MLP a layer",
    ),
    "olmo_hybrid": Family("olmo_hybrid", notable=f"{words.LINEAR}, with norms after the full one"),
    "qwen3_5_moe_text": Family("qwen3_5_moe_text", notable=f"{words.LINEAR}; {words.EXPERTS}", scale=1.0),
    "qwen3_5_text": Family("qwen3_5_text", notable=words.LINEAR),
    "qwen3_next": Family("qwen3_next", notable=f"{words.LINEAR}; {words.EXPERTS}"),
    "recurrent_gemma": Family("recurrent_gemma", notable="recurrent and sliding attention layers"),
    "rwkv": Family("rwkv", layers="rwkv.blocks", norms=("pre_ln",), notable=f"recurrent; {words.NORMED_STREAM}"),
    "xlstm": Family("xlstm", layers="backbone.blocks", notable="recurrent"),
    "zamba": Family(
        "zamba",
        {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_dt_rank": 4, **_ALL_HEADS},
        notable=f"{words.STATE_SPACE}, some fed by shared attention",
        scale=1.0,
    ),
    "zamba2": Family(
        "zamba2",
        {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4, "chunk_size": 8, **_ALL_HEADS},
        notable=f"{words.STATE_SPACE}, some fed by shared attention",
        scale=1.0,
    ),
}

HYBRID: dict[str, Family] = {**_LATENT_ATTENTION, **_RECURRENT}
