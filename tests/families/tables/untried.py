"""Model types for which no tiny configuration is here, and why."""

from __future__ import annotations

__all__ = ["UNTRIED"]

_IMAGE_INPUTS = "its images are laid out in a way that the tests do not build"
_IN_THE_TABLE = "its text decoder is in the table by itself"
_AUDIO = "reads or makes audio"

_WHY = {
    "an encoder-decoder pair: there is no single stream to the reply": (
        "florence2 pix2struct pp_formulanet t5gemma2 udop vision-encoder-decoder"
    ),
    "the tower is one of timm's": "fast_vlm gemma3n perception_lm",
    "in transformers 5.24 its own forward ends in an AttributeError, which is explained; 5.17 runs it": "llama4",
    "drafts tokens for another model, from that model's states": "gemma4_assistant gemma4_unified_assistant",
    "works on bytes, with four models in one": "blt",
    "images become tokens of its vocabulary": "apertus1p5 chameleon emu3",
    "denoises blocks of text or actions": "diffusion_gemma pi0",
    "reads proteins": "evolla",
    _AUDIO: (
        "moss_transcribe_diarize muse_spark musicgen musicgen_melody phi4_multimodal qwen2_5_omni_thinker "
        "qwen3_omni_moe_thinker"
    ),
    f"{_IN_THE_TABLE}; {_AUDIO}": ("dots3_note gemma4_unified inkling_mm_model nemotron_h_omni"),
    f"{_IN_THE_TABLE}; {_IMAGE_INPUTS}": (
        "cohere_compass deepseek_vl_hybrid fuyu inkling2 inkling2_loop minicpm_ocr minicpmv4_6 minicpmv4_7 "
        "pp_chart2table qwen4_exp shieldgemma2 video_llama_3 video_llava"
    ),
    "learnt queries read the image": "blip blip-2 instructblip instructblipvideo idefics kosmos-2 kosmos-2.5",
    _IMAGE_INPUTS: (
        "cosmos3_edge deepseek_ocr2 ernie4_5_vl_moe git glm5_next granite4_vision granite_docling hunyuan_vl hy_v4_vl molmo2 "
        "muse_glimmer step3p7 unlimited_ocr"
    ),
    "a text model that transformers lists among those that read images": "mistral4",
}

UNTRIED: dict[str, str] = {name: why for why, names in _WHY.items() for name in sorted(names.split())}
