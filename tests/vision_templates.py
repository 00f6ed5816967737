"""Vision-language families behind their real processors: what a prompt becomes, and the models to go with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.families.vision import SIDE
from tests.processors import demo_tokenizer, paligemma_processor

_SQUARE = {"height": SIDE, "width": SIDE}


def turns(begin: str, image: str, end: str, answer: str, first: str = "") -> str:
    """A chat template; `begin`, `end` and `answer` stand around what the user says."""
    return (
        f"{first}{{% for m in messages %}}{begin}{{% for part in m['content'] %}}{{% if part['type'] == 'image' %}}{image}"
        f"{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )


@dataclass(frozen=True)
class Template:
    """How a family of models is put a question, written by hand after its published template."""

    processor: Callable[[], Any]
    tokens: dict[str, str]
    """The configuration's names of special tokens, and their text."""
    image: str
    """The token that stands for a piece of the image, in the model's inputs."""
    prompt: str
    """The whole prompt, an image's tokens left out."""
    whole: bool = True
    """Whether the processor can be saved and loaded without torchvision, which video processors need."""
    tiles: int = 1
    """Into how many images it makes one of SIDE pixels."""


GEMMA3 = turns(
    "<start_of_turn>user\n", "<start_of_image>", "<end_of_turn>\n", "<start_of_turn>model\n", "{{ bos_token }}"
)
LLAVA = turns("USER: ", "<image>\n", " ", "ASSISTANT:")
IDEFICS = turns("<|im_start|>User:", "<image>", "<end_of_utterance>\n", "Assistant:")
CHATML = "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"
QWEN = turns(CHATML[0], "<|vision_start|><|image_pad|><|vision_end|>", *CHATML[1:])
INTERNVL = turns(CHATML[0], "<IMG_CONTEXT>\n", *CHATML[1:])
_IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<|im_start|>")
_IDEFICS_TILES = "*<row_1_col_1>*<row_1_col_2>\n*<row_2_col_1>*<row_2_col_2>\n\n*<global-img>*"
_IDEFICS_PROMPT = (
    "<bos><|im_start|>User:"
    + _IDEFICS_TILES.replace("*", "<fake_token_around_image>")
    + "{question}<end_of_utterance>\nAssistant:"
)
_NO_VIDEO = SimpleNamespace(model_input_names=[], num_frames=1, fps=1, merge_size=2)
"""In place of a video processor: none can be made without torchvision, and no video is shown."""


def gemma3_processor() -> Any:
    named = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    tokenizer = demo_tokenizer(*named.values(), **named)
    return Gemma3Processor(Gemma3ImageProcessorPil(size=_SQUARE), tokenizer, chat_template=GEMMA3, image_seq_length=4)


def llava_processor() -> Any:
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE),
        demo_tokenizer("<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )


def idefics3_processor() -> Any:
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return Idefics3Processor(pixels, demo_tokenizer(*_IDEFICS_TOKENS), image_seq_len=4, chat_template=IDEFICS)


def smolvlm_processor() -> Any:
    pixels = SmolVLMImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    return SmolVLMProcessor(pixels, demo_tokenizer(*_IDEFICS_TOKENS), _NO_VIDEO, image_seq_len=4, chat_template=IDEFICS)


def qwen_processor(kind: type) -> Any:
    sides = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 4096}
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
    tokenizer = demo_tokenizer(*tokens)
    tokenizer.bos_token = None  # Qwen has none
    tokenizer.backend_tokenizer.post_processor = None
    return kind(Qwen2VLImageProcessorPil(**sides), tokenizer, _NO_VIDEO, chat_template=QWEN)


def internvl_processor() -> Any:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = demo_tokenizer(*named.values(), "<|im_start|>", "<|im_end|>", **named)
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    pixels = GotOcr2ImageProcessorPil(size=_SQUARE)
    return InternVLProcessor(pixels, tokenizer, _NO_VIDEO, image_seq_length=4, chat_template=INTERNVL)


def _qwen(kind: type) -> Template:
    return Template(
        lambda: qwen_processor(kind),
        {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
        },
        "<|image_pad|>",
        "<|im_start|>user\n<|vision_start|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n",
        whole=False,
    )


TEMPLATES = {
    "paligemma2": Template(
        paligemma_processor, {"image_token_index": "<image>"}, "<image>", "<bos>answer en {question}\n"
    ),
    "gemma3": Template(
        gemma3_processor,
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        "<image_soft_token>",
        "<bos><start_of_turn>user\n\n\n<start_of_image><end_of_image>\n\n{question}<end_of_turn>\n<start_of_turn>model\n",
    ),
    "llava": Template(
        llava_processor, {"image_token_index": "<image>"}, "<image>", "<bos>USER: \n{question} ASSISTANT:"
    ),
    "idefics3": Template(
        idefics3_processor,
        {"image_token_id": "<image>"},
        "<image>",
        _IDEFICS_PROMPT,
        tiles=5,
    ),
    "smolvlm": Template(
        smolvlm_processor,
        {"image_token_id": "<image>"},
        "<image>",
        _IDEFICS_PROMPT,
        tiles=5,
        whole=False,
    ),
    "qwen2_5_vl": _qwen(Qwen2_5_VLProcessor),
    "qwen3_vl": _qwen(Qwen3VLProcessor),
    "internvl": Template(
        internvl_processor,
        {"image_token_id": "<IMG_CONTEXT>"},
        "<IMG_CONTEXT>",
        "<|im_start|>user\n<img></img>\n{question}<|im_end|>\n<|im_start|>assistant\n",
        whole=False,
    ),
}
