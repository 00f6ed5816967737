"""Vision towers at their smallest, and how families that resemble each other are put together."""

from __future__ import annotations

from typing import Any

from tests.families.sizes import D_MODEL
from tests.families.vision import END, IMAGE, PATCH, SIDE, START, VIDEO, VisionFamily

ATTENTION_AND_MLP = ("self_attn", "mlp")
NORMS_OF_BOTH = ("post_attention_layernorm", "post_feedforward_layernorm")
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
BETWEEN_LAYERS = "image features added between layers"

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_channels": 3,
}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
PIXTRAL = {**TOWER, "model_type": "pixtral", "head_dim": 8}
SQUARES = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
MERGING_TOWER = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": D_MODEL,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
WHOLE_SECTIONS = {**SECTIONS, "partial_rotary_factor": 1.0}
MARKED = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def paligemma(text: str, writes: tuple[str, ...], **more: Any) -> VisionFamily:
    return VisionFamily(
        "paligemma",
        text,
        16,
        {**SIGLIP, "projection_dim": D_MODEL},
        {"image_token_index": IMAGE, "projection_dim": D_MODEL, "hidden_size": D_MODEL},
        types="token_type_ids",
        tower="model.vision_tower",
        writes=writes,
        **more,
    )


def merging(name: str, vision: dict[str, Any], *, rope: dict[str, Any] | None = None, **more: Any) -> VisionFamily:
    """Families that merge square groups of patches of images of any size, as Qwen does."""
    given = {"text": f"{name}_text", "text_config": {}, **more}
    return VisionFamily(
        name,
        given.pop("text"),
        4,
        {**MERGING_TOWER, **vision},
        MARKED,
        {"rope_parameters": SECTIONS if rope is None else rope, **given.pop("text_config")},
        pixels="patches",
        types="mm_token_type_ids",
        tower="model.visual",
        **given,
    )


def glm(name: str, text: str = "", **more: Any) -> VisionFamily:
    marks = {f"{kind}_{side}_token_id": 154 for kind in ("image", "video") for side in ("start", "end")}
    family = merging(name, {"image_size": SIDE}, text=text or f"{name}_text", **more)
    return VisionFamily(**{**vars(family), "config": {**MARKED, **marks}})


def idefics(name: str, **more: Any) -> VisionFamily:
    return VisionFamily(
        name,
        "llama",
        4,
        TOWER,
        {"image_token_id": IMAGE, "scale_factor": 2},
        pixels="list",
        layers="model.text_model.layers",
        tower="model.vision_model",
        writes=ATTENTION_AND_MLP,
        **more,
    )


def llava(name: str, *, tokens: int = 16, **more: Any) -> VisionFamily:
    config = {"image_token_index": IMAGE, "vision_feature_layer": -1, **more.pop("config", {})}
    return VisionFamily(name, more.pop("text", "llama"), tokens, more.pop("vision", CLIP), config, **more)
