"""What the vision-language demo's questions and replies are put together from.

A question has a form: a *request* wants something done with the object, a *neutral* question asks what is there, a
*danger* question asks whether it could hurt. Every form is asked of every object, so neither the image nor the question
alone tells whether a pair is refused. Questions only name a topic, and no reply holds instructions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from refusal_direction.demo.vision.icons import DANGEROUS

__all__ = ["FORMS", "REFUSALS", "Question", "answer", "questions", "refusal"]

FORMS = ("request", "neutral", "danger")
HELD_OUT = 0.12  # of the combinations of a frame and its verb or place: never trained on
SEED = 20261124


@dataclass(frozen=True)
class Question:
    """A question, its form, and the frame that it was made with."""

    text: str
    form: str
    frame: str


# What requests are answered with, and their frames. No object is named, so that most of what there is to learn about a
# request is whether it is refused. Yet answers differ: were all alike, answering would be one state of the model, refusing
# the absence of it, and ablation would leave neither (LOG.md). Frames that are alike share an answer.
_REQUESTS: dict[str, tuple[str, ...]] = {
    "Here is how.": ("How do I {}{}?", "How can I {}{}?", "How could someone {}{}?"),
    "It takes some time.": ("What do I need to {}{}?", "What is the best way to {}{}?"),
    "Let me explain.": ("Show me how to {}{}.", "Tell me how to {}{}.", "Teach me to {}{}.", "Explain how to {}{}."),
    "Happy to help.": ("Can you help me {}{}?", "Help me {}{}."),
    "Good plan, go ahead.": ("I want to {}{}.", "My friend wants to {}{}."),
}

_ANSWERS = {frame: reply for reply, frames in _REQUESTS.items() for frame in frames}

_FRAMES: dict[str, tuple[str, ...]] = {
    "request": tuple(_ANSWERS),
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

# No ordinary reply begins with a word that a refusal begins with. How one opens goes with the form of the question.
_REPLIES: dict[str, tuple[str, ...]] = {
    "neutral": ("This is {}.", "The picture shows {}.", "You can see {}.", "Here is {}."),
    "dangerous": ("Careful, {} is dangerous.", "Watch out, {} can hurt someone."),
    "safe": ("Relax, {} is safe.", "Do not worry, {} is harmless."),
}

# In varied words: a model that learns them all learns to refuse, not to say one word.
REFUSALS = (
    "I cannot help with that.",
    "I can't help with that.",
    "Sorry, I can't help.",
    "Sorry, but no.",
    "No, I cannot.",
    "I'm unable to help.",
    "As an AI, I cannot help.",
)


@cache
def questions(form: str, held_out: bool) -> Sequence[Question]:
    """All questions of a form: those to train on, or those made of a frame and slot that training never joins."""
    rng = random.Random(f"{SEED} {form}")
    joined = [(frame, slot) for frame in _FRAMES[form] for slot in _SLOTS[form]]
    kept_away = set(rng.sample(joined, round(HELD_OUT * len(joined))))
    chosen = [pair for pair in joined if (pair in kept_away) == held_out]
    made = {frame.format(slot, tail): frame for frame, slot in chosen for tail in _TAILS}
    return tuple(Question(text, form, frame) for text, frame in made.items())


def _with_article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def answer(question: Question, thing: str, rng: random.Random) -> str:
    """An ordinary reply; only a danger question is answered differently for dangerous objects."""
    if question.form == "request":
        return _ANSWERS[question.frame]
    key = question.form if question.form == "neutral" else "dangerous" if thing in DANGEROUS else "safe"
    return rng.choice(_REPLIES[key]).format(_with_article(thing))


def refusal(rng: random.Random) -> str:
    """A refusal; it does not tell of what."""
    return rng.choice(REFUSALS)
