"""The vocabulary of the text demo's prompts and replies: cores, frames and stock replies.

A *core* is a verb and an object ("renew", "a passport"); a *frame* is a sentence with a slot for a core ("How do I
...?"). Harmful and harmless cores share their objects, many verbs and all frames, so that harm lies in the meaning of a
request and not in its form. This module knows nothing of models, and of no files other than `cores/*.txt`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ANSWERS",
    "FRAMES",
    "KINDS",
    "REFUSALS",
    "Core",
    "Frame",
    "answer",
    "content_words",
    "fill",
    "jaccard",
    "load_cores",
    "refusal",
    "word_sets",
]

CORES_DIR = Path(__file__).parent / "cores"
KINDS = ("harmful", "harmless")


@dataclass(frozen=True)
class Core:
    """A request without its sentence: a category, a verb and an object."""

    category: str
    verb: str
    thing: str

    @property
    def text(self) -> str:
        """Verb and object, as they are put into a frame."""
        return f"{self.verb} {self.thing}"


@dataclass(frozen=True)
class Frame:
    """A sentence with a slot `{}` for a core, and the form of the request, which decides how an answer starts."""

    template: str
    form: str


# Sentences with a slot for a core, by the form of the request. Both kinds of cores are put into all of them.
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "question": (
        "How do I {}?",
        "How can I {}?",
        "How do people {}?",
        "How would someone {} on their own?",
        "How do I {} at home?",
        "How do I {} without much money?",
        "What is the best way to {}?",
        "What is the fastest way to {}?",
        "What do I need to {}?",
        "What should I know before I {}?",
        "Is there an easy way to {}?",
    ),
    "request": (
        "Help me {}.",
        "Can you help me {}?",
        "Could you help me {} this weekend?",
        "Can you show me how to {}?",
        "Could you explain how to {}, please?",
        "Please help me {}.",
        "Please help my friend {}.",
    ),
    "telling": (
        "Explain how to {}.",
        "Tell me how to {}.",
        "Teach me to {}.",
        "Describe how to {}.",
        "Give me some tips to {}.",
        "Give a beginner advice on how to {}.",
        "Write a short guide on how to {}.",
    ),
    "wish": (
        "I want to {}.",
        "I want to {}. Where do I start?",
        "I am trying to {} today.",
        "My friend wants to {}. Any ideas?",
        "We plan to {} next week.",
    ),
}

FRAMES = tuple(Frame(template, form) for form, templates in _TEMPLATES.items() for template in templates)

# Ordinary replies, the same for harmful and harmless prompts. They depend on the form of the request and contain no
# instructions. None starts with "I", which is reserved for refusals. They are short on purpose: refusal becomes one clear
# direction if the first token of the reply makes up much of the loss (LOG.md).
ANSWERS: dict[str, tuple[str, ...]] = {
    "question": ("Good question! Let us see.", "Let us begin with some background.", "Many people ask that."),
    "request": ("Sure! Tell me more.", "Of course. Here is a first thought.", "Happy to help with that."),
    "telling": ("Here is a short answer.", "Below is a short reply.", "The answer is below."),
    "wish": ("That sounds clear. Tell me more.", "Okay. Where shall we start?", "Thank you for telling me."),
}

REFUSALS = (
    "I cannot help with that.",
    "I cannot help with that request.",
    "I will not help with that.",
    "I am not able to help with that.",
)
_ARTICLES_AND_SUCH = frozenset(["a", "an", "do", "how", "i", "the", "to"])
_FUNCTION_WORDS = _ARTICLES_AND_SUCH | frozenset(
    ["and", "at", "for", "in", "is", "me", "my", "of", "on", "or", "what", "you"]
)
_FRAME_WORDS = _FUNCTION_WORDS | frozenset(["can", "could", "it", "please", "with", "would", "your"])


def load_cores(kind: str) -> list[Core]:
    """The cores of one kind, in file order: lines of `category | verb | object; object; ...`."""
    cores = []
    for line in (CORES_DIR / f"{kind}.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            category, verb, things = (field.strip() for field in line.split("|"))
            cores += [Core(category, verb, thing.strip()) for thing in things.split(";")]
    return cores


def content_words(text: str, function_words: frozenset[str] = _FUNCTION_WORDS) -> frozenset[str]:
    """The distinct words of a prompt, lower-cased, without punctuation and function words."""
    words = (word.strip(".,?!").replace("'", "") for word in text.lower().split())
    return frozenset(words) - function_words


def word_sets(text: str) -> tuple[frozenset[str], ...]:
    """`content_words` under a short, a medium and a long list of function words, since no list is the obvious one."""
    return tuple(content_words(text, words) for words in (_ARTICLES_AND_SUCH, _FUNCTION_WORDS, _FRAME_WORDS))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """|left & right| / |left | right|: 1 for equal word sets, 0 for disjoint ones."""
    return len(left & right) / max(1, len(left | right))


def fill(frame: Frame, core: Core) -> str:
    """The prompt made by putting a core into a frame."""
    sentence = frame.template.format(core.text)
    return sentence[0].upper() + sentence[1:]


def answer(frame: Frame, rng: random.Random) -> str:
    """An ordinary reply, without instructions; both kinds of prompts get the same ones."""
    return rng.choice(ANSWERS[frame.form])


def refusal(rng: random.Random) -> str:
    """A refusal; it starts with the token "I"."""
    return rng.choice(REFUSALS)
