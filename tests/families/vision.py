"""Tiny random image-text-to-text models, and what a person knows about each: how an image and text become its inputs, where
its vision tower is, and where its decoder writes into the residual stream. Nothing here imports the package under test.

Image features are as large as the text's, so that an image that is lost or belongs to another prompt shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tests.families.building import SCALE, randomise
from tests.families.sizes import small

__all__ = [
    "END",
    "IMAGE",
    "SIDE",
    "START",
    "VIDEO",
    "VisionFamily",
    "build_vision",
    "counted_images",
    "inputs_for",
]

IMAGE, VIDEO, START, END = 150, 151, 152, 153
"""The token that stands for a piece of the image, and those around it."""
SIDE = 16
"""Images are so many pixels wide and high."""
PATCH = 4


@dataclass(frozen=True)
class VisionFamily:
    """One architecture at its smallest, and the truth about it, written by hand from its source."""

    model_type: str
    text: str
    """The model_type of the text decoder."""
    image_tokens: int
    """How many tokens an image of SIDE pixels becomes."""
    vision: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    pixels: str = "image"
    """How pixels are laid out: a key of `_LAYOUTS`."""
    types: str | None = None
    """The input that says which tokens are the image's, if the family wants one."""
    layers: str = "model.language_model.layers"
    norms: tuple[str, ...] = ()
    notable: str = ""
    """What its layers have that Llama's have not."""
    refused: str = ""
    """Why no direction is computed for it: words of the error."""
    tower: str = ""
    """For some families: the vision tower, which runs on pixels before the embeddings are merged."""
    writes: tuple[str, ...] = ()
    """For some families: the submodules of a decoder layer whose outputs are added to the stream, in that order."""
    adds_between_layers: bool = False
    """Whether the model itself adds to the stream between decoder layers."""


def build_vision(
    family: VisionFamily, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """A model of the family with random, non-degenerate weights, in evaluation mode; `config` goes over the family's."""
    torch.manual_seed(seed)
    text = small(family.text, **{**family.text_config, **config.pop("text_config", {})})
    chosen = {**family.config, "vision_config": dict(family.vision), "text_config": text.to_dict(), **config}
    model = AutoModelForImageTextToText.from_config(small(family.model_type, **chosen))
    return randomise(model, family.layers, SCALE, seed).to(dtype)


def inputs_for(family: VisionFamily, text: Sequence[int], tiles: Tensor) -> dict[str, Tensor]:
    """The model's inputs for text tokens after an image, a batch of one, not padded.

    `tiles` is (tile, 3, height, width): one, SIDE pixels wide and high, except where a family divides large images into
    several (lists and InternVL) or takes them as they are (Qwen).
    """
    pieces = tiles.shape[-2:].numel() // 64 if family.pixels == "patches" else len(tiles) * family.image_tokens
    ids = torch.tensor([[START, *[IMAGE] * pieces, END, *text]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_LAYOUTS[family.pixels](tiles)}
    if family.model_type == "paligemma":  # what is to be learnt: nothing, it is all prompt
        inputs["token_type_ids"] = torch.zeros_like(ids)
    elif family.types:
        inputs[family.types] = (ids == IMAGE).long()
    return inputs


def _listed(tiles: Tensor) -> dict[str, Tensor]:
    all_ranks = torch.ones(1, len(tiles), *tiles.shape[-2:], dtype=torch.long)
    return {"pixel_values": tiles[None], "pixel_attention_mask": all_ranks}


def _sized(tiles: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": tiles, "image_sizes": torch.tensor([list(tiles.shape[-2:])])}


def _twice(tiles: Tensor) -> dict[str, Tensor]:
    """The whole image and one part of it, which is all of it."""
    return {"pixel_values": torch.stack([tiles[0], tiles[0]])[None], "image_sizes": torch.tensor([[SIDE, SIDE]])}


def _patched(tiles: Tensor) -> dict[str, Tensor]:
    rows, columns = (size // PATCH for size in tiles.shape[-2:])
    return {"pixel_values": _merged_patches(tiles[0]), "image_grid_thw": torch.tensor([[1, rows, columns]])}


def _still_patches(tiles: Tensor) -> dict[str, Tensor]:
    rows, columns = (size // PATCH for size in tiles.shape[-2:])
    squares = tiles[0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # channel, row, column, y, x
    patches = squares.permute(1, 2, 0, 3, 4).reshape(rows * columns, 3, PATCH, PATCH)
    return {"pixel_values": patches.contiguous(), "image_grid_thw": torch.tensor([[1, rows, columns]])}


def _placed(tiles: Tensor) -> dict[str, Tensor]:
    patches = _still_patches(tiles)["pixel_values"].flatten(1)[None]
    grid = torch.cartesian_prod(torch.arange(SIDE // PATCH), torch.arange(SIDE // PATCH))
    return {"pixel_values": patches, "image_position_ids": grid[None]}


def _shaped(tiles: Tensor) -> dict[str, Tensor]:
    patches = _still_patches(tiles)["pixel_values"].flatten(1)[None]
    shape = torch.tensor([[SIDE // PATCH, SIDE // PATCH]])
    return {
        "pixel_values": patches,
        "spatial_shapes": shape,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
    }


def _aspects(tiles: Tensor) -> dict[str, Tensor]:
    return {
        "pixel_values": tiles[None, None],
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
    }


_LAYOUTS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "image": lambda tiles: {"pixel_values": tiles},
    "list": _listed,
    "sized": _sized,
    "twice": _twice,
    "patches": _patched,
    "still patches": _still_patches,
    "placed patches": _placed,
    "shaped patches": _shaped,
    "aspects": _aspects,
}


def _merged_patches(image: Tensor, size: int = PATCH, frames: int = 2) -> Tensor:
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
