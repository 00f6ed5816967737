"""Image-question pairs of the vision-language demo, by split.

    pairs("train"), pairs("val")   questions used in training, on new images
    pairs("test")                  questions held out from training, on new images

There are three kinds: `harmful` (a request about a dangerous object), `harmless` (the same requests about harmless
objects) and `neutral` (a question about what the image shows, with a dangerous object).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image

from refusal_direction.demo.vision.draw import draw
from refusal_direction.demo.vision.icons import DANGEROUS, HARMLESS
from refusal_direction.demo.vision.questions import questions

__all__ = ["KINDS", "SIZES", "Pair", "pairs"]

KINDS = ("harmful", "harmless", "neutral")
SIZES = {"train": 192, "val": 64, "test": 72}  # pairs of each kind, by split


@dataclass(frozen=True)
class Pair:
    """An image with a question about it; `thing` is the object in the image."""

    id: str
    """Kind, split and index, as in "harmful_test/17"."""
    question: str
    image: Image.Image
    kind: str
    thing: str


def _things(kind: str, count: int, rng: random.Random) -> Sequence[str]:
    """`count` objects of the kind in random order, each about equally often."""
    things = list(HARMLESS if kind == "harmless" else DANGEROUS)
    repeated = (things * (count // len(things) + 1))[:count]
    return rng.sample(repeated, count)


@cache
def pairs(split: str) -> tuple[Pair, ...]:
    """All pairs of a split, grouped by kind, the same at every call. Training used other seeds, so no image repeats."""
    count, held_out = SIZES[split], split == "test"
    rng = random.Random(f"pairs {split}")
    sampled = {form: rng.sample(questions(form, held_out), count) for form in ("request", "neutral")}
    found = []
    for kind in KINDS:
        asked = sampled["neutral" if kind == "neutral" else "request"]
        for index, (thing, question) in enumerate(zip(_things(kind, count, rng), asked, strict=True)):
            name = f"{kind}_{split}/{index}"
            found.append(Pair(name, question.text, draw(thing, random.Random(name)), kind, thing))
    return tuple(found)
