"""Changes to chat templates: a prompt renders the same every day, and the reply begins with the answer.

Dates are fixed and thinking is off. Settings are written into the template's text, since processors consume unknown kwargs.
If a template has no switch for thinking and opens a thinking block, the block is closed again, empty: the refusal score is
read from the first token of the reply, which should not be the first token of a thought.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

__all__ = ["closing", "pinned", "settings"]

_NOW = datetime(2024, 7, 26)
_DATE = _NOW.strftime("%d %b %Y")
_PARTS = {f"%{code}": _NOW.strftime(f"%{code}") for code in "YymdBbAajHIMSp"}
_PARTS |= {"%-d": str(_NOW.day), "%-m": str(_NOW.month)}
_REPLACED = "".join(f" | replace('{code}', '{text}')" for code, text in _PARTS.items())
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}"

_SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Template variables that switch thinking on or off: in Qwen 3, in Granite and DeepSeek V3.1, in Command A."""

_OPENED = (
    (re.compile(r"<think>\s*\Z"), "\n</think>\n\n"),  # DeepSeek-R1, QwQ
    (
        re.compile(r"<\|start\|>assistant\Z"),
        "<|channel|>final<|message|>",
    ),  # harmony: the reply names its channel first
)
"""Ends of a prompt that begin a thinking block, and the text that makes the answer follow instead."""


def pinned(template: str, thinking: bool = False) -> str:
    """The template with a fixed date, and with thinking switched on or off."""
    switches = "".join(f"{{% set {name} = {str(thinking).lower()} %}}" for name in _SWITCHES)
    clock = _CLOCK if "strftime_now" in template else ""
    return f"{switches}{{% set date_string = '{_DATE}' %}}{clock}{template}"


def closing(rendered: str, thinking: bool = False) -> str:
    """Text to append to a rendered prompt so that the answer comes next, and no thoughts."""
    if thinking:
        return ""
    return next((text for end, text in _OPENED if end.search(rendered)), "")


def settings(template: str, thinking: bool = False) -> dict[str, Any]:
    """Settings that a template reads, for run.json: the fixed date, and its switches for thinking."""
    dated = "date_string" in template or "strftime_now" in template
    return {
        "date": _NOW.date().isoformat() if dated else None,
        "thinking": thinking,
        "thinking_switches": [name for name in _SWITCHES if re.search(rf"\b{name}\b", template)],
    }
