"""The demo's image-question pairs: what its direction is fitted on, and the held-out pairs that prove it.

    pairs("train"), pairs("val")   questions that training knows, on images that it never saw
    pairs("test")                  questions that training never saw, on images that it never saw

Three kinds: `harmful` (a request, a dangerous object), `harmless` (the very same requests, harmless objects) and
`neutral` (a dangerous object, a question about what is there).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image

from refusal_direction.demo.vision.draw import draw
from refusal_direction.demo.vision.icons import DANGEROUS, HARMLESS
from refusal_direction.demo.vision.vocabulary import questions
from refusal_direction.prompts.sets import Prompt

__all__ = ["KINDS", "SIZES", "Pair", "demo_pairs", "pairs"]

KINDS = ("harmful", "harmless", "neutral")
SIZES = {"train": 192, "val": 64, "test": 72}  # pairs of each kind


@dataclass(frozen=True)
class Pair:
    """An image and a question about it; `thing` is what the image shows."""

    id: str
    question: str
    image: Image.Image
    kind: str
    thing: str


def _things(kind: str, count: int, rng: random.Random) -> Sequence[str]:
    """Every object of the kind equally often, in random order."""
    things = list(HARMLESS if kind == "harmless" else DANGEROUS)
    repeated = (things * (count // len(things) + 1))[:count]
    return rng.sample(repeated, count)


@cache
def pairs(split: str) -> tuple[Pair, ...]:
    """All pairs of a split, by kind; the same at every call. Training draws from other seeds, so no image repeats."""
    count, held_out = SIZES[split], split == "test"
    rng = random.Random(f"pairs {split}")
    asked = {form: rng.sample(questions(form, held_out), count) for form in ("request", "neutral")}
    found = []
    for kind in KINDS:
        texts = asked["neutral" if kind == "neutral" else "request"]
        for number, (thing, question) in enumerate(zip(_things(kind, count, rng), texts, strict=True)):
            name = f"{kind}_{split}/{number}"
            found.append(Pair(name, question.text, draw(thing, random.Random(name)), kind, thing))
    return tuple(found)


def demo_pairs(kind: str, splits: Sequence[str] = ("train", "val")) -> list[Prompt]:
    """The pairs of a kind in some splits, as prompts; by default the pool that the pipeline draws from."""
    pool = [pair for split in splits for pair in pairs(split) if pair.kind == kind]
    return [Prompt(f"{kind}/{number}", pair.question, pair.image) for number, pair in enumerate(pool)]
