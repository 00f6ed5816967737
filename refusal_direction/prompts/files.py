"""Reading prompts from .json, .jsonl, .csv and .txt files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refusal_direction.errors import PromptFileError
from refusal_direction.prompts.sets import Prompt, encodable

__all__ = ["json_lines", "read_prompts"]

_KEYS = ("instruction", "prompt", "text", "goal", "behavior")
"""Column names of prompts, in any case, in order of preference."""
_SHAPES = {
    ".json": 'a list of strings, or of objects with an "instruction"',
    ".jsonl": 'one JSON object with an "instruction" a line',
    ".csv": "cells with commas between them, and a header line with a column named instruction",
    ".txt": "one prompt a line",
}


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file, in order and stripped; an id is the stem of the file and the index in it.

    Raises PromptFileError, which names the file and the line or entry, if it is missing, empty or malformed.
    """
    path = Path(path)
    if path.suffix not in _SHAPES:
        raise PromptFileError(f"{path}: prompt files end in {', '.join(_SHAPES)}. Rename or convert it.")
    text = _text_of(path)
    prompts = tuple(_checked(path, where, entry) for where, entry in _entries(path, text))
    if not prompts:
        raise PromptFileError(f"{path}: holds no prompts. Expected {_SHAPES[path.suffix]}.")
    return tuple(Prompt(f"{path.stem}/{index}", prompt) for index, prompt in enumerate(prompts))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise PromptFileError(f"{path}: no such file. Check the path.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"{path}: cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and JSON value of each line that is not empty.

    Raises PromptFileError if the file cannot be read or a line is not JSON.
    """
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if line.strip():
            yield number, _parsed(path, line, number)


def _entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Each entry, and its place in the file for messages."""
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: U+2028 may stand in a prompt
    if path.suffix == ".txt":
        yield from ((f"line {number}", line) for number, line in lines if line.strip())
    elif path.suffix == ".jsonl":
        yield from ((f"line {number}", value) for number, value in json_lines(path))
    elif path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if None in row:
                    raise PromptFileError(
                        f"{path}: line {reader.line_num} has more cells than the header. Put prompts with commas in quotes."
                    )
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise PromptFileError(
                f"{path}: line {reader.line_num + 1} cannot be read ({error}). Close every quote, and double those inside."
            ) from error
    elif text.strip():
        entries = _parsed(path, text, 1)
        if not isinstance(entries, list):
            raise PromptFileError(f"{path}: is a JSON {type(entries).__name__}. Expected {_SHAPES['.json']}.")
        yield from ((f"entry {index}", entry) for index, entry in enumerate(entries))


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise PromptFileError(
            f"{path}: line {line} is not valid JSON ({error.msg}). Expected {_SHAPES[path.suffix]}."
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise PromptFileError(
            f"{path}: line {line} cannot be read ({error}). Expected {_SHAPES[path.suffix]}."
        ) from error
    except RecursionError as error:
        raise PromptFileError(f"{path}: line {line} is nested too deeply. Expected {_SHAPES[path.suffix]}.") from error


def _checked(path: Path, where: str, entry: Any) -> str:
    """The text of a prompt, bare or in a column of a row."""
    if isinstance(entry, dict):
        lowered = {str(key).strip().lower(): value for key, value in entry.items()}
        named = [lowered[key] for key in _KEYS if key in lowered]
        if not named:
            raise PromptFileError(
                f"{path}: {where} has no 'instruction' (nor {', '.join(_KEYS[1:])}), but {', '.join(map(repr, entry)) or 'nothing'}. "
                f"Expected {_SHAPES[path.suffix]}."
            )
        entry = named[0]
    if not isinstance(entry, str) or not entry.strip():
        raise PromptFileError(f"{path}: {where} is empty or not text. Expected {_SHAPES[path.suffix]}.")
    if not encodable(entry):
        raise PromptFileError(
            f"{path}: {where} holds half of a surrogate pair, which cannot be encoded as text. Fix its \\u escapes."
        )
    return entry.strip()
