"""The result of a run, as data: no model in it. The table is made from it.

`output.artifacts` writes it to files and reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from textwrap import fill
from typing import TYPE_CHECKING, Any

from refusal_direction.candidates import CandidateLabel, Candidates
from refusal_direction.config import DIFFERENCE_OF_MEANS, Config
from refusal_direction.models.refusal_tokens import ProbabilityQuartiles, RefusalTokens
from refusal_direction.prompts.sets import Kind, PromptSet, Split
from refusal_direction.scoring.scores import CandidateScore, Scores
from refusal_direction.selection.filter import passes
from refusal_direction.selection.result import SelectionResult

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Direction", "EngineRecord", "ModelRecord", "PromptRecord", "RunResult", "Token", "table"]

_WIDTH = 104


@dataclass(frozen=True, eq=False)
class Direction:
    """A refusal direction."""

    vector: Float[Tensor, "d_model"]
    """The direction r, not normalised, in float32."""
    layer: int
    """The layer at whose input it was measured, and to whose input it is added."""
    position: int | None
    """The token position at which it was measured, -1 for the last of the prompt; None where it has none."""
    model_id: str
    method: str = DIFFERENCE_OF_MEANS
    """Name of the method that made it."""


@dataclass(frozen=True)
class ModelRecord:
    """The model of a run."""

    model_id: str
    revision: str | None
    """The Hub's commit of the weights; None for a local folder."""
    architecture: str
    """The class in transformers."""
    dtype: str
    device: str
    adapter: str | None
    quantization: Mapping[str, Any] | None
    """The quantisation configuration of the weights."""
    n_layers: int
    n_positions: int
    d_model: int


