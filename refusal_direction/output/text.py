"""Results as text: the table at the end of a run, and completions side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING

import torch

from refusal_direction.engine.interventions import ablated, steered
from refusal_direction.engine.skeleton import shape_of
from refusal_direction.output.artifacts import file_names

if TYPE_CHECKING:
    from torch import Tensor

    from refusal_direction.config import Config
    from refusal_direction.estimate import Inspection
    from refusal_direction.models.chat import ChatModel
    from refusal_direction.pipeline import RunResult
    from refusal_direction.prompts.sets import Prompt
    from refusal_direction.selection.searches import SelectionResult

__all__ = ["completions", "files", "inspection", "results"]

_SHOWN = 3
_Intervention = Callable[["Tensor"], AbstractContextManager[object]]
_WIDTH = 104


def _with_error(values: Tensor, digits: int = 2) -> str:
    """Mean and standard error over the prompts; of one prompt there is none."""
    mean = f"{float(values.mean()):.{digits}f}"
    return f"{mean} ± {float(values.std() / math.sqrt(len(values))):.{digits}f}" if len(values) > 1 else mean


def results(extraction: RunResult) -> str:
    """The selected direction and its scores, as a Markdown table. Errors are standard errors over the prompts."""
    chosen, kept = extraction.selection, extraction.kept
    n_layers = extraction.candidates.shape[1]
    refusal = extraction.baseline.refusal
    kl = extraction.scores.kl[chosen.index]
    rows = [
        ("Metric", "With direction", "Baseline"),
        (
            f"Ablation refusal score ({len(kept['harmful_val'])} harmful prompts)",
            _with_error(extraction.scores.ablation[chosen.index]),
            _with_error(refusal[kept["harmful_val"]]),
        ),
        (
            f"Steering refusal score ({len(kept['harmless_val'])} harmless prompts)",
            _with_error(extraction.scores.steering[chosen.index]),
            _with_error(refusal[kept["harmless_val"]]),
        ),
        ("KL divergence (harmless, ablated)", _with_error(kl, 3), "—"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    title = (
        f"Refusal direction of {extraction.chat.model_id}: position {chosen.score.position}, layer {chosen.score.layer}"
    )
    lines += [
        *_shortcomings(extraction),
        "",
        _refusal_tokens(extraction),
        *_effort(extraction.choice),
        *_ties(extraction.choice),
    ]
    return "\n".join([f"{title} (of {n_layers} layers)", "", *lines])


def _shortcomings(extraction: RunResult) -> list[str]:
    """Where conditions were dropped because no candidate met them (images with text): that the chosen one fails them."""
    score, thresholds = extraction.selection.score, extraction.config.thresholds
    harmless = extraction.baseline.refusal[extraction.kept["harmless_val"]]
    floor = thresholds.induce + (float(harmless.mean()) if extraction.config.rules.relative_steering else 0.0)
    failed = [f"its KL is above {thresholds.kl:g}"] if score.kl_div > thresholds.kl else []
    failed += [f"its steering score is below {floor:.2f}"] if score.steering_refusal < floor else []
    if not failed:
        return []
    return ["", f"No candidate meets every condition. This one may not carry refusal at all: {', and '.join(failed)}."]


def _refusal_tokens(extraction: RunResult) -> str:
    tokens, mass = extraction.tokens, extraction.mass
    named = ", ".join(f"{text!r} ({token})" for text, token in zip(tokens.texts, tokens.ids, strict=True))
    return fill(
        f"Refusal tokens: {named}, {tokens.source}. They hold {mass['harmful'].median:.1%} of the probability on harmful "
        f"prompts and {mass['harmless'].median:.1%} on harmless ones (medians).",
        width=_WIDTH,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _effort(choice: SelectionResult) -> list[str]:
    """What a pruned search saved."""
    if choice.search != "pruned":
        return []
    share = f"{choice.evaluations / choice.exhaustive_evaluations:.0%} of the {choice.exhaustive_evaluations} that score every candidate"
    done = f"{choice.evaluations} prompt evaluations in {choice.n_sweeps} sweeps prove the choice ({share})."
    return [f"Pruned search: {done}"]


def _ties(choice: SelectionResult) -> list[str]:
    """The candidates that rounding cannot tell from the selected one, if there are any."""
    if not choice.ties:
        return []
    named = "; ".join(f"position {score.position}, layer {score.layer}" for score in choice.tied)
    noise = choice.noise
    return [
        f"Tied with it, within rounding (ablation {noise.ablation_refusal:.1g}, steering {noise.steering_refusal:.1g}, "
        f"KL {noise.kl_div:.1g}):\n{named}. Another precision (--dtype) may select another of them."
    ]


def files(config: Config) -> str:
    """Where the files of a run are."""
    return "\n".join([f"Written to {config.output_dir}/:", *(f"  {name}" for name in file_names(config.rules))])


def completions(extraction: RunResult, max_new_tokens: int = 48) -> str:
    """Baseline, ablated and steered completions of a few validation prompts that the filter kept."""
    model, direction = extraction.chat.model, extraction.direction
    ablating = _compared(extraction, "harmful", partial(ablated, model), max_new_tokens)
    steering = _compared(extraction, "harmless", partial(steered, model, layer=direction.layer), max_new_tokens)
    return "\n".join([*_side_by_side("Harmful", "ablated", ablating), *_side_by_side("Harmless", "steered", steering)])


def _compared(
    extraction: RunResult, kind: str, intervention: _Intervention, max_new_tokens: int
) -> Iterator[tuple[Prompt, str, str]]:
    """A few prompts of a kind, each with its completion as it is, and under the intervention.

    The two are rows of one batch where --batch_size allows it: weights that do not fit into memory are read anew for each
    token of each batch.
    """
    chat, vector = extraction.chat, extraction.direction.vector
    kept = [extraction.prompts.everything[index] for index in extraction.kept[f"{kind}_val"]]
    for alike in _few_alike(chat, kept):
        rows = [(prompt, strength) for prompt in alike for strength in (0.0, 1.0)]
        at_once = extraction.config.batch_size or len(rows)
        replies: list[str] = []
        for begin in range(0, len(rows), at_once):
            some = rows[begin : begin + at_once]
            with intervention(torch.stack([strength * vector for _, strength in some])):
                replies += chat.complete([prompt for prompt, _ in some], max_new_tokens)
        yield from zip(alike, replies[::2], replies[1::2], strict=True)


def _few_alike(chat: ChatModel, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """A few of the prompts, in as few groups of one length as there can be."""
    by_shape: dict[object, list[Prompt]] = {}
    for prompt in prompts:
        by_shape.setdefault(shape_of(chat.inputs(prompt)), []).append(prompt)
    chosen: list[list[Prompt]] = []
    left = _SHOWN
    for alike in sorted(by_shape.values(), key=lambda alike: -min(len(alike), _SHOWN)):
        chosen += [alike[:left]] if left else []
        left -= len(alike[:left])
    return chosen


def _side_by_side(kind: str, name: str, compared: Iterable[tuple[Prompt, str, str]]) -> Iterator[str]:
    for prompt, plain, changed in compared:
        yield f"{kind}: {prompt.text}" + (f" (image {prompt.id})" if prompt.image else "")
        yield from (f"  baseline: {plain.strip()}", f"  {name}:  {changed.strip()}", "")


def inspection(found: Inspection) -> str:
    """What a run on this model would do, and what it would cost."""
    model, chat = found.chat.model, found.chat
    writes = "; ".join(f"{' + '.join(sites)} ({count} layers)" for sites, count in found.writes)
    positions = (
        " ".join(repr(chat.text_of(token)) for token in chat.eoi_tokens) or f"the last {chat.n_positions} of the prompt"
    )
    cost, everything = found.cost, found.prompts.indices()
    lines = [
        ("model", f"{chat.model_id}: {model.num_parameters() / 1e6:,.1f}M parameters, {str(model.dtype)[6:]}"),
        ("residual stream", f"{found.n_layers} layers, d_model {found.d_model}; {found.engine} engine"),
        ("written by", f"the embedding; {writes}"),
        ("positions", f"{positions}: {chat.n_positions} tokens"),
        ("refusal tokens", f"{', '.join(map(repr, found.tokens.texts))} ({found.tokens.source})"),
        ("prompts", ", ".join(f"{len(members)} {name}" for name, members in everything.items())),
        ("shared opening", f"{found.shared} tokens"),
        ("candidates", f"{found.n_candidates} = {chat.n_positions} positions x {found.n_layers} layers"),
        ("rows", ", ".join(f"{count:,} {name}" for name, count in found.rows.items())),
        ("time", f"about {_duration(cost.seconds)}: loading {_duration(cost.load_seconds)} (measured)"),
        *(("", f"{name} {_duration(seconds)}") for name, seconds in cost.sweep_seconds.items()),
        ("memory", f"about {cost.memory / 2**30:.1f} GiB at its peak"),
    ]
    return "\n".join(f"{name:16s} {text}" for name, text in lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
