"""Tiny random image-text-to-text models, and what a person knows about each: how an image and text become its inputs, where
its vision tower is, and where its decoder writes into the residual stream. Nothing here imports the package under test.

Their weights are not as initialised: every write is about as large as the stream, norms are not 1, biases are not 0, and the
image features are as large as the text's, so that an image that is lost or belongs to another prompt shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PaliGemmaProcessor,
    PreTrainedModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.families import D_MODEL, N_LAYERS
from tests.oracles import reference

VOCAB = 160
FIRST_TEXT_TOKEN = 12
LAST_TEXT_TOKEN = 139
IMAGE, VIDEO, START, END = 150, 151, 152, 153
"""The token that stands for a piece of the image, and those around it."""
SIDE = 16
"""Images are so many pixels wide and high."""
N_POSITIONS = 3
REFUSAL_TOKENS = (7, 11)
_END_OF_PROMPT = [9, 4]  # as a template would put there; fewer than positions, so the last of these differs
_LENGTHS = (4, 7, 2, 9)  # shorter and longer than the sliding windows

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 8,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
    "num_channels": 3,
}
_QWEN_TOWER = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": D_MODEL,
}
_QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


@dataclass(frozen=True)
class VisionFamily:
    """One architecture at its smallest, and the truth about it, written by hand from its source."""

    model_type: str
    text: str
    """The model_type of the text decoder."""
    writes: tuple[str, ...]
    """The submodules of a decoder layer whose outputs are added to the stream, in that order."""
    image_tokens: int
    """How many tokens an image of SIDE pixels becomes."""
    tower: str
    """The vision tower: what runs on pixels, before the embeddings are merged."""
    vision: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    pixels: str = "image"
    """How pixels are laid out: an image, a list of images (SmolVLM), or flat patches (Qwen)."""
    types: str | None = None
    """The input that says which tokens are the image's, if the family wants one."""
    layers: str = "model.language_model.layers"
    adds_between_layers: bool = False
    """Whether the model itself adds to the stream between decoder layers."""


_ATTENTION_AND_MLP = ("self_attn", "mlp")
_NORMS_OF_BOTH = ("post_attention_layernorm", "post_feedforward_layernorm")


def _paligemma(text: str, writes: tuple[str, ...], **text_config: Any) -> VisionFamily:
    return VisionFamily(
        "paligemma",
        text,
        writes,
        image_tokens=16,
        tower="model.vision_tower",
        vision={**_TOWER, "model_type": "siglip_vision_model", "projection_dim": D_MODEL, "vision_use_head": False},
        config={"image_token_index": IMAGE, "projection_dim": D_MODEL, "hidden_size": D_MODEL},
        text_config=text_config,
        types="token_type_ids",
    )


def _qwen(name: str, *, adds_between_layers: bool = False, **vision: Any) -> VisionFamily:
    return VisionFamily(
        name,
        f"{name}_text",
        _ATTENTION_AND_MLP,
        image_tokens=4,
        tower="model.visual",
        vision={**_QWEN_TOWER, **vision},
        config=_QWEN_TOKENS,
        text_config=_QWEN_ROPE,
        pixels="patches",
        types="mm_token_type_ids",
        adds_between_layers=adds_between_layers,
    )


def _idefics(name: str) -> VisionFamily:
    return VisionFamily(
        name,
        "llama",
        _ATTENTION_AND_MLP,
        image_tokens=4,
        tower="model.vision_model",
        vision=_TOWER,
        config={"image_token_id": IMAGE, "scale_factor": 2},
        pixels="list",
        layers="model.text_model.layers",
    )


