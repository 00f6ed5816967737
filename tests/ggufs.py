"""A tiny chat model as a GGUF file and as a folder, made of the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HEADS = 4
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = [("Ġ", "a"), ("Ġ", "b")]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Modules of a Llama layer, and the names of their weights in llama.cpp."""


def words() -> list[str]:
    """The vocabulary: every byte, two pairs of them, and the special tokens."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES), *SPECIAL]


def build(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    first = len(words()) - len(SPECIAL)
    config = LlamaConfig(
        vocab_size=len(words()), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=512, rope_theta=10_000.0, rms_norm_eps=1e-5,
        bos_token_id=first, eos_token_id=first + 2, pad_token_id=first, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_folder(model: LlamaForCausalLM, folder: Path) -> Path:
    """The model as transformers saves it, with a tokenizer made by hand."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words())}, MERGES))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": TEMPLATE}))
    return folder


def write_gguf(model: LlamaForCausalLM, file: Path, *, type: str = "F32", rotary_factor: float | None = None) -> Path:
    """The model as llama.cpp would write it.

    Args:
        model: the model.
        file: the file.
        type: the type of its matrices.
        rotary_factor: factor of a scaling of rotary positions, by which its meaning changes.
    """
    import gguf

    config, first = model.config, len(words()) - len(SPECIAL)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    if rotary_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary_factor)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words())
    writer.add_token_types([1] * first + [3] * len(SPECIAL))
    writer.add_token_merges(list(map(" ".join, MERGES)))
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(first + 2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, weight in _tensors(model):
        kind = gguf.GGMLQuantizationType[type] if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Names and values as in llama.cpp, which orders the rows of queries and keys in another way."""
    state = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    yield "output.weight", state["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in _NAMES.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = weight.reshape(HEADS, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            yield f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight)
