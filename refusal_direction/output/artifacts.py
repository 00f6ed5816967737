"""Writing and reading results. The only module that writes them.

A set of files is written to a staging folder, committed by one rename, and then moved into place after the old set has
been removed. A crash at any moment leaves the old set, or files of the new set only; what had been committed is moved into
place by the next run or `load_direction`. Never a half-written file, never files of two runs side by side.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from refusal_direction.config import TEXT, VISION, Rules
from refusal_direction.errors import OutputError
from refusal_direction.models.placement import execution_device
from refusal_direction.pipeline import Direction
from refusal_direction.runtime import processes
from refusal_direction.scoring.metrics import Measure

if TYPE_CHECKING:
    from refusal_direction.pipeline import RunResult
    from refusal_direction.prompts import Prompt
    from refusal_direction.selection.searches import SelectionResult

__all__ = ["SCHEMA_VERSION", "check_writable", "file_names", "load_direction", "write"]

SCHEMA_VERSION = 1
_SPECIFIED = (
    "refusal_direction.pt",
    "direction_metadata.json",
    "candidate_directions.pt",
    "all_direction_scores.json",
)
_COMPANIONS = ("run.json", "per_prompt_scores.safetensors")
_COMMITTED = ".committed"
_STAGING = ".staging-"


def _file_name(name: str, rules: Rules) -> str:
    """The specification's files of the vision-language pipeline end in _vlm."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}_vlm{dot}{suffix}" if rules.images and name in _SPECIFIED else name


def file_names(rules: Rules) -> tuple[str, ...]:
    """The files that a run writes."""
    return tuple(_file_name(name, rules) for name in (*_SPECIFIED, *_COMPANIONS))


def check_writable(folder: Path, rules: Rules) -> bool:
    """Find out before the work, not after it. Also finishes what an interrupted run had committed.

    Returns whether the folder is new.

    Raises OutputError where the folder cannot be written, has a folder where a file goes, or holds the results of the other
    pipeline: of the two, run.json could only be one's.
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
        others = [other for other in _kinds(folder) if other.images != rules.images]
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}: {error.filename}). Choose another --output_dir, or change its "
            "permissions."
        ) from error
    if in_the_way:
        raise OutputError(
            f"{folder / in_the_way[0]} is a folder, where a file of results goes. Choose another --output_dir."
        )
    if others:
        found = "images with text" if others[0].images else "text"
        raise OutputError(f"{folder} holds the results of a run on {found}. Choose another --output_dir.")
    return new


def _kinds(folder: Path) -> list[Rules]:
    """Of which pipelines there are results in the folder."""
    return [rules for rules in (TEXT, VISION) if (folder / _file_name("direction_metadata.json", rules)).exists()]


def write(extraction: RunResult, folder: str | Path) -> None:
    """Write all files of a run, as one set.

    Raises OutputError, leaving the old set as it was, where the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    check_writable(folder, extraction.config.rules)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        for name, content in _contents(extraction).items():
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
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
            f"The results are whole in {folder / _COMMITTED}, but could not be moved into place ({error}). The next run, or "
            "load_direction, will do it."
        ) from error


def _move_into_place(folder: Path) -> None:
    committed = folder / _COMMITTED
    if not committed.exists():
        return
    fresh = {path.name for path in committed.iterdir()}
    for name in fresh:  # not yet moved, so what stands there is old
        (folder / name).unlink(missing_ok=True)
    for name in sorted(fresh):
        os.replace(committed / name, folder / name)
    committed.rmdir()


def _contents(extraction: RunResult) -> dict[str, bytes]:
    """What is in each file. Files are written by Python alone, so that a full disk is one kind of error."""
    contents = {
        "refusal_direction.pt": _pickled(extraction.direction.vector),
        "candidate_directions.pt": _pickled(extraction.candidates.float().contiguous()),
        "direction_metadata.json": _json(_metadata(extraction)),
        "all_direction_scores.json": _json(_scores(extraction)),
        "run.json": _json(_run(extraction)),
        "per_prompt_scores.safetensors": _per_prompt(extraction),
    }
    return {_file_name(name, extraction.config.rules): content for name, content in contents.items()}