VISION_FAMILIES = {
    "paligemma2": _paligemma("gemma2", _NORMS_OF_BOTH, **_ALTERNATING),
    "paligemma": _paligemma("gemma", _ATTENTION_AND_MLP),
    "gemma3": VisionFamily(
        "gemma3",
        "gemma3_text",
        _NORMS_OF_BOTH,
        image_tokens=4,
        tower="model.vision_tower",
        vision={**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        config={
            "mm_tokens_per_image": 4,
            "boi_token_index": START,
            "eoi_token_index": END,
            "image_token_index": IMAGE,
        },
        text_config=_ALTERNATING,
        types="token_type_ids",
    ),
    "llava": VisionFamily(
        "llava",
        "llama",
        _ATTENTION_AND_MLP,
        image_tokens=16,
        tower="model.vision_tower",
        vision={**_TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
        config={"image_token_index": IMAGE, "vision_feature_layer": -1},
    ),
    "qwen2_5_vl": _qwen("qwen2_5_vl", window_size=16, fullatt_block_indexes=[1]),
    # adds features of the tower's layers to the stream between its own first layers
    "qwen3_vl": _qwen(
        "qwen3_vl", adds_between_layers=True, deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=16
    ),
    "smolvlm": _idefics("smolvlm"),
    "idefics3": _idefics("idefics3"),
    "internvl": VisionFamily(
        "internvl",
        "qwen2",
        _ATTENTION_AND_MLP,
        image_tokens=4,
        tower="model.vision_tower",
        vision={**_TOWER, "image_size": [SIDE, SIDE], "patch_size": [4, 4]},
        config={"image_token_id": IMAGE, "image_seq_length": 4},
    ),
}


def build(family: VisionFamily, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A model of the family with random, non-degenerate weights, in evaluation mode; `config` goes over the family's."""
    text = AutoConfig.for_model(family.text, **{**_TEXT, **family.text_config, **config.pop("text_config", {})})
    chosen = {**family.config, "vision_config": dict(family.vision), "text_config": text.to_dict(), **config}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family.model_type, **chosen))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:  # norms and biases
                weight += 0.3 * noise
            elif "embed" in name:
                weight.copy_(0.5 * noise)
            else:
                fan_in = weight[0].numel()
                weight.copy_((1.5 if family.layers in name else 1.0) * noise / fan_in**0.5)
    return model.eval().to(dtype)


def layers_of(model: PreTrainedModel, family: VisionFamily) -> nn.ModuleList:
    """The decoder layers, by their name."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def inputs_for(family: VisionFamily, text: Sequence[int], tiles: Tensor) -> dict[str, Tensor]:
    """The model's inputs for text tokens after an image, a batch of one, not padded.

    `tiles` is (tile, 3, height, width): one, SIDE pixels wide and high, except where a family divides large images into
    several (lists and InternVL) or takes them as they are (Qwen).
    """
    pieces = tiles.shape[-2:].numel() // 64 if family.pixels == "patches" else len(tiles) * family.image_tokens
    ids = torch.tensor([[START, *[IMAGE] * pieces, END, *text]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_pixels(family, tiles)}
    if family.model_type == "paligemma":  # what is to be learnt: nothing, it is all prompt
        inputs["token_type_ids"] = torch.zeros_like(ids)
    elif family.types:
        inputs[family.types] = (ids == IMAGE).long()
    return inputs


def _pixels(family: VisionFamily, tiles: Tensor) -> dict[str, Tensor]:
    if family.pixels == "list":
        everywhere = torch.ones(1, len(tiles), *tiles.shape[-2:], dtype=torch.long)
        return {"pixel_values": tiles[None], "pixel_attention_mask": everywhere}
    if family.pixels == "patches":
        rows, columns = (size // 4 for size in tiles.shape[-2:])
        return {"pixel_values": _patches(tiles[0]), "image_grid_thw": torch.tensor([[1, rows, columns]])}
    return {"pixel_values": tiles}


def _patches(image: Tensor, size: int = 4, frames: int = 2) -> Tensor:
    """Qwen's layout: one row a patch, (channel, frame, y, x) flattened; patches that are merged are next to each other."""
    squares = image.unfold(1, size, size).unfold(2, size, size)  # channel, row, column, y, x
    rows, columns = squares.shape[1:3]
    blocks = squares.reshape(3, rows // 2, 2, columns // 2, 2, size, size).permute(1, 3, 2, 4, 0, 5, 6)
    patches = blocks.reshape(rows * columns, 3, 1, size, size).expand(-1, -1, frames, -1, -1)
    return patches.reshape(rows * columns, -1).contiguous()


@contextmanager
def counted_images(model: PreTrainedModel, family: VisionFamily) -> Iterator[list[int]]:
    """Within the context each call of the vision tower is counted, in images."""
    calls: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        pixels = args[0] if args else kwargs.get("pixel_values")
        calls.append(len(pixels if grid is None else grid))

    handle = model.get_submodule(family.tower).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass(frozen=True)
class VisionProblem:
    """Inputs of the four sets of prompts, a batch of one each, of several lengths."""

    harmful_train: list[dict[str, Tensor]]
    harmless_train: list[dict[str, Tensor]]
    harmful_val: list[dict[str, Tensor]]
    harmless_val: list[dict[str, Tensor]]

    @property
    def inputs(self) -> list[dict[str, Tensor]]:
        return [*self.harmful_train, *self.harmless_train, *self.harmful_val, *self.harmless_val]

    def indices(self) -> dict[str, list[int]]:
        """For each set, the places of its prompts in `inputs`."""
        places, begin = {}, 0
        for name in ("harmful_train", "harmless_train", "harmful_val", "harmless_val"):
            size = len(getattr(self, name))
            places[name] = list(range(begin, begin + size))
            begin += size
        return places


def make_problem(
    family: VisionFamily,
    *,
    seed: int = 0,
    n_train: int = 4,
    n_val: int = 3,
    shapes: Sequence[tuple[int, int, int]] = ((1, SIDE, SIDE),),
) -> VisionProblem:
    """Random images and questions; both differ in kind, harmful from harmless. `shapes`: (tiles, height, width) in turn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, low: int, high: int, brightness: float, shift: int) -> list[dict[str, Tensor]]:
        prompts = []
        for number in range(count):
            n_tiles, height, width = shapes[(number + shift) % len(shapes)]
            tiles = torch.randn(n_tiles, 3, height, width, generator=generator) + brightness
            length = _LENGTHS[(number + shift) % len(_LENGTHS)]
            body = torch.randint(low, high, (length,), generator=generator).tolist()
            prompts.append(inputs_for(family, [*body, *_END_OF_PROMPT], tiles))
        return prompts

    middle = (FIRST_TEXT_TOKEN + LAST_TEXT_TOKEN) // 2
    return VisionProblem(
        harmful_train=draw(n_train, middle, LAST_TEXT_TOKEN + 1, 0.5, 0),
        harmless_train=draw(n_train, FIRST_TEXT_TOKEN, middle, -0.5, 1),
        harmful_val=draw(n_val, middle, LAST_TEXT_TOKEN + 1, 0.5, 2),
        harmless_val=draw(n_val, FIRST_TEXT_TOKEN, middle, -0.5, 0),
    )


def known(model: PreTrainedModel, family: VisionFamily, writes: tuple[str, ...] | None = None) -> reference.Model:
    """The model as the reference implementation wants it: with the hand-written truth, or other writes."""
    return reference.Model(model, layers_of(model, family), writes or family.writes)


@contextmanager
def slowly_ablated(model: PreTrainedModel, family: VisionFamily, direction: Tensor) -> Iterator[None]:
    """Directional ablation by the hand-written truth, of what is added between layers too."""
    u = direction.double() / (direction.double().norm() + 1e-8)

    def without_direction(x: Tensor) -> Tensor:
        return (x.double() - (x.double() @ u).unsqueeze(-1) * u).to(x)

    with reference.ablated(known(model, family), direction), ExitStack() as hooks:
        for layer in layers_of(model, family)[1:] if family.adds_between_layers else ():
            hooks.enter_context(reference.changed_input(layer, without_direction))
        yield


@torch.no_grad()
def _logits(model: PreTrainedModel, prompts: Sequence[dict[str, Tensor]]) -> Tensor:
    """Logits at the last position, one prompt at a time, [prompt, 1, vocab]."""
    return torch.cat([model(**prompt, use_cache=False).logits[:, -1:] for prompt in prompts])


def activations(model: PreTrainedModel, family: VisionFamily, prompts: Sequence[dict[str, Tensor]]) -> Tensor:
    """The residual stream at the input of every layer at the last positions, [prompt, position, layer, d_model]."""
    seen: list[list[Tensor]] = [[] for _ in range(N_LAYERS)]

    def keep(into: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def change_nothing(hidden: Tensor) -> Tensor:
            into.append(hidden[:, -N_POSITIONS:].clone())
            return hidden

        return change_nothing

    with ExitStack() as hooks:
        for layer, into in zip(layers_of(model, family), seen, strict=True):
            hooks.enter_context(reference.changed_input(layer, keep(into)))
        _logits(model, prompts)
    return torch.stack([torch.cat(parts) for parts in seen], dim=2)


def solve_slowly(model: PreTrainedModel, family: VisionFamily, problem: VisionProblem) -> reference.Report:
    """The method by the model's own forward under hooks: one candidate at a time, one prompt at a time."""
    of_kind = [
        activations(model, family, prompts).double().mean(dim=0)
        for prompts in (problem.harmful_train, problem.harmless_train)
    ]
    candidates = of_kind[0] - of_kind[1]
    of_harmful, of_harmless = (_logits(model, prompts) for prompts in (problem.harmful_val, problem.harmless_val))
    ablation = torch.zeros(*candidates.shape[:2], len(of_harmful), dtype=torch.float64)
    steering = torch.zeros(*candidates.shape[:2], len(of_harmless), dtype=torch.float64)
    kl = torch.zeros_like(steering)
    for position in range(candidates.shape[0]):
        for layer in range(candidates.shape[1]):
            direction = candidates[position, layer]
            with slowly_ablated(model, family, direction):
                harmful, harmless = _logits(model, problem.harmful_val), _logits(model, problem.harmless_val)
            ablation[position, layer] = reference.refusal_scores(harmful, REFUSAL_TOKENS)
            kl[position, layer] = reference.kl_divergences(of_harmless, harmless)
            with reference.steered(known(model, family), direction, layer):
                steering[position, layer] = reference.refusal_scores(
                    _logits(model, problem.harmless_val), REFUSAL_TOKENS
                )
    return reference.Report(
        baseline_harmful=reference.refusal_scores(of_harmful, REFUSAL_TOKENS),
        baseline_harmless=reference.refusal_scores(of_harmless, REFUSAL_TOKENS),
        candidates=candidates,
        ablation=ablation,
        steering=steering,
        kl=kl,
    )


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
    family = VISION_FAMILIES[name]
    return build(family, text_config={"vocab_size": len(tokenizer), "max_position_embeddings": 512, **ids}, **tokens)


def save_paligemma2(folder: Path) -> Path:
    """A tiny random PaliGemma 2 with its processor, as the Hub's repositories hold them."""
    processor = paligemma_processor()
    model = built_for("paligemma2", processor, image_token_index=processor.image_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
