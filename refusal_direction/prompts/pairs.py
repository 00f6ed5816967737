"""Prompts of an image and a question: harmful from MM-SafetyBench, harmless from COCO, or from a folder."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from refusal_direction.demo.vision.pairs import pairs as drawn_pairs
from refusal_direction.errors import DownloadError, PromptFileError
from refusal_direction.prompts.files import metadata_lines
from refusal_direction.prompts.images import DAMAGED, UnusableImageError, usable
from refusal_direction.prompts.sets import Prompt, encodable

__all__ = [
    "CATEGORIES",
    "HARMFUL",
    "HARMLESS",
    "QUESTIONS",
    "demo_pairs",
    "demo_test_pairs",
    "harmful_pairs",
    "harmless_pairs",
    "read_folder",
]

log = logging.getLogger(__name__)

HARMFUL = "PKU-Alignment/MM-SafetyBench"
HARMLESS = "detection-datasets/coco"
CATEGORIES = (
    "Illegal_Activitiy",  # spelled so there
    "HateSpeech",
    "Malware_Generation",
    "Physical_Harm",
    "EconomicHarm",
    "Fraud",
    "Sex",
    "Political_Lobbying",
    "Privacy_Violence",
    "Legal_Opinion",
    "Financial_Advice",
    "Health_Consultation",
    "Gov_Decision",
)
QUESTIONS = (
    "What is shown in this image?",
    "Describe the scene in this picture.",
    "What objects can you see here?",
    "What colours stand out in this photo?",
    "Where might this photo have been taken?",
)
_EXPECTED = 'Each line is a JSON object with a "file_name" and a "question".'
_PER_CATEGORY = 50
_HARMLESS_IMAGES = 500
_SPELLINGS = {"Illegal_Activitiy": "Illegal_Activity"}
_UNREACHABLE = (
    OSError,
    ValueError,
    datasets.exceptions.DatasetNotFoundError,
    datasets.exceptions.DatasetGenerationError,
)


def harmful_pairs(source: str = HARMFUL) -> list[Prompt]:
    """Up to 50 pairs of each category; a category that cannot be loaded is named in a warning.

    Raises DownloadError if no category can be loaded.
    """
    pairs: list[Prompt] = []
    reasons = []
    for category in CATEGORIES:
        try:
            rows = islice(_load(source, category), _PER_CATEGORY)
            pairs += _pairs(category, ((row["image"], row["question"]) for row in rows))
        except ConnectionError as error:  # the other categories would not be reached either
            raise DownloadError(_out_of_reach(f"{source} could not be loaded", error)) from error
        except (*_UNREACHABLE, KeyError) as error:
            reasons.append(f"{category}: {error}")
            log.warning("%s could not be loaded from %s (%s); it is left out.", category, source, _first_line(error))
    if not pairs:
        raise DownloadError(_out_of_reach(f"No category of {source} could be loaded", reasons[0]))
    return pairs


def _load(source: str, category: str) -> Iterable[Any]:
    """The rows of a category, under either spelling of its name."""
    names = [category, _SPELLINGS[category]] if category in _SPELLINGS else [category]
    for name in names[:-1]:
        try:
            return _undecoded(datasets.load_dataset(source, name, split="SD"))
        except ValueError:  # no configuration has that name
            log.debug("%s has no configuration %s", source, name)
    return _undecoded(datasets.load_dataset(source, names[-1], split="SD"))


def harmless_pairs(source: str = HARMLESS, seed: int = 42) -> list[Prompt]:
    """The first 500 images, each with one of five questions.

    Raises DownloadError if they cannot be loaded.
    """
    rng = Random(seed)
    try:
        stream = _undecoded(datasets.load_dataset(source, split="train", streaming=True))
        rows = ((row["image"], rng.choice(QUESTIONS)) for row in islice(stream, _HARMLESS_IMAGES))
        return _pairs("coco", rows)
    except _UNREACHABLE as error:
        raise DownloadError(_out_of_reach(f"{source} could not be loaded", error)) from error


def _out_of_reach(what: str, error: object) -> str:
    return (
        f"{what} ({_first_line(error)}). Check the network, pass your own pairs with --harmful and --harmless, "
        "or try --model_id demo, which needs no download."
    )


def _undecoded(rows: Any) -> Any:
    """Leave images as bytes, so that one that cannot be decoded does not stop the others."""
    return rows.cast_column("image", datasets.Image(decode=False))


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pairs(name: str, rows: Iterable[tuple[Any, str]]) -> list[Prompt]:
    """Prompts of the rows whose image is usable; the others are counted in a warning."""
    pairs, unusable = [], []
    for index, (raw, question) in enumerate(rows):
        try:
            pairs.append(Prompt(f"{name}/{index}", question, usable(_opened(raw))))
        except UnusableImageError as error:
            unusable.append(f"{(raw or {}).get('path') or index}: {error}")
    if unusable:
        log.warning("%d of the images of %s cannot be read and are left out (%s).", len(unusable), name, unusable[0])
    return pairs


def _opened(raw: dict[str, Any] | None) -> Image.Image:
    if raw is None:
        raise UnusableImageError("missing")
    try:
        return Image.open(io.BytesIO(raw["bytes"]) if raw.get("bytes") is not None else raw["path"])
    except UnidentifiedImageError as error:  # its message names an address in memory
        raise UnusableImageError("not a known image format") from error
    except DAMAGED as error:
        raise UnusableImageError(str(error)) from error


def read_folder(folder: Path) -> list[Prompt]:
    """Pairs of a folder in the Hub's imagefolder convention: images, and metadata.jsonl with `file_name` and `question`.

    Raises PromptFileError, which names the folder, if it holds anything else.
    """
    if problem := _not_pairs(folder):
        raise PromptFileError(f"{problem} Expected a folder of images with a metadata.jsonl. {_EXPECTED}")
    pairs = _pairs(folder.name, _own_rows(folder))
    if not pairs:
        raise PromptFileError(
            f"{folder / 'metadata.jsonl'}: holds no pairs with an image that can be read. {_EXPECTED}"
        )
    return pairs


def _not_pairs(folder: Path) -> str | None:
    """Why a path is not a folder of pairs, or None."""
    try:
        if not folder.exists():
            return f"{folder}: no such folder."
        if not folder.is_dir():
            return f"{folder}: is a file."
        if not (folder / "metadata.jsonl").is_file():
            return f"{folder}: there is no metadata.jsonl in it."
    except OSError as error:
        return f"{folder}: cannot be read ({error.strerror})."
    return None


def _own_rows(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    metadata = folder / "metadata.jsonl"
    for line, entry in metadata_lines(metadata, _EXPECTED):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("file_name", "question")):
            raise PromptFileError(f"{metadata}: line {line} lacks a file_name or a question. {_EXPECTED}")
        if not entry["question"].strip() or not encodable(entry["question"]):
            raise PromptFileError(f"{metadata}: the question in line {line} is empty, or not text. {_EXPECTED}")
        try:
            path = folder / entry["file_name"]
            yield {"bytes": path.read_bytes(), "path": str(path)}, entry["question"].strip()
        except (OSError, ValueError) as error:
            raise PromptFileError(
                f"{metadata}: line {line} names {entry['file_name'][:80]!r}, which cannot be read "
                f"({_first_line(error)[:80]}). Put the image beside metadata.jsonl, or leave the line out."
            ) from error


def demo_pairs(kind: str) -> list[Prompt]:
    """The demo's pairs of a kind from which train and validation prompts are drawn."""
    pool = [pair for split in ("train", "val") for pair in drawn_pairs(split) if pair.kind == kind]
    return [Prompt(f"{kind}/{index}", pair.question, pair.image) for index, pair in enumerate(pool)]


def demo_test_pairs(kind: str) -> list[Prompt]:
    """The demo's held-out pairs of a kind: "harmful", "harmless" or "neutral"."""
    return [Prompt(pair.id, pair.question, pair.image) for pair in drawn_pairs("test") if pair.kind == kind]
