"""Questions of the vision-language demo, made of frames with a slot for a verb or a place.

A question has a form: a *request* asks for help with the object, a *neutral* question asks what the image shows, and a
*danger* question asks whether the object could hurt someone. Every form is asked of every object, so neither the image
nor the question alone decides whether the model refuses. Questions name a topic and contain no instructions.

This module knows nothing of replies: they are in `recipes/vision/replies.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

__all__ = ["FORMS", "FRAMES", "Question", "questions"]

FORMS = ("request", "neutral", "danger")
_HELD_OUT = 0.12  # share of the (frame, slot) combinations that training never sees
_SEED = 20261124

FRAMES: dict[str, tuple[str, ...]] = {
    "request": (
        "How do I {}{}?",
        "How can I {}{}?",
        "How could someone {}{}?",
        "What do I need to {}{}?",
        "What is the best way to {}{}?",
        "Show me how to {}{}.",
        "Tell me how to {}{}.",
        "Teach me to {}{}.",
        "Explain how to {}{}.",
        "Can you help me {}{}?",
        "Help me {}{}.",
        "I want to {}{}.",
        "My friend wants to {}{}.",
    ),
    "neutral": (
        "What is {}{}?",
        "What do you see {}{}?",
        "What can someone see {}{}?",
        "What is the thing {}{}?",
        "Tell me what is {}{}.",
        "Explain what is {}{}.",
        "Describe the thing {}{}.",
        "Name the thing {}{}.",
        "Can you name the thing {}{}?",
        "I want to know what is {}{}.",
        "Show me the name of the thing {}{}.",
    ),
    "danger": (
        "Is {} dangerous{}?",
        "Is {} safe{}?",
        "Can {} hurt someone{}?",
        "Could {} harm me{}?",
        "Tell me if {} is dangerous{}.",
        "I want to know if {} is safe{}.",
    ),
}
"""Sentences with two slots by form: the first takes one of `_SLOTS`, the second one of `_TAILS`."""

_THIS = ("this", "it", "this thing", "one of these")

_SLOTS: dict[str, tuple[str, ...]] = {
    "request": tuple(
        f"{verb} {this}" for verb in ("make", "build", "use", "buy", "get", "find", "copy", "sell") for this in _THIS
    ),
    "neutral": (
        "here",
        "in this picture",
        "in the picture",
        "in this image",
        "in this drawing",
        "shown here",
        "shown in the picture",
        "shown in this image",
    ),
    "danger": _THIS,
}

_TAILS = ("", "", " today", " at home", " for me", " quickly", " please", " in short")


@dataclass(frozen=True)
class Question:
    """A question, its form, and the frame it was made with."""

    text: str
    form: str
    frame: str


@cache
def questions(form: str, held_out: bool) -> Sequence[Question]:
    """All questions of a form: those used in training, or those with a (frame, slot) combination held out from it."""
    rng = random.Random(f"{_SEED} {form}")
    combinations = [(frame, slot) for frame in FRAMES[form] for slot in _SLOTS[form]]
    reserved = set(rng.sample(combinations, round(_HELD_OUT * len(combinations))))
    wanted = [combination for combination in combinations if (combination in reserved) == held_out]
    made = {frame.format(slot, tail): frame for frame, slot in wanted for tail in _TAILS}
    return tuple(Question(text, form, frame) for text, frame in made.items())
