"""Writing and reading the files of a run.

A set of files is written to a staging folder, committed by one rename, and then moved into place after the old set has
been removed. A crash at any moment leaves the old set, or files of the new set only; the next run, `load_run` or
`load_direction` moves a committed set into place. No file is ever half-written, and no folder holds files of two runs.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from refusal_direction.config import DIFFERENCE_OF_MEANS, TEXT, VISION, Rules
from refusal_direction.errors import NoCandidateError, OutputError
from refusal_direction.output.run_files import (
    contents,
    file_name,
    file_names,
    occasional_files,
    optional_file_names,
    restore,
    written_files,
)
from refusal_direction.results import Direction, RunResult
from refusal_direction.runtime.files import write_durably

__all__ = [
    "check_writable",
    "file_names",
    "load_direction",
    "load_run",
    "optional_file_names",
    "write",
    "written_files",
]

_COMMITTED = ".committed"
_STAGING = ".staging-"


def check_writable(folder: Path, rules: Rules) -> bool:
    """Check a folder before the work instead of after it; also finish a set that an interrupted run had committed.

    Returns whether the folder is new.

    Raises OutputError if the folder cannot be written, has a folder in the place of a file, or holds the results of the other
    pipeline, whose run.json would be overwritten.
    """
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for abandoned in folder.glob(f"{_STAGING}*"):  # by a run that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        _move_into_place(folder)
        in_the_way = [name for name in file_names(rules) if (folder / name).is_dir()]
        others = [other for other in _pipelines(folder) if other.images != rules.images]
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}: {error.filename}). Choose another --output_dir, or change its "
            "permissions."
        ) from error
    if in_the_way:
        raise OutputError(
            f"{folder / in_the_way[0]} is a folder in the place of a results file. Choose another --output_dir."
        )
    if others:
        found = "images with text" if others[0].images else "text"
        raise OutputError(f"{folder} holds the results of a run on {found}. Choose another --output_dir.")
    return new


def _pipelines(folder: Path) -> list[Rules]:
    """The pipelines with results in the folder."""
    return [rules for rules in (TEXT, VISION) if (folder / file_name("direction_metadata.json", rules)).exists()]


def write(run: RunResult, folder: str | Path) -> None:
    """Write all files of a run, as one set.

    Raises OutputError, and leaves the old set as it was, if the disk is full or the folder cannot be written.
    """
    if not isinstance(run, RunResult):
        raise TypeError(f"write needs the RunResult that extract returns, not a {type(run).__name__}.")
    folder = Path(folder)
    check_writable(folder, run.config.rules)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        for name, content in contents(run).items():  # written by Python alone, so that a full disk is one kind of error
            write_durably(staging / name, content)
        os.replace(staging, folder / _COMMITTED)
    except OSError as error:
        raise OutputError(
            f"{folder} could not be written ({error}). The files of earlier runs are untouched."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    try:
        _move_into_place(folder)
    except OSError as error:
        raise OutputError(
            f"The results are complete in {folder / _COMMITTED}, but could not be moved into place ({error}). The next run, or "
            "load_run, will move them."
        ) from error


def _move_into_place(folder: Path) -> None:
    """Move a committed set to where it belongs, after the old set has been removed; may be interrupted and repeated."""
    committed = folder / _COMMITTED
    if not committed.exists():
        return
    fresh = {path.name for path in committed.iterdir()}
    occasional = {name for rules in (TEXT, VISION) for name in occasional_files(rules)}
    for name in fresh | _not_replaced(fresh):  # not moved yet, so a file of this name is old
        (folder / name).unlink(missing_ok=True)
    for name in sorted(fresh, key=lambda name: (name in occasional, name)):
        os.replace(committed / name, folder / name)
    committed.rmdir()


def _not_replaced(fresh: set[str]) -> set[str]:
    """Files of an old set that a set may lack. They are removed before the first file of the set is moved, and not after."""
    for rules in (TEXT, VISION):
        occasional = set(occasional_files(rules))
        if set(file_names(rules)) - occasional <= fresh:
            return occasional
    return set()


def load_run(folder: str | Path = "artifacts") -> RunResult:
    """The result of the run whose files are in `folder`, its --output_dir, with every field as `extract` returned it.

    Results compare by identity; compare their fields. The activations of a run with --keep_activations are read when they are
    asked for.

    Raises OutputError if there are none, or they cannot be read.
    """
    folder = Path(folder)
    with _explained(folder):
        _move_into_place(folder)
        return restore(folder, next(iter(_pipelines(folder)), TEXT))


def load_direction(folder: str | Path = "artifacts") -> Direction:
    """The direction that a run left in `folder`, its --output_dir.

    Raises OutputError if there is no run, or it cannot be read; NoCandidateError, with the nearest misses, if it selected none.
    """
    folder = Path(folder)
    with _explained(folder):
        _move_into_place(folder)
        rules = next(iter(_pipelines(folder)), TEXT)
        metadata = json.loads((folder / file_name("direction_metadata.json", rules)).read_text(encoding="utf-8"))
        if metadata.get("selected", "best") is None:
            raise NoCandidateError(f"The run in {folder} selected no direction. {metadata['explanation']}")
        vector = torch.load(folder / file_name("refusal_direction.pt", rules), weights_only=True)
        if not isinstance(vector, torch.Tensor) or vector.ndim != 1 or not vector.is_floating_point():
            raise ValueError("refusal_direction.pt holds no vector")
        if not vector.numel() or not vector.isfinite().all():
            raise ValueError("refusal_direction.pt holds numbers that are not finite")
        if type(metadata["layer"]) is not int or type(metadata["position"]) not in (int, type(None)):
            raise ValueError("its layer or position is not a whole number")
        method = metadata.get("method", DIFFERENCE_OF_MEANS)
        return Direction(vector, metadata["layer"], metadata["position"], metadata["model_id"], method)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} holds no results of a run ({error.strerror}: {error.filename}). Run extract_refusal_direction.py first."
        ) from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise OutputError(
            f"{folder} holds results that cannot be read ({type(error).__name__}: {error}). Run it again."
        ) from error
