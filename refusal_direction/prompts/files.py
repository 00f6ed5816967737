"""Reading prompts from files of their own."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refusal_direction.errors import PromptFileError
from refusal_direction.prompts.columns import UnusableRowError, text_of
from refusal_direction.prompts.formats import SHAPES, json_lines, parquet_rows, rows, sniffed
from refusal_direction.prompts.sets import Prompt, encodable

__all__ = ["metadata_lines", "read_prompts"]

_UTF_16_OR_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # that of UTF-32 LE begins as UTF-16 LE
_PARQUET = b"PAR1"
_NOT_TEXT = {
    _PARQUET: "is a Parquet table. Give it a name that ends in .parquet.",
    b"PK\x03\x04": "is a zip archive or a spreadsheet. Unpack it, or save the sheet as CSV.",
    b"\x1f\x8b": "is compressed. Unpack it: gunzip.",
}
"""Messages for content that is not text, by its first bytes."""
_DATA_SET = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file, in order and stripped; an id is the stem of the file and the index in it.

    The format is that of the suffix; without a suffix, as of a pipe, it is found in the content.

    Raises PromptFileError, which names the file and the line or entry, if it is missing, empty or malformed.
    """
    path = Path(path)
    form, found = _rows(path, _content(path))
    prompts = tuple(_checked(path, where, row, form) for where, row in found)
    if not prompts:
        raise PromptFileError(f"{path}: holds no prompts. Expected {SHAPES[form]}.")
    return tuple(Prompt(f"{path.stem}/{index}", prompt) for index, prompt in enumerate(prompts))


def metadata_lines(path: Path, expected: str) -> Iterator[tuple[int, Any]]:
    """Number and JSON value of each line of a metadata.jsonl that is not empty; `expected` says what each should hold.

    Raises PromptFileError if the file cannot be read or a line is not JSON.
    """
    return json_lines(path, _decoded(path, _content(path)), expected)


def _missing(path: Path) -> str:
    """The message that a path names nothing; that of a data set on the Hub is said to be one."""
    if not _DATA_SET.fullmatch(path.as_posix()) or path.suffix.lower() in SHAPES or path.parent.exists():
        return f"{path}: no such file. Check the path."
    return (
        f"{path}: no such file. If it is the id of a data set on the Hub, save its prompts to a file and give that: python -c "
        f"\"import datasets; datasets.load_dataset('{path.as_posix()}', split='train').to_json('prompts.jsonl')\""
    )


def _rows(path: Path, content: bytes) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The format of a file, and its rows."""
    form = path.suffix.lower() if path.suffix.lower() in SHAPES else ""  # a pipe may have any
    if form == ".parquet" or (not form and content.startswith(_PARQUET)):
        return ".parquet", parquet_rows(path, content)
    text = _decoded(path, content)
    form = form or sniffed(text)
    return form, rows(path, text, form)


def _content(path: Path) -> bytes:
    """The bytes of a file, read once, since a pipe can be read only once."""
    try:
        if path.is_dir():
            raise PromptFileError(
                f"{path}: is a folder. Give a file of prompts; for a folder of images use extract_refusal_direction_vlm.py."
            )
        if path.is_char_device() or path.is_block_device():
            raise PromptFileError(f"{path}: is a device. Give a file of prompts.")
        if path.is_file() and path.suffix and path.suffix.lower() not in SHAPES:
            raise PromptFileError(f"{path}: prompt files end in {', '.join(SHAPES)}. Rename or convert it.")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PromptFileError(_missing(path)) from error
    except PermissionError as error:
        raise PromptFileError(f"{path}: may not be read ({error.strerror}). Change its permissions.") from error
    except (OSError, ValueError) as error:
        raise PromptFileError(f"{path}: cannot be read ({error}). Check the path.") from error


def _decoded(path: Path, content: bytes) -> str:
    """The text of a file, with \\n at the ends of its lines."""
    for start, problem in _NOT_TEXT.items():
        if content.startswith(start):
            raise PromptFileError(f"{path}: {problem}")
    convert = f"Save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > new{path.suffix}"
    if content.startswith(_UTF_16_OR_32):
        raise PromptFileError(f"{path}: is text in UTF-16 or UTF-32. {convert}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PromptFileError(
            f"{path}: cannot be read as UTF-8 text (line {line}: {error.reason}). Save it as UTF-8."
        ) from error
    if "\0" in text:
        raise PromptFileError(f"{path}: holds NUL bytes, so it is text in UTF-16, or no text. {convert}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _checked(path: Path, where: str, row: Any, form: str) -> str:
    """The text of a prompt, bare or in columns of a row."""
    try:
        text = text_of(row) if isinstance(row, dict) else row
    except UnusableRowError as error:
        raise PromptFileError(f"{path}: {where} {error}. Expected {SHAPES[form]}.") from error
    if not isinstance(text, str) or not text.strip():
        raise PromptFileError(f"{path}: {where} is empty or not text. Expected {SHAPES[form]}.")
    if not encodable(text):
        raise PromptFileError(
            f"{path}: {where} holds half of a surrogate pair, which cannot be encoded as text. Fix its \\u escapes."
        )
    return text.strip()
