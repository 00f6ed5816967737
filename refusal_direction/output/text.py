"""Results as text: the list of files, and completions side by side. The table is in results.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch

from refusal_direction.engine.interventions import ablated, steered
from refusal_direction.engine.skeleton import shape_of
from refusal_direction.models.chat import ChatModel
from refusal_direction.output.artifacts import written_files
from refusal_direction.prompts.sets import Kind, Prompt, PromptSets, Split
from refusal_direction.results import RunResult

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["completions", "files"]

_SHOWN = 3
_Intervention = Callable[["Tensor"], AbstractContextManager[object]]


def files(run: RunResult) -> str:
    """The files of a run and their folder."""
    return "\n".join([f"Written to {run.config.output_dir}/:", *(f"  {name}" for name in written_files(run))])


def completions(run: RunResult, chat: ChatModel, prompts: PromptSets, max_new_tokens: int = 48) -> str:
    """Baseline, ablated and steered completions of a few validation prompts that the filter kept.

    Args:
        run: gives the direction and the kept prompts.
        chat: the model of the run.
        prompts: the prompts of the run; those drawn further are the first of its reserves.
        max_new_tokens: the most tokens of a completion.
    """
    direction, batch_size = run.direction, run.config.batch_size
    interventions: dict[Kind, tuple[str, _Intervention]] = {
        Kind.HARMFUL: ("ablated", partial(ablated, chat.model)),
        Kind.HARMLESS: ("steered", partial(steered, chat.model, layer=direction.layer)),
    }
    lines: list[str] = []
    for kind, (name, intervention) in interventions.items():
        which = (kind, Split.VALIDATION)
        validation = (*prompts[which], *prompts.reserves.get(which, ()))
        kept = [validation[index] for index in run.prompts[which].kept]
        compared = _compared(chat, kept, intervention, direction.vector, max_new_tokens, batch_size)
        lines += _side_by_side(kind, name, compared)
    return "\n".join(lines)


def _compared(
    chat: ChatModel,
    prompts: Sequence[Prompt],
    intervention: _Intervention,
    vector: Tensor,
    max_new_tokens: int,
    batch_size: int | None,
) -> Iterator[tuple[Prompt, str, str]]:
    """A few prompts, each with its completion without and with the intervention.

    The two are rows of one batch if the batch size allows it: weights that do not fit into memory are read anew for each
    token of each batch.
    """
    for alike in _few_alike(chat, prompts):
        rows = [(prompt, strength) for prompt in alike for strength in (0.0, 1.0)]
        at_once = batch_size or len(rows)
        replies: list[str] = []
        for begin in range(0, len(rows), at_once):
            some = rows[begin : begin + at_once]
            with intervention(torch.stack([strength * vector for _, strength in some])):
                replies += chat.complete([prompt for prompt, _ in some], max_new_tokens)
        yield from zip(alike, replies[::2], replies[1::2], strict=True)


def _few_alike(chat: ChatModel, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """A few of the prompts, in as few groups of one length as possible."""
    by_shape: dict[object, list[Prompt]] = {}
    for prompt in prompts:
        by_shape.setdefault(shape_of(chat.inputs(prompt)), []).append(prompt)
    groups: list[list[Prompt]] = []
    left = _SHOWN
    for alike in sorted(by_shape.values(), key=lambda alike: -min(len(alike), _SHOWN)):
        groups += [alike[:left]] if left else []
        left -= len(alike[:left])
    return groups


def _side_by_side(kind: Kind, name: str, compared: Iterable[tuple[Prompt, str, str]]) -> Iterator[str]:
    for prompt, plain, changed in compared:
        yield f"{kind.value.capitalize()}: {prompt.text}" + (f" (image {prompt.id})" if prompt.image else "")
        yield from (f"  baseline: {plain.strip()}", f"  {name}:  {changed.strip()}", "")
