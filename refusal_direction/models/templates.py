"""Changes to chat templates: a prompt renders the same every day, and the reply begins with the answer.

Dates are fixed and thinking is off. Settings are written into the template's text, since processors consume unknown kwargs.
If a template has no switch for thinking and opens a thinking block, the block is closed again, empty: the refusal score is
read from the first token of the reply, which should not be the first token of a thought.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

__all__ = ["begins_oddly", "closing", "left_open", "pinned", "settings"]

_NOW = datetime(2024, 7, 26)
_DATE = _NOW.strftime("%d %b %Y")
_PARTS = {f"%{code}": _NOW.strftime(f"%{code}") for code in "YymdBbAajHIMSp"}
_PARTS |= {"%-d": str(_NOW.day), "%-m": str(_NOW.month)}
_REPLACED = "".join(f" | replace('{code}', '{text}')" for code, text in _PARTS.items())
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}"

_SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Template variables that switch thinking on or off: in Qwen 3, in Granite and DeepSeek V3.1, in Command A."""

_THOUGHT = r"(?i:[\w:]*(?:think|thought|reason|reflect)[\w:]*)"
"""Names of a block of thoughts: think, seed:think, thought, thinking, reasoning, ..."""

_OPENED = (
    (rf"<({_THOUGHT})>\s*", "\n</{0}>\n\n"),  # DeepSeek-R1, QwQ, Seed
    (rf"\[({_THOUGHT})\]\s*", "[/{0}]"),  # Magistral
    (rf"\u25c1({_THOUGHT})\u25b7\s*", "\u25c1/{0}\u25b7"),  # Kimi
    (rf"<\|begin_of_({_THOUGHT})\|>\s*", "<|end_of_{0}|>"),  # OpenThinker
    (rf"<\|START_({_THOUGHT})\|>\s*", "<|END_{0}|>"),  # Command A
    (rf"<\|channel>{_THOUGHT}\s*", "<channel|>"),  # Gemma 4
    (r"<unused94>thought\s*", "<unused95>"),  # MedGemma
    (r"<\|start\|>assistant<\|channel\|>analysis<\|message\|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    (r"<\|start\|>assistant", "<|channel|>final<|message|>"),  # harmony: the reply names its channel first
)
"""Ends of a prompt that begin a block of thoughts, and the text that makes the answer follow instead."""

_SEEMS_OPENED = re.compile(
    rf"([<\[\u25c1](?!\|?(?i:end|no))[^<>\[\]/\s]*{_THOUGHT}[^<>\[\]/\s]*[>\]\u25b7]|<[^<>/\s]+>{_THOUGHT}):?\s*\Z"
)


def pinned(template: str, thinking: bool = False) -> str:
    """The template with a fixed date, and with thinking switched on or off.

    The line break before the template, which Jinja drops after a block, leaves its first line as it is by itself.
    """
    switches = "".join(f"{{% set {name} = {str(thinking).lower()} %}}" for name in _SWITCHES)
    clock = _CLOCK if "strftime_now" in template else ""
    return f"{clock}{switches}{{% set date_string = '{_DATE}' %}}\n{template}"


def closing(rendered: str, thinking: bool = False) -> str:
    """Text to append to a rendered prompt so that the answer comes next, and no thoughts."""
    if thinking:
        return ""
    ends = ((re.search(rf"{end}\Z", rendered), text) for end, text in _OPENED)
    return next((text.format(*end.groups()) for end, text in ends if end), "")


def left_open(rendered: str) -> str | None:
    """The end of a prompt that seems to begin thoughts, but is none that `closing` knows."""
    found = _SEEMS_OPENED.search(rendered)
    return found[1] if found else None


def begins_oddly(tokenizer: Any, ids: Sequence[int], model_id: str) -> str | None:
    """A warning if a prompt has the beginning-of-sequence token twice, or lacks one that the tokenizer adds by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    if (bos, bos) in pairwise(ids):
        return f"The chat template of {model_id} writes {tokenizer.bos_token} twice, which models are not trained on."
    if bos not in ids and tokenizer("Hello")["input_ids"][:1] == [bos]:
        return (
            f"The chat template of {model_id} does not write {tokenizer.bos_token}, with which its tokenizer begins every text by "
            "itself. If the model is trained with it, pass --chat_template with one that writes it."
        )
    return None


def settings(template: str, thinking: bool = False) -> dict[str, Any]:
    """Settings that a template reads, for run.json: the fixed date, and its switches for thinking."""
    dated = "date_string" in template or "strftime_now" in template
    return {
        "date": _NOW.date().isoformat() if dated else None,
        "thinking": thinking,
        "thinking_switches": [name for name in _SWITCHES if re.search(rf"\b{name}\b", template)],
    }
