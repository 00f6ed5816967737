"""Decoders of attention layers."""

from __future__ import annotations

from tests.families.building import Family
from tests.families.sizes import D_MODEL
from tests.families.tables import words

__all__ = ["ATTENTION"]

_ATTENTION_AND_MLP = ("self_attn", "mlp")
_NORMS_OF_BOTH = ("post_attention_layernorm", "post_feedforward_layernorm")
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "attention_multiplier": 0.3}
_SHARED_KEYS = {"num_kv_shared_layers": 2, "global_head_dim": 8, **_ALTERNATING}

_KNOWN = {
    "llama": Family("llama", {"attention_bias": True, "mlp_bias": True}, writes=_ATTENTION_AND_MLP),
    "gemma": Family("gemma", writes=_ATTENTION_AND_MLP),
    "gemma2": Family("gemma2", _ALTERNATING, notable=f"{words.SLIDING}; {words.NORMS_AFTER}", writes=_NORMS_OF_BOTH),
    "qwen2": Family("qwen2", writes=_ATTENTION_AND_MLP),
    "phi": Family("phi", notable=words.PARALLEL, writes=_ATTENTION_AND_MLP),
    "gpt_neox": Family(
        "gpt_neox", layers="gpt_neox.layers", notable=words.PARALLEL, writes=("attention", "mlp"), scale=1.5
    ),
    "olmo2": Family("olmo2", notable=words.NORMS_AFTER, writes=_NORMS_OF_BOTH),
    "mixtral": Family("mixtral", notable=words.EXPERTS, writes=_ATTENTION_AND_MLP),
    "falcon": Family(
        "falcon",
        {"alibi": False, "new_decoder_architecture": False, "bias": True},
        layers="transformer.h",
        notable=words.PARALLEL,
        writes=("self_attention", "mlp"),
    ),
    "granite": Family(
        "granite", {"residual_multiplier": 0.4, **_GRANITE}, notable=words.MULTIPLIER, writes=_ATTENTION_AND_MLP
    ),
    "gemma3_text": Family(
        "gemma3_text", _ALTERNATING, notable=f"{words.SLIDING}; {words.NORMS_AFTER}", writes=_NORMS_OF_BOTH
    ),
    "glm4": Family("glm4", notable=words.NORMS_AFTER, writes=("post_self_attn_layernorm", "post_mlp_layernorm")),
    "gpt2": Family("gpt2", layers="transformer.h", writes=("attn", "mlp"), needs_position_ids=True),
    "opt": Family("opt", {"word_embed_proj_dim": D_MODEL}, layers="model.decoder.layers", writes=("self_attn", "fc2")),
    # the attention and MLP modules of Bloom add the stream to their outputs themselves
    "bloom": Family("bloom", layers="transformer.h", writes=("self_attention.dense", "mlp.dense_4h_to_h")),
    "gemma4_text": Family(
        "gemma4_text",
        _SHARED_KEYS,
        notable=f"{words.SLIDING}; {words.SHARING}",
        writes=(*_NORMS_OF_BOTH, "post_per_layer_input_norm"),
    ),
}

_LIKE_LLAMA = (
    "apertus apertus1p5_text arcee bitnet cwm diffllama ernie4_5 exaone helium hunyuan_v1_dense internlm3 iquestcoder "
    "jais2 ministral ministral3 mistral moshi nanochat nemotron olmo persimmon phi3 qwen3 seed_oss smollm3 starcoder2 "
    "vaultgemma"
).split()

_MIXTURES = (
    "aria_text dots1 ernie4_5_moe exaone_moe flint glm4_moe granitemoeshared hunyuan_v1_moe hy_v3 jetmoe laguna mellum "
    "mimo_v2_flash minimax_m2 minimax_m3_vl_text olmoe phimoe qwen2_moe qwen3_moe sarvam_moe solar_open"
).split()

