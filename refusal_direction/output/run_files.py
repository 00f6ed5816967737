"""The content of a run's files: from a RunResult to bytes, and back."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from refusal_direction.candidates import CandidateLabel, Candidates
from refusal_direction.config import Config, Rules
from refusal_direction.models.refusal_tokens import ProbabilityQuartiles, RefusalTokens
from refusal_direction.output.plain import from_plain, json_bytes, to_plain
from refusal_direction.prompts.sets import SETS, SETS_FOR_SELECTION, Kind, PromptSet, Split, set_name
from refusal_direction.results import EngineRecord, ModelRecord, PromptRecord, RunResult, Token
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Noise
from refusal_direction.scoring.scores import Scores
from refusal_direction.selection.conditions import Conditions, Rejection
from refusal_direction.selection.result import SelectionResult

__all__ = [
    "SCHEMA_VERSION",
    "contents",
    "file_name",
    "file_names",
    "occasional_files",
    "optional_file_names",
    "restore",
    "written_files",
]

SCHEMA_VERSION = 2
_DIRECTION, _METADATA = "refusal_direction.pt", "direction_metadata.json"
_CANDIDATES, _SCORES = "candidate_directions.pt", "all_direction_scores.json"
_RUN, _PER_PROMPT, _ACTIVATIONS = "run.json", "per_prompt_scores.safetensors", "activations.safetensors"
_SPECIFIED = (_DIRECTION, _METADATA, _CANDIDATES, _SCORES)


def file_name(name: str, rules: Rules) -> str:
    """The name of a file in a pipeline's results: the first four of the vision-language pipeline end in _vlm."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}_vlm{dot}{suffix}" if rules.images and name in _SPECIFIED else name


def file_names(rules: Rules) -> tuple[str, ...]:
    """The files of a run that has selected a direction."""
    return tuple(file_name(name, rules) for name in (*_SPECIFIED, _RUN, _PER_PROMPT))


def optional_file_names(config: Config) -> tuple[str, ...]:
    """The files that a run writes on request."""
    return (_ACTIVATIONS,) if config.keep_activations else ()


def occasional_files(rules: Rules) -> tuple[str, ...]:
    """The files that not every run writes: the direction, if one was selected, and those on request."""
    return (file_name(_DIRECTION, rules), _ACTIVATIONS)


def written_files(run: RunResult) -> tuple[str, ...]:
    """The files of a run."""
    names = (*file_names(run.config.rules), *optional_file_names(run.config))
    missing = file_name(_DIRECTION, run.config.rules) if run.selection.index is None else None
    return tuple(name for name in names if name != missing)


def contents(run: RunResult) -> dict[str, bytes]:
    """The bytes of each file by its name."""
    selected = run.selection.index is not None
    files = {
        **({_DIRECTION: _pickled(run.direction.vector)} if selected else {}),
        _CANDIDATES: _pickled(run.candidates.laid_out().contiguous()),
        _METADATA: json_bytes(_metadata(run)),
        _SCORES: json_bytes(list(_score_rows(run))),
        _RUN: json_bytes(_run(run)),
        _PER_PROMPT: _per_prompt(run),
    }
    if run.activations is not None:
        files[_ACTIVATIONS] = save({kind.value: tensor.contiguous() for kind, tensor in run.activations.items()})
    return {file_name(name, run.config.rules): content for name, content in files.items()}