def _pickled(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def _json(content: Any) -> bytes:
    return (json.dumps(_jsonable(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _jsonable(content: Any) -> Any:
    """JSON knows no NaN: null stands for it."""
    if isinstance(content, dict):
        return {str(key): _jsonable(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_jsonable(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return str(content) if isinstance(content, Path) else content


def _spelled(threshold: float) -> float | str:
    """An infinite threshold in letters: it is neither a number in JSON nor missing."""
    return threshold if math.isfinite(threshold) else str(threshold)


def _metadata(extraction: RunResult) -> dict[str, Any]:
    n_positions, n_layers, d_model = extraction.candidates.shape
    return {
        **asdict(extraction.selection.score),
        "position_index": extraction.selection.score.position + n_positions,
        "model_id": extraction.chat.model_id,
        "revision": extraction.chat.revision,
        "adapter": extraction.chat.adapter,
        "n_positions": n_positions,
        "n_layers": n_layers,
        "d_model": d_model,
        "candidate_norm": float(extraction.direction.vector.norm()),
        "discarded": extraction.selection.discarded,
        "rounding": asdict(extraction.choice.noise),
        "ties": [{"position": score.position, "layer": score.layer} for score in extraction.choice.tied],
        "warnings": extraction.warnings,
        "schema_version": SCHEMA_VERSION,
    }


def _scores(extraction: RunResult) -> list[dict[str, Any]]:
    """For each candidate its mean scores, on how many prompts it was run, and why it was not chosen.

    A mean is null where the candidate was not measured on every prompt, or a score is NaN.
    """
    n_positions, choice = extraction.candidates.shape[0], extraction.choice
    rows = [asdict(score) for score in extraction.means]
    if extraction.config.rules.images:
        rows = [{**row, "position_index": row["position"] + n_positions} for row in rows]
    return [
        {
            **row,
            "measured": {measure.value: int(choice.measured[measure][index]) for measure in Measure},
            "dropped": choice.selection.dropped[index],
        }
        for index, row in enumerate(rows)
    ]


def _search(choice: SelectionResult) -> dict[str, Any]:
    return {
        "name": choice.search,
        "prompt_evaluations": choice.evaluations,
        "prompt_evaluations_of_exhaustive": choice.exhaustive_evaluations,
        "rows_repeated_for_rounding": choice.n_repeated,
        "sweeps": choice.n_sweeps,
    }


def _run(extraction: RunResult) -> dict[str, Any]:
    chat, sets = extraction.chat, extraction.prompts.indices()
    baseline = extraction.baseline
    return {
        "schema_version": SCHEMA_VERSION,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": {
            **asdict(extraction.config),
            "thresholds": {name: _spelled(value) for name, value in asdict(extraction.config.thresholds).items()},
        },
        "versions": _versions(),
        "model": {
            "model_id": chat.model_id,
            "revision": chat.revision,
            "class": type(chat.model).__name__,
            "dtype": str(chat.model.dtype).removeprefix("torch."),
            "device": str(execution_device(chat.model)),
            "adapter": chat.adapter,
            "quantization": _quantization(chat.model.config),
        },
        "template": chat.template_settings,
        "warnings": extraction.warnings,
        "search": _search(extraction.choice),
        "engine": {"name": extraction.engine, "largest_leak": extraction.leak, "processes": processes.size()},
        "eoi_tokens": [{"id": token, "text": chat.text_of(token)} for token in chat.eoi_tokens],
        "refusal_tokens": {
            **asdict(extraction.tokens),
            "mass_quartiles": {kind: asdict(mass) for kind, mass in extraction.mass.items()},
        },
        "prompts": {
            name: {
                "drawn": len(members),
                "kept": len(extraction.kept[name]),
                "sha256": _digest([extraction.prompts.everything[index] for index in members]),
                "ids": [extraction.prompts.everything[index].id for index in members],
                "kept_ids": [extraction.prompts.everything[index].id for index in extraction.kept[name]],
                "baseline_refusal": _mean(baseline.refusal, extraction.kept[name]),
                "refusal_token_mass": _mean(baseline.mass, members),
            }
            for name, members in sets.items()
        },
        "seconds": extraction.seconds,
        "peak_memory_bytes": extraction.peak_memory,
    }


def _quantization(config: Any) -> dict[str, Any] | None:
    """How the weights are quantised, by a checkpoint or while they were loaded."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _mean(values: torch.Tensor, members: list[int]) -> float:
    return float(values[members].mean())


def _digest(prompts: Sequence[Prompt]) -> str:
    """Of their texts, and then of their images."""
    content = sha256("\0".join(prompt.text for prompt in prompts).encode())
    for prompt in prompts:
        if prompt.image is not None:
            content.update(f"{prompt.image.size}".encode() + prompt.image.tobytes())
    return content.hexdigest()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("refusal-direction", "torch", "transformers", "accelerate", "peft", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout, or not installed
            found[name] = None
    return found


def _per_prompt(extraction: RunResult) -> bytes:
    """Tensors (candidate, prompt); candidates in (position, layer) order; the prompts' ids stand in the metadata.

    NaN where not measured.
    """
    scores, everything, kept = extraction.scores, extraction.prompts.everything, extraction.kept
    return save(
        {measure.value: scores.of(measure) for measure in Measure},
        metadata={
            "harmful_ids": json.dumps([everything[index].id for index in kept["harmful_val"]]),
            "harmless_ids": json.dumps([everything[index].id for index in kept["harmless_val"]]),
            "ablation_refusal": "candidate x harmful; candidates by position, then layer, as in all_direction_scores.json",
            "steering_refusal": "candidate x harmless; candidates likewise",
            "kl_div": "candidate x harmless; candidates likewise",
            "schema_version": str(SCHEMA_VERSION),
        },
    )


def load_direction(folder: str | Path = "artifacts") -> Direction:
    """The direction that a run left in `folder`, its --output_dir.

    Raises OutputError where there is none, or it cannot be read.
    """
    folder = Path(folder)
    try:
        _move_into_place(folder)
        rules = next(iter(_kinds(folder)), TEXT)
        metadata = json.loads((folder / _file_name("direction_metadata.json", rules)).read_text(encoding="utf-8"))
        vector = torch.load(folder / _file_name("refusal_direction.pt", rules), weights_only=True)
        if not isinstance(vector, torch.Tensor) or vector.ndim != 1 or not vector.is_floating_point():
            raise ValueError("refusal_direction.pt holds no vector")
        if not vector.numel() or not vector.isfinite().all():
            raise ValueError("refusal_direction.pt holds no finite numbers")
        if not all(type(metadata[name]) is int for name in ("layer", "position")):
            raise ValueError("its layer or position is no whole number")
        return Direction(vector, metadata["layer"], metadata["position"], metadata["model_id"])
    except OSError as error:
        raise OutputError(
            f"{folder} holds no refusal direction ({error.strerror}: {error.filename}). Run extract_refusal_direction.py first."
        ) from error
    except (ValueError, LookupError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise OutputError(
            f"{folder} holds a refusal direction that cannot be read ({type(error).__name__}: {error}). Make it anew."
        ) from error
