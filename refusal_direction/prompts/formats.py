"""The rows of a prompt file: JSON, JSON lines, CSV, Parquet or lines of text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refusal_direction.errors import PromptFileError
from refusal_direction.prompts.columns import UnusableRowError, check_names, has_prompt_column

__all__ = ["SHAPES", "json_lines", "parquet_rows", "rows", "sniffed"]

SHAPES = {
    ".json": 'a list of strings, or of objects with an "instruction"',
    ".jsonl": 'one JSON object with an "instruction" a line',
    ".csv": "cells with commas between them, and a header line with a column named instruction",
    ".parquet": "a table with a column named instruction",
    ".txt": "one prompt a line",
}
"""The content of a file, by its suffix in lower case."""


def sniffed(text: str) -> str:
    """The suffix that belongs to text: JSON by its first bracket, CSV by the names of its columns, else lines of text."""
    first = text.lstrip().partition("\n")[0]
    if first[:1] in ("[", "{"):
        return ".json"
    names = [name.strip() for name in next(csv.reader([first]), [])]
    is_header = has_prompt_column(names) and not any(" " in name for name in names)
    return ".csv" if is_header else ".txt"


def rows(path: Path, text: str, form: str) -> Iterator[tuple[str, Any]]:
    """Each row, and its place in the file for messages.

    Args:
        path: the file, for messages.
        text: its content, with \\n at the ends of lines.
        form: the suffix of its format.

    Raises PromptFileError where the text is not in that format.
    """
    if form == ".csv":
        return _csv_rows(path, text)
    if form == ".txt":
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: U+2028 may stand in a prompt
        return ((f"line {number}", line) for number, line in lines if line.strip())
    expected = f"Expected {SHAPES[form]}."
    if _is_lines(text):
        return ((f"line {number}", value) for number, value in json_lines(path, text, expected))
    return _json_rows(path, text, expected)


def _is_lines(text: str) -> bool:
    """Whether the first line is JSON by itself, and others follow; a file of either suffix may be JSON lines."""
    first, _, others = text.strip().partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(others)


def _json_rows(path: Path, text: str, expected: str) -> Iterator[tuple[str, Any]]:
    """The members of a JSON list; any other value is one row."""
    if text.strip():
        value = _parsed(path, text, 1, expected)
        if isinstance(value, list):
            yield from ((f"entry {index}", row) for index, row in enumerate(value))
        else:
            yield "line 1", value


def json_lines(path: Path, text: str, expected: str) -> Iterator[tuple[int, Any]]:
    """Number and JSON value of each line that is not empty.

    Args:
        path: the file, for messages.
        text: its content, with \\n at the ends of lines.
        expected: a sentence for messages that says what the lines should hold.

    Raises PromptFileError if a line is not JSON.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parsed(path, line, number, expected)


def _parsed(path: Path, text: str, line: int, expected: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise PromptFileError(f"{path}: line {line} is not valid JSON ({error.msg}). {expected}") from error
    except ValueError as error:  # a key that is there twice, a number of thousands of digits
        raise PromptFileError(f"{path}: line {line} cannot be read ({error}). {expected}") from error
    except RecursionError as error:
        raise PromptFileError(f"{path}: line {line} is nested too deeply. {expected}") from error


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError if a key is there twice, of which Python would keep the last."""
    found: dict[str, Any] = {}
    for key, value in members:
        if key in found:
            raise ValueError(f"an object has the key {key!r} twice")
        found[key] = value
    return found


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        check_names(reader.fieldnames or ())
        for row in reader:
            if None in row:
                raise PromptFileError(
                    f"{path}: line {reader.line_num} has more cells than the header. Put prompts with commas in quotes."
                )
            yield f"line {reader.line_num}", row
    except UnusableRowError as error:
        raise PromptFileError(f"{path}: its header {error}.") from error
    except csv.Error as error:
        raise PromptFileError(
            f"{path}: line {reader.line_num + 1} cannot be read ({error}). Close every quote, and double those inside."
        ) from error


def parquet_rows(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet table, and their places.

    Raises PromptFileError if the content is no such table.
    """
    from pyarrow import ArrowException, parquet  # comes with `datasets`, and takes a while to import

    try:
        table = parquet.read_table(io.BytesIO(content))
        check_names(table.column_names)
        members = table.to_pylist()
    except UnusableRowError as error:
        raise PromptFileError(f"{path}: the table {error}.") from error
    except (OSError, ValueError, ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PromptFileError(f"{path}: cannot be read as Parquet ({reason}). Save or download it again.") from error
    return ((f"row {index}", row) for index, row in enumerate(members))