def _pickled(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def _place(label: CandidateLabel) -> dict[str, Any]:
    """The label of a candidate."""
    seed = {} if label.seed is None else {"seed": label.seed}
    return {"method": label.method, "position": label.position, "layer": label.layer, **seed}


def _position_index(run: RunResult, label: CandidateLabel) -> int | None:
    """The position counted from the first one looked at."""
    return None if label.position is None else label.position + run.model.n_positions


def _metadata(run: RunResult) -> dict[str, Any]:
    selection, model = run.selection, run.model
    return {
        "selected": selection.selected_as,
        **(_selected(run) if selection.index is not None else {}),
        **(_unselected(selection) if selection.selected_as != "best" else {}),
        "model_id": model.model_id,
        "revision": model.revision,
        "adapter": model.adapter,
        "n_positions": model.n_positions,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "discarded": selection.discarded,
        "rounding": selection.noise,
        "ties": [_place(score.label) for score in selection.tied],
        "warnings": run.warnings,
        "schema_version": SCHEMA_VERSION,
    }


def _selected(run: RunResult) -> dict[str, Any]:
    """The selected candidate."""
    return {
        **_place(run.label),
        **{measure.value: run.selection.score.of(measure) for measure in Measure},
        "position_index": _position_index(run, run.label),
        "candidate_norm": float(run.direction.vector.norm()),
    }


def _unselected(selection: SelectionResult) -> dict[str, Any]:
    """Why no candidate meets the conditions, and those that come nearest."""
    return {
        "explanation": selection.explanation,
        "nearest_misses": [
            {
                **_place(miss.score.label),
                **{measure.value: miss.score.of(measure) for measure in Measure},
                "violated": miss.violated,
                "needs": miss.needs,
            }
            for miss in selection.misses
        ],
    }


def _score_rows(run: RunResult) -> Iterator[dict[str, Any]]:
    """For each candidate its mean scores, the number of prompts it was measured on, and why it was not selected.

    A mean is null if the candidate was not measured on every prompt, or a score is NaN. A nearest miss that is selected is marked.
    """
    selection = run.selection
    nearest = selection.index if selection.selected_as == "nearest" else None
    for index, score in enumerate(selection.means):
        position_index = {"position_index": _position_index(run, score.label)} if run.config.rules.images else {}
        yield {
            **_place(score.label),
            **{measure.value: score.of(measure) for measure in Measure},
            **position_index,
            "measured": {measure.value: selection.measured[measure][index] for measure in Measure},
            "dropped": selection.reasons[index],
            "rejection": selection.rejections[index],
            **({"selected": "nearest"} if nearest == index else {}),
        }


def _run(run: RunResult) -> dict[str, Any]:
    model, selection = to_plain(run.model), run.selection
    architecture = model.pop("architecture")
    return {
        "schema_version": SCHEMA_VERSION,
        "finished": run.finished,
        "config": run.config,
        "versions": run.versions,
        "model": {**model, "class": architecture},
        "template": run.template,
        "warnings": run.warnings,
        "search": {
            "name": selection.search,
            "prompt_evaluations": selection.evaluations,
            "prompt_evaluations_of_exhaustive": selection.exhaustive_evaluations,
            "rows_repeated_for_rounding": selection.n_repeated,
            "sweeps": selection.n_passes,
        },
        "selection": {
            "index": selection.index,
            "selected": selection.selected_as,
            "ties": selection.ties,
            "conditions_asked": selection.conditions_asked,
            "conditions": selection.conditions,
            "noise": selection.noise,
        },
        "engine": run.engine,
        "eoi_tokens": run.eoi_tokens,
        "refusal_tokens": {**to_plain(run.refusal_tokens), "mass_quartiles": run.refusal_probability},
        "prompts": {set_name(which): _prompt_set(record) for which, record in run.prompts.items()},
        "seconds": run.seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
    }


def _prompt_set(record: PromptRecord) -> dict[str, Any]:
    return {
        "drawn": len(record.ids),
        "kept": len(record.kept),
        "further": record.further,
        "sha256": record.sha256,
        "ids": record.ids,
        "kept_ids": record.kept_ids,
        "kept_indices": record.kept,
        "baseline_refusal": float(record.kept_refusal.mean()),
        "refusal_token_mass": float(record.probability.mean()),
    }


def _per_prompt(run: RunResult) -> bytes:
    """Tensors [candidate, prompt] of scores, NaN where not measured, and the baseline [prompt]; ids in the metadata."""
    harmful, harmless = (run.prompts[kind, Split.VALIDATION] for kind in Kind)
    baseline = [run.prompts[which] for which in SETS_FOR_SELECTION]
    tensors = {measure.value: run.scores.of(measure).contiguous() for measure in Measure}
    tensors["baseline_refusal"] = torch.cat([record.refusal for record in baseline])
    tensors["baseline_probability"] = torch.cat([record.probability for record in baseline])
    order = ", ".join(map(set_name, SETS_FOR_SELECTION))
    return save(
        tensors,
        metadata={
            "harmful_ids": json.dumps(harmful.kept_ids),
            "harmless_ids": json.dumps(harmless.kept_ids),
            "ablation_refusal": "candidate x harmful; candidates in the order of all_direction_scores.json",
            "steering_refusal": "candidate x harmless; candidates in the same order",
            "kl_div": "candidate x harmless; candidates in the same order",
            "baseline_refusal": f"prompts drawn: {order}, with ids in run.json",
            "baseline_probability": "prompts in the same order",
            "schema_version": str(SCHEMA_VERSION),
        },
    )


class _StoredActivations(Mapping[Kind, Tensor]):
    """Activations in a file that stays open, each kind read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")

    def __getitem__(self, kind: Kind) -> Tensor:
        tensor: Tensor = self._file.get_tensor(kind.value)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[Kind]:
        return iter(Kind)

    def __len__(self) -> int:
        return len(Kind)


def restore(folder: Path, rules: Rules) -> RunResult:
    """The RunResult whose files are in a folder.

    Raises OSError, ValueError, TypeError, LookupError, RuntimeError or an error of safetensors or pickle if they are missing or
    not as they were written.
    """
    run = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    if run["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"run.json has schema version {run['schema_version']}, not {SCHEMA_VERSION}")
    rows = json.loads((folder / file_name(_SCORES, rules)).read_text(encoding="utf-8"))
    tensors = load_file(folder / _PER_PROMPT)
    candidates = _candidates(torch.load(folder / file_name(_CANDIDATES, rules), weights_only=True), rows)
    scores = Scores(*(tensors[measure.value] for measure in (Measure.ABLATION, Measure.STEERING, Measure.KL)))
    model = {**run["model"], "architecture": run["model"]["class"]}
    config, tokens = from_plain(Config, run["config"]), run["refusal_tokens"]
    return RunResult(
        config=config,
        model=from_plain(ModelRecord, model),
        template=run["template"],
        eoi_tokens=from_plain(tuple[Token, ...], run["eoi_tokens"]),
        refusal_tokens=from_plain(RefusalTokens, tokens),
        refusal_probability={
            kind: from_plain(ProbabilityQuartiles, tokens["mass_quartiles"][kind.value]) for kind in Kind
        },
        prompts=_prompts(run["prompts"], tensors),
        candidates=candidates,
        scores=scores,
        selection=_selection(run, rows, candidates, scores),
        engine=from_plain(EngineRecord, run["engine"]),
        warnings=tuple(run["warnings"]),
        seconds=run["seconds"],
        peak_memory_bytes=run["peak_memory_bytes"],
        versions=run["versions"],
        finished=run["finished"],
        activations=_StoredActivations(folder / _ACTIVATIONS) if config.keep_activations else None,
    )


def _candidates(vectors: Tensor, rows: list[dict[str, Any]]) -> Candidates:
    labels = (CandidateLabel(row["method"], row["layer"], row["position"], row.get("seed")) for row in rows)
    return Candidates(vectors.flatten(0, -2), tuple(labels))


def _prompts(sets: dict[str, Any], tensors: dict[str, Tensor]) -> dict[PromptSet, PromptRecord]:
    records, begin = {}, 0
    for which in SETS:
        stored = sets[set_name(which)]
        own = slice(begin, begin + len(stored["ids"]))
        unmeasured = torch.full((len(stored["ids"]),), torch.nan, dtype=torch.float64)
        measured = which in SETS_FOR_SELECTION
        records[which] = PromptRecord(
            ids=tuple(stored["ids"]),
            kept=tuple(stored["kept_indices"]),
            sha256=stored["sha256"],
            refusal=tensors["baseline_refusal"][own] if measured else unmeasured,
            probability=tensors["baseline_probability"][own] if measured else unmeasured,
            further=stored.get("further", 0),
        )
        begin = own.stop
    return records


def _selection(
    run: dict[str, Any], rows: list[dict[str, Any]], candidates: Candidates, scores: Scores
) -> SelectionResult:
    stored, search = run["selection"], run["search"]
    return SelectionResult(
        index=stored["index"],
        means=scores.means(candidates.labels),
        rejections=tuple(from_plain(Rejection | None, row["rejection"]) for row in rows),
        conditions_asked=from_plain(Conditions, stored["conditions_asked"]),
        conditions=from_plain(Conditions, stored["conditions"]),
        n_layers=run["model"]["n_layers"],
        search=search["name"],
        measured={measure: tuple(row["measured"][measure.value] for row in rows) for measure in Measure},
        n_passes=search["sweeps"],
        exhaustive_evaluations=search["prompt_evaluations_of_exhaustive"],
        noise=from_plain(Noise, stored["noise"]),
        n_repeated=search["rows_repeated_for_rounding"],
        ties=tuple(stored["ties"]),
    )