_DENSE = {
    "afmoe": Family("afmoe", notable=f"{words.EXPERTS}; {words.NORMS_AFTER}"),
    "beam": Family("beam", notable=f"{words.EXPERTS}; {words.NORMS_AFTER}"),
    "codegen": Family("codegen", {"rotary_dim": 4}, layers="transformer.h", notable=words.PARALLEL),
    "cohere": Family("cohere", {"logit_scale": 1.0}, notable=words.PARALLEL),
    "cohere2": Family("cohere2", {"logit_scale": 1.0, **_ALTERNATING}, notable=f"{words.SLIDING}; {words.PARALLEL}"),
    "cohere2_moe": Family("cohere2_moe", {"logit_scale": 1.0}, notable=f"{words.EXPERTS}; {words.PARALLEL}"),
    "cohere_compass_text": Family(
        "cohere_compass_text",
        {
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
                for kind in _ALTERNATING["layer_types"]
            },
            "logit_scale": 1.0,
            **_ALTERNATING,
        },
        notable=f"{words.SLIDING}; {words.PARALLEL}",
    ),
    "dbrx": Family(
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": D_MODEL},
        },
        layers="transformer.blocks",
        notable=words.EXPERTS,
    ),
    "exaone4": Family("exaone4", _ALTERNATING, notable=f"{words.SLIDING}; {words.NORMS_AFTER}"),
    "falcon (new)": Family(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        layers="transformer.h",
        notable=f"{words.PARALLEL}, a norm for each",
    ),
    "falcon (sequential)": Family("falcon", {"parallel_attn": False}, layers="transformer.h"),
    "flex_olmo": Family("flex_olmo", notable=f"{words.EXPERTS}; {words.NORMS_AFTER}"),
    "gemma4_text (experts)": Family(
        "gemma4_text",
        {
            **_SHARED_KEYS,
            "num_kv_shared_layers": 0,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
        },
        notable=f"{words.SLIDING}; {words.EXPERTS}",
    ),
    "gemma4_unified_text": Family("gemma4_unified_text", _SHARED_KEYS, notable=f"{words.SLIDING}; {words.SHARING}"),
    "glm": Family("glm"),
    "gpt-sw3": Family("gpt-sw3", layers="transformer.h"),
    "gpt_bigcode": Family("gpt_bigcode", layers="transformer.h"),
    "gpt_neo": Family(
        "gpt_neo",
        {"attention_types": [[["global", "local"], 2]], "window_size": 6},
        layers="transformer.h",
        notable="local and global attention",
    ),
    "gpt_neox_japanese": Family(
        "gpt_neox_japanese", layers="gpt_neox_japanese.layers", notable="adds a bias by itself", refused=words.NOT_FOUND
    ),
    "gpt_oss": Family("gpt_oss", notable=f"{words.EXPERTS}; {words.SLIDING}; attention sinks"),
    "gptj": Family("gptj", {"rotary_dim": 4}, layers="transformer.h", notable=words.PARALLEL),
    "granite_swa": Family("granite_swa", {"residual_multiplier": 0.4}, notable=f"{words.SLIDING}; {words.MULTIPLIER}"),
    "granitemoe": Family("granitemoe", {"residual_multiplier": 0.22}, notable=f"{words.EXPERTS}; {words.MULTIPLIER}"),
    "granitemoe_swa": Family(
        "granitemoe_swa", {"residual_multiplier": 0.22}, notable=f"{words.SLIDING}; {words.EXPERTS}; {words.MULTIPLIER}"
    ),
    "hyperclovax": Family("hyperclovax", notable=words.NORMS_AFTER),
    "kolibri1": Family("kolibri1", notable=f"{words.EXPERTS}; {words.NORMS_AFTER}"),
    "llama4_text": Family(
        "llama4_text",
        {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
        notable=f"{words.EXPERTS} in every other layer; chunked attention",
    ),
    "modernbert-decoder": Family("modernbert-decoder", _ALTERNATING, notable=words.SLIDING),
    "mpt": Family("mpt", layers="transformer.blocks"),
    "olmo3": Family("olmo3", _ALTERNATING, notable=f"{words.SLIDING}; {words.NORMS_AFTER}"),
    "stablelm": Family("stablelm"),
    "stablelm (parallel)": Family("stablelm", {"use_parallel_residual": True}, notable=words.PARALLEL),
    "xglm": Family("xglm"),
}

ATTENTION: dict[str, Family] = {
    **_KNOWN,
    **{name: Family(name) for name in _LIKE_LLAMA},
    **{name: Family(name, notable=words.EXPERTS) for name in _MIXTURES},
    **_DENSE,
}
