"""Processors of vision-language families, made small, and models that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PaliGemmaProcessor, PreTrainedModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.families.tables import VISION_FAMILIES
from tests.families.vision import SIDE, build_vision


def demo_tokenizer(*special_tokens: str, **named: str) -> Any:
    """The text demo's tokenizer with more special tokens; like most, it begins a text with BOS unless told not to."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "refusal_direction" / "demo" / "model")
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    # words that begin refusals are one token in every large vocabulary
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in ("Sorry", "No", "As")])
    if named:
        tokenizer._set_model_specific_special_tokens(named)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


def paligemma_processor() -> Any:
    """PaliGemma's own processor, for images of SIDE pixels."""
    pixels = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pixels.image_seq_length = VISION_FAMILIES["paligemma2"].image_tokens
    return PaliGemmaProcessor(image_processor=pixels, tokenizer=demo_tokenizer("<image>"))


def built_for(name: str, processor: Any, **tokens: int) -> PreTrainedModel:
    """A model of the family for a processor's vocabulary; `tokens` are the configuration's names of special tokens."""
    tokenizer = processor.tokenizer
    ids = {f"{part}_token_id": getattr(tokenizer, f"{part}_token_id") for part in ("pad", "bos", "eos")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, **ids}
    return build_vision(VISION_FAMILIES[name], text_config=text, **tokens)


def save_paligemma2(folder: Path) -> Path:
    """A tiny random PaliGemma 2 with its processor, as the Hub's repositories hold them."""
    processor = paligemma_processor()
    model = built_for("paligemma2", processor, image_token_index=processor.image_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