@dataclass(frozen=True)
class EngineRecord:
    """The engine of a run."""

    name: str
    """layer-major or hooked."""
    largest_leak: float
    """Largest share of an ablated stream found along its direction."""
    processes: int


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary."""

    id: int
    text: str


@dataclass(frozen=True, eq=False)
class PromptRecord:
    """One prompt set of a run: ids and baseline scores, without the texts."""

    ids: tuple[str, ...] = field(repr=False)
    """Ids of the prompts drawn."""
    kept: tuple[int, ...] = field(repr=False)
    """Indices of those that the filter left; of the test split, which it does not see, all."""
    sha256: str
    """Of the texts, and then of the images."""
    refusal: Float[Tensor, "prompt"] = field(repr=False)
    """Baseline refusal scores of the prompts drawn; NaN where not measured."""
    probability: Float[Tensor, "prompt"] = field(repr=False)
    """Baseline probability of the refusal tokens; NaN where not measured."""
    further: int = 0
    """The number of prompts, the last of those drawn, that were drawn because fewer than half of the others passed the filter."""

    @property
    def kept_ids(self) -> tuple[str, ...]:
        """Ids of the prompts that the filter left."""
        return tuple(self.ids[index] for index in self.kept)

    @property
    def kept_refusal(self) -> Float[Tensor, "kept"]:
        """Baseline refusal scores of the prompts that the filter left."""
        return self.refusal[list(self.kept)]


@dataclass(frozen=True, eq=False)
class RunResult:
    """The record of a run: everything it was asked for, did and found."""

    config: Config = field(repr=False)
    model: ModelRecord
    template: Mapping[str, Any] = field(repr=False)
    """The settings with which the chat template was rendered."""
    eoi_tokens: tuple[Token, ...] = field(repr=False)
    """The end-of-instruction tokens; none for images with text."""
    refusal_tokens: RefusalTokens
    refusal_probability: Mapping[Kind, ProbabilityQuartiles] = field(repr=False)
    """Quartiles of their baseline probability, over train and validation prompts."""
    prompts: Mapping[PromptSet, PromptRecord] = field(repr=False)
    candidates: Candidates = field(repr=False)
    """In float32."""
    scores: Scores = field(repr=False)
    """Scores of every candidate on the kept validation prompts."""
    selection: SelectionResult
    engine: EngineRecord
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    """Wall time of each stage, including the interrupted run that was resumed."""
    peak_memory_bytes: int
    versions: Mapping[str, str | None] = field(repr=False)
    """Of Python and the packages."""
    finished: str
    """The end of the run: UTC, ISO 8601."""
    activations: Mapping[Kind, Float[Tensor, "prompt position layer d_model"]] | None = field(default=None, repr=False)
    """Activations of the training prompts drawn at the end-of-instruction tokens, with `Config.keep_activations`."""

    def __str__(self) -> str:
        """The table."""
        return table(self)

    @property
    def means(self) -> tuple[CandidateScore, ...]:
        """Mean scores of every candidate."""
        return self.selection.means

    @property
    def label(self) -> CandidateLabel:
        """The label of the selected candidate.

        Raises NoCandidateError, with the nearest misses, if there is none.
        """
        return self.candidates.labels[self.selection.selected]

    @property
    def direction(self) -> Direction:
        """The selected direction.

        Raises NoCandidateError, with the nearest misses and the thresholds they need, if none was selected.
        """
        label, vector = self.label, self.candidates.vectors[self.selection.selected]
        return Direction(vector.float().clone(), label.layer, label.position, self.model.model_id, label.method)


def table(run: RunResult) -> str:
    """The selected direction and its scores, as a Markdown table. Errors are standard errors over the prompts.

    Where none was selected, the nearest miss stands in its place.
    """
    selection = run.selection
    shown = selection.index if selection.index is not None else next((miss.index for miss in selection.misses), None)
    harmful, harmless = (run.prompts[kind, Split.VALIDATION].kept_refusal for kind in Kind)
    ablation, steering, kl = (
        "—" if shown is None else _with_error(values[shown], digits)
        for values, digits in ((run.scores.ablation, 2), (run.scores.steering, 2), (run.scores.kl, 3))
    )
    rows = [
        ("Metric", "With direction" if selection.index is not None else "Nearest miss", "Baseline"),
        (f"Ablation refusal score ({len(harmful)} harmful prompts)", ablation, _with_error(harmful)),
        (f"Steering refusal score ({len(harmless)} harmless prompts)", steering, _with_error(harmless)),
        ("KL divergence (harmless, ablated)", kl, "—"),
    ]
    return "\n".join(
        [
            _title(run),
            "",
            *_markdown(rows),
            *_shortcomings(selection),
            *_filtered(run.prompts),
            "",
            _refusal_tokens(run),
            *_effort(selection),
            *_ties(selection),
        ]
    )


def _title(run: RunResult) -> str:
    model, n_layers = run.model.model_id, run.model.n_layers
    if run.selection.index is not None:
        return f"Refusal direction of {model}: {run.label} (of {n_layers} layers)"
    return f"No refusal direction of {model} was selected (from {len(run.candidates)} candidates in {n_layers} layers)"


def _with_error(values: Tensor, digits: int = 2) -> str:
    """Mean and standard error over the prompts; of one prompt the mean alone."""
    mean = f"{float(values.mean()):.{digits}f}"
    return f"{mean} ± {float(values.std() / math.sqrt(len(values))):.{digits}f}" if len(values) > 1 else mean


def _markdown(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for index, row in enumerate(rows):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        if index == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _shortcomings(selection: SelectionResult) -> list[str]:
    """The conditions asked for that the candidate in the table violates, because no candidate met them."""
    if selection.index is None:
        nearest = [f"The nearest miss, {miss.score.label}, needs {miss.flags}." for miss in selection.misses[:1]]
        return ["", *(f"No candidate meets every condition. {one}" for one in nearest or [selection.explanation])]
    if not selection.shortcomings:
        return []
    one = "This one, the nearest miss," if selection.selected_as == "nearest" else "This one"
    return [
        "",
        f"No candidate meets every condition. {one} may not carry refusal at all: {', and '.join(selection.shortcomings)}.",
    ]


def _filtered(prompts: Mapping[PromptSet, PromptRecord]) -> list[str]:
    """The number of prompts that pass the filter, of the sets of which it left some out."""
    parts = []
    for kind, behaviour in ((Kind.HARMFUL, "refused"), (Kind.HARMLESS, "answered")):
        counts = [
            f"{int(passes(kind, record.refusal).sum())} of {len(record.ids)} {kind.value} {name} prompts"
            for split, name in ((Split.TRAIN, "training"), (Split.VALIDATION, "validation"))
            if len((record := prompts[kind, split]).kept) < len(record.ids)
        ]
        parts += [f"{' and '.join(counts)} are {behaviour}"] if counts else []
    return ["", fill(f"Without intervention {'; '.join(parts)}.", width=_WIDTH)] if parts else []


def _refusal_tokens(run: RunResult) -> str:
    tokens, probability = run.refusal_tokens, run.refusal_probability
    named = ", ".join(f"{text!r} ({token})" for text, token in zip(tokens.texts, tokens.ids, strict=True))
    return fill(
        f"Refusal tokens: {named}, {tokens.source}. They hold {probability[Kind.HARMFUL].median:.1%} of the probability on "
        f"harmful prompts and {probability[Kind.HARMLESS].median:.1%} on harmless ones (medians).",
        width=_WIDTH,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _effort(selection: SelectionResult) -> list[str]:
    """The savings of a pruned search."""
    if selection.search != "pruned":
        return []
    share = selection.evaluations / max(selection.exhaustive_evaluations, 1)
    proven = "prove the selection" if selection.selected_as == "best" else "show that none passes"
    return [
        f"Pruned search: {selection.evaluations} prompt evaluations in {selection.n_passes} passes {proven} "
        f"({share:.0%} of the {selection.exhaustive_evaluations} that score every candidate)."
    ]


def _ties(selection: SelectionResult) -> list[str]:
    """The candidates that rounding cannot tell from the selected one."""
    if not selection.ties:
        return []
    named = "; ".join(str(score.label) for score in selection.tied)
    noise = selection.noise
    return [
        f"Tied with it, within rounding (ablation {noise.ablation_refusal:.1g}, steering {noise.steering_refusal:.1g}, "
        f"KL {noise.kl_div:.1g}):\n{named}. Another precision (--dtype) may select another of them."
    ]
