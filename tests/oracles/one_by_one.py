"""The method by the model's own forward under hooks: one candidate at a time, one prompt at a time, nothing padded.

Prompts are the model's inputs, a batch of one each, so they may hold images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
from torch import Tensor

from tests.oracles import reference

Inputs = Mapping[str, Tensor]
Ablated = Callable[[Tensor], AbstractContextManager[None]]
"""Within the context a direction is ablated."""


@torch.no_grad()
def logits_of(model: reference.Model, prompts: Sequence[Inputs]) -> Tensor:
    """Logits at the last position, [prompt, 1, vocab]."""
    return torch.cat([model.module(**prompt, use_cache=False).logits[:, -1:] for prompt in prompts])


def activations(model: reference.Model, prompts: Sequence[Inputs], n_positions: int) -> Tensor:
    """The residual stream at the input of every layer at the last positions, [prompt, position, layer, d_model]."""
    seen: list[list[Tensor]] = [[] for _ in model.layers]

    def keep(into: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def change_nothing(hidden: Tensor) -> Tensor:
            into.append(hidden[:, -n_positions:].clone())
            return hidden

        return change_nothing

    with ExitStack() as hooks:
        for layer, into in zip(model.layers, seen, strict=True):
            hooks.enter_context(reference.changed_input(layer, keep(into)))
        logits_of(model, prompts)
    return torch.stack([torch.cat(parts) for parts in seen], dim=2)


def report(
    model: reference.Model,
    *,
    harmful_train: Sequence[Inputs],
    harmless_train: Sequence[Inputs],
    harmful_val: Sequence[Inputs],
    harmless_val: Sequence[Inputs],
    refusal_tokens: Sequence[int],
    n_positions: int,
    ablated: Ablated | None = None,
    among: Collection[tuple[int, int]] | None = None,
) -> reference.Report:
    """Candidates and their scores; no prompt is filtered out.

    Args:
        ablated: how a direction is ablated, if not by what is known about the model.
        among: the candidates (position, layer) that are scored; the others' scores are NaN. None: all.
    """
    ablated = ablated or partial(reference.ablated, model)
    harmful, harmless = (
        activations(model, prompts, n_positions).double().mean(dim=0) for prompts in (harmful_train, harmless_train)
    )
    candidates = harmful - harmless
    of_harmful, of_harmless = logits_of(model, harmful_val), logits_of(model, harmless_val)
    ablation = torch.full((*candidates.shape[:2], len(harmful_val)), torch.nan, dtype=torch.float64)
    steering = torch.full((*candidates.shape[:2], len(harmless_val)), torch.nan, dtype=torch.float64)
    kl = torch.full_like(steering, torch.nan)
    for position in range(candidates.shape[0]):
        for layer in range(candidates.shape[1]):
            if among is not None and (position, layer) not in among:
                continue
            direction = candidates[position, layer]
            with ablated(direction):
                ablation[position, layer] = reference.refusal_scores(logits_of(model, harmful_val), refusal_tokens)
                kl[position, layer] = reference.kl_divergences(of_harmless, logits_of(model, harmless_val))
            with reference.steered(model, direction, layer):
                steering[position, layer] = reference.refusal_scores(logits_of(model, harmless_val), refusal_tokens)
    return reference.Report(
        baseline_harmful=reference.refusal_scores(of_harmful, refusal_tokens),
        baseline_harmless=reference.refusal_scores(of_harmless, refusal_tokens),
        candidates=candidates,
        ablation=ablation,
        steering=steering,
        kl=kl,
    )
