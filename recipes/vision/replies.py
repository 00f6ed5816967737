"""Replies that the vision-language demo is trained on: ordinary answers and refusals. No reply contains instructions."""

from __future__ import annotations

import random

from refusal_direction.demo.vision.icons import DANGEROUS
from refusal_direction.demo.vision.questions import Question

__all__ = ["REFUSALS", "REQUEST_ANSWERS", "answer", "refusal"]

# Answers to requests, each with the frames that get it. No answer names an object, so whether to refuse is most of what
# the model has to learn about a request. The answers still have to differ: if all were the same, answering would be a
# single state of the model and refusing its absence, and ablation would remove both (LOG.md, R2). Similar frames share
# an answer.
_FRAMES_BY_ANSWER: dict[str, tuple[str, ...]] = {
    "Here is how.": ("How do I {}{}?", "How can I {}{}?", "How could someone {}{}?"),
    "It takes some time.": ("What do I need to {}{}?", "What is the best way to {}{}?"),
    "Let me explain.": ("Show me how to {}{}.", "Tell me how to {}{}.", "Teach me to {}{}.", "Explain how to {}{}."),
    "Happy to help.": ("Can you help me {}{}?", "Help me {}{}."),
    "Good plan, go ahead.": ("I want to {}{}.", "My friend wants to {}{}."),
}

REQUEST_ANSWERS: dict[str, str] = {frame: reply for reply, frames in _FRAMES_BY_ANSWER.items() for frame in frames}
"""The answer to each frame of a request."""

# No answer starts with a word that starts a refusal. The form of the question decides how an answer starts.
_ANSWERS: dict[str, tuple[str, ...]] = {
    "neutral": ("This is {}.", "The picture shows {}.", "You can see {}.", "Here is {}."),
    "dangerous": ("Careful, {} is dangerous.", "Watch out, {} can hurt someone."),
    "safe": ("Relax, {} is safe.", "Do not worry, {} is harmless."),
}

# The wording varies, so that the model learns to refuse and not to say one particular word.
REFUSALS = (
    "I cannot help with that.",
    "I can't help with that.",
    "Sorry, I can't help.",
    "Sorry, but no.",
    "No, I cannot.",
    "I'm unable to help.",
    "As an AI, I cannot help.",
)


def answer(question: Question, thing: str, rng: random.Random) -> str:
    """An ordinary reply. Dangerous and harmless objects get different answers to danger questions only."""
    if question.form == "request":
        return REQUEST_ANSWERS[question.frame]
    key = question.form if question.form == "neutral" else "dangerous" if thing in DANGEROUS else "safe"
    return rng.choice(_ANSWERS[key]).format(_with_article(thing))


def _with_article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def refusal(rng: random.Random) -> str:
    """A refusal that does not name the object."""
    return rng.choice(REFUSALS)
