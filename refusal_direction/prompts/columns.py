"""The text of a prompt in a row of a data set, which may have it in two columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["PROMPT_COLUMNS", "UnusableRowError", "check_names", "has_prompt_column", "normalised", "text_of"]

PROMPT_COLUMNS = ("instruction", "prompt", "text", "goal", "behavior", "forbidden_prompt", "question")
"""Column names of prompts, in any case, in order of preference."""

_JOINED = {
    ("instruction", "input"): "{0}\n\n{1}",  # Alpaca
    ("instruction", "context"): "{0}\n\n{1}",  # Dolly
    ("behavior", "contextstring"): "{1}\n\n---\n\n{0}",  # HarmBench
    ("prompt", "context"): "{1}\n\n---\n\n{0}",  # HarmBench on the Hub
    ("question", "context"): "{1}\n\n{0}",  # SQuAD
}
"""Columns that make one prompt together, and how the authors of those sets join them."""


class UnusableRowError(Exception):
    """A row gives no prompt, or more than one. Internal: readers of files add the place of the row."""


def normalised(name: object) -> str:
    """The name of a column as it is compared: without case, and without white space around it."""
    return str(name).strip().lower()


def has_prompt_column(names: Iterable[object]) -> bool:
    """Whether one of the columns is known to hold prompts."""
    return not set(PROMPT_COLUMNS).isdisjoint(map(normalised, names))


def check_names(names: Iterable[object]) -> None:
    """Raise UnusableRowError if two columns have one name, since only one of them would be read."""
    counts = Counter(map(normalised, names))
    twice = [name for name, count in counts.items() if name and count > 1]
    if twice:
        raise UnusableRowError(f"has two columns named {twice[0]!r}. Rename or remove one")


def text_of(row: Mapping[Any, Any]) -> object:
    """The prompt of a row, joined from two columns where its set has it in two; not text if the column holds something else.

    Raises UnusableRowError if there is no column of prompts, or the second column is not text.
    """
    check_names(row)
    values = {normalised(name): value for name, value in row.items()}
    first = next((name for name in PROMPT_COLUMNS if name in values), None)
    if first is None:
        others = ", ".join(PROMPT_COLUMNS[1:])
        raise UnusableRowError(f"has no 'instruction' (nor {others}), but {', '.join(map(repr, row)) or 'nothing'}")
    for (prompt, second), joined in _JOINED.items():
        if prompt == first and not _is_empty(values.get(second)):
            return _joined(joined, values[first], second, values[second])
    return values[first]


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _joined(joined: str, prompt: object, second: str, more: object) -> object:
    if not isinstance(more, str):
        raise UnusableRowError(f"has a {second!r}, which belongs to its prompt, that is not text")
    if not isinstance(prompt, str) or not prompt.strip():
        return prompt
    return joined.format(prompt.strip(), more.strip())
