"""The families that every run of the tests examines: one or more for each structural trait. The others are marked `extended`."""

from __future__ import annotations

__all__ = ["CORE"]

_TEXT = {
    "plain decoders": "llama gemma qwen2",
    "norms after the blocks, sliding windows": "gemma2 gemma3_text olmo2 glm4",
    "attention and MLP in parallel": "phi gpt_neox falcon cohere2",
    "learned positions, ALiBi, flattened outputs": "gpt2 opt bloom llama4_text",
    "mixtures of experts": "mixtral gpt_oss",
    "residual multipliers, shared keys and values, latent attention": "granite gemma4_text deepseek_v3",
    "state spaces, recurrence, convolutions": "mamba jamba zamba2 rwkv lfm2 qwen3_next",
    "norms on the stream itself": "bert minimax",
    "refused": "gemma3n_text deepseek_v4 doge hrm_text ctrl",
}
_VISION = (
    "paligemma paligemma2 gemma3 gemma4 llava mistral3 qwen2_5_vl qwen3_vl smolvlm idefics3 internvl "
    "mllama"  # refused
)

CORE: frozenset[tuple[str, str]] = frozenset(
    {("text", name) for names in _TEXT.values() for name in names.split()}
    | {("text", "opt (norms after)")}
    | {("vision", name) for name in _VISION.split()}
)
"""Kind and name of each."""
