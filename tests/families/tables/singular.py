"""What is not a plain decoder: refused architectures, encoders run as decoders, decoders of encoder-decoder pairs."""

from __future__ import annotations

from tests.families.building import Family
from tests.families.sizes import VOCAB
from tests.families.tables import words

__all__ = ["SINGULAR"]


_SINGULAR = {
    "cpmant": Family(
        "cpmant",
        {
            "dim_ff": 48,
            "dim_head": 8,
            "position_bias_num_buckets": 8,
            "position_bias_max_distance": 32,
            "prompt_types": 4,
            "prompt_length": 4,
            "segment_types": 4,
        },
        refused=words.NO_STACK,
    ),
    "ctrl": Family("ctrl", {"dff": 48}, refused=words.NO_STACK),
    "doge": Family("doge", notable="the stream is scaled channel by channel", refused=words.NOT_FOUND),
    "dory": Family("dory", notable="layers run more than once", refused=words.LOOPED),
    "gemma3n_text": Family(
        "gemma3n_text",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
        },
        notable="four streams (AltUp)",
        refused=words.SEVERAL_STREAMS,
    ),
    "hrm_text": Family("hrm_text", notable="layers run more than once", refused=words.LOOPED),
    "hy_v4": Family("hy_v4", notable="hyper-connections", refused=words.SEVERAL_STREAMS),
    "inkling2_loop_text": Family(
        "inkling2_loop_text",
        {
            "unpadded_vocab_size": VOCAB,
            "rel_extent": 16,
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 3,
        },
        notable="layers run more than once",
        refused="runs layer 1 again",
    ),
    "inkling2_text": Family(
        "inkling2_text",
        {"unpadded_vocab_size": VOCAB, "rel_extent": 16},
        notable="attention over earlier layers' streams",
        refused=words.NOT_FOUND,
    ),
    "openai-gpt": Family("openai-gpt", notable=words.NORMED_STREAM, refused=words.NO_STACK),
    "prophetnet": Family(
        "prophetnet",
        {"num_decoder_layers": 4, "num_decoder_attention_heads": 4},
        notable="a stream for each predicted token",
        refused=words.SEVERAL_STREAMS,
    ),
    "qwen4_exp_text": Family(
        "qwen4_exp_text",
        {
            "hc_lowrank": 8,
            "ngram_vocab_size_base": 100,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
        notable="hyper-connections",
        refused=words.NOT_FOUND,
    ),
    "reformer": Family(
        "reformer",
        {
            "is_decoder": True,
            "attention_head_size": 8,
            "axial_pos_embds": False,
            "feed_forward_size": 48,
            "attn_layers": ["local"] * 4,
            "local_attn_chunk_length": 4,
        },
        notable="reversible layers",
        refused=words.NO_STACK,
    ),
    "xlm": Family("xlm", refused=words.NO_STACK),
    "xlnet": Family("xlnet", refused=words.NO_STACK),
    "zaya": Family(
        "zaya",
        {"num_experts_per_tok": 1},
        notable="the stream is scaled channel by channel",
        refused=words.NOT_FOUND,
    ),
}

_AS_DECODER = {"is_decoder": True}
_AFTER_BOTH = ("attention.output.LayerNorm", "output.LayerNorm")
_POSTS = {
    "bert": "bert",
    "bert-generation": "bert",
    "big_bird": "bert",
    "camembert": "roberta",
    "data2vec-text": "data2vec_text",
    "electra": "electra",
    "ernie": "ernie",
    "rembert": "rembert",
    "roberta": "roberta",
    "roformer": "roformer",
    "xlm-roberta": "roberta",
}
_PRE = {"megatron-bert": "bert", "roberta-prelayernorm": "roberta_prelayernorm", "xlm-roberta-xl": "roberta"}

_ENCODERS = {
    **{
        name: Family(name, _AS_DECODER, layers=f"{stem}.encoder.layer", norms=_AFTER_BOTH, notable=words.NORMED_STREAM)
        for name, stem in _POSTS.items()
    },
    **{name: Family(name, _AS_DECODER, layers=f"{stem}.encoder.layer") for name, stem in _PRE.items()},
    "roc_bert": Family(
        "roc_bert",
        {
            **_AS_DECODER,
            "pronunciation_embed_dim": 16,
            "pronunciation_vocab_size": 20,
            "shape_embed_dim": 16,
            "shape_vocab_size": 20,
        },
        layers="roc_bert.encoder.layer",
        norms=_AFTER_BOTH,
        notable=words.NORMED_STREAM,
    ),
    "xmod": Family(
        "xmod", {**_AS_DECODER, "default_language": "en_XX"}, notable="language adapters", refused=words.NOT_FOUND
    ),
}
"""Encoders, which transformers also runs as decoders."""

_OWN_NORMS = ("self_attn_layer_norm", "final_layer_norm")
_IN_DECODER = "model.decoder.layers"
_DECODERS_OF_PAIRS = {
    **{
        name: Family(name, layers=_IN_DECODER, norms=_OWN_NORMS, notable=words.NORMED_STREAM)
        for name in "bart blenderbot-small marian mvp plbart trocr".split()
    },
    **{name: Family(name, layers=_IN_DECODER) for name in "bigbird_pegasus blenderbot mbart pegasus whisper".split()},
    "biogpt": Family("biogpt", layers="biogpt.layers"),
    "opt (norms after)": Family(
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        layers=_IN_DECODER,
        norms=_OWN_NORMS,
        notable=words.NORMED_STREAM,
    ),
}
"""Decoders of encoder-decoder pairs, run alone, and what was made from them."""

SINGULAR: dict[str, Family] = {**_SINGULAR, **_ENCODERS, **_DECODERS_OF_PAIRS}
