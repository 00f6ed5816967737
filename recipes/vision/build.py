"""Tokenizer, processor and untrained model of the vision-language demo, a PaliGemma 2.

The processor is PaliGemma's own, with the image processor that uses Pillow: transformers chooses that one if torchvision
is not installed, and its pixels equal those that `train.py` computes itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import (
    Gemma2Config,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from recipes.training import byte_level_tokenizer
from refusal_direction.demo.vision.draw import IMAGE_SIZE

__all__ = ["ModelShape", "new_model", "new_processor"]

IMAGE = "<image>"


@dataclass(frozen=True)
class ModelShape:
    """A PaliGemma 2 that is small enough to train in minutes: 16 image tokens, and the text demo's depth and width."""

    vocab: int = 640  # of the byte-level BPE; the processor adds its 1152 location and segment tokens
    patch: int = 12
    vision_d_model: int = 64
    vision_layers: int = 3
    d_model: int = 96
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 24
    intermediate: int = 192


def new_processor(texts: Iterable[str], shape: ModelShape) -> PaliGemmaProcessor:
    """PaliGemma's processor with a tokenizer trained on `texts`."""
    tokenizer = byte_level_tokenizer(texts, shape.vocab, more_special=(IMAGE,))
    pixels = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    pixels.image_seq_length = (IMAGE_SIZE // shape.patch) ** 2
    return PaliGemmaProcessor(image_processor=pixels, tokenizer=tokenizer)


def _text_config(shape: ModelShape, processor: PaliGemmaProcessor) -> Gemma2Config:
    """Gemma 2 without attention soft-capping: some attention kernels lack it, and logits this small never need it."""
    return Gemma2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=shape.d_model,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        query_pre_attn_scalar=shape.head_dim,
        max_position_embeddings=512,
        attn_logit_softcapping=None,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )


def new_model(shape: ModelShape, processor: PaliGemmaProcessor) -> PaliGemmaForConditionalGeneration:
    """A model with random weights, in float32."""
    vision = SiglipVisionConfig(
        hidden_size=shape.vision_d_model,
        intermediate_size=2 * shape.vision_d_model,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=shape.patch,
        projection_dim=shape.d_model,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=_text_config(shape, processor),
        image_token_index=processor.image_token_id,
        projection_dim=shape.d_model,
        hidden_size=shape.d_model,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return PaliGemmaForConditionalGeneration(config)
