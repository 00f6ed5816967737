"""The method of Arditi et al. (2024), as slowly and as plainly as it can be written.

One candidate at a time, padded batches, plain hooked forwards of the whole model, logits of every position, scores in
float64. Where the residual stream is written is not found out, but told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Prompt = Sequence[int]
"""A prompt's token ids."""


@dataclass(frozen=True)
class Model:
    """A model, and what a person knows about it."""

    module: PreTrainedModel
    layers: nn.ModuleList
    writes: tuple[str, ...]
    """The submodules of every layer whose outputs are added to the residual stream."""
    needs_position_ids: bool = False
    adds_between_layers: bool = False
    """Whether the model itself adds to the stream between layers."""


@dataclass(frozen=True)
class Report:
    """What the method computes. Candidates are [position, layer, d_model]; scores [position, layer, prompt]."""

    baseline_harmful: Tensor
    """Refusal scores of the harmful validation prompts, [prompt]."""
    baseline_harmless: Tensor
    candidates: Tensor
    ablation: Tensor
    steering: Tensor
    kl: Tensor


def refusal_scores(logits: Tensor, refusal_tokens: Sequence[int]) -> Tensor:
    """log(p + 1e-8) - log(1 - p + 1e-8) at the last position; logits are [prompt, position, vocab]."""
    probabilities = torch.softmax(logits[:, -1].double(), dim=-1)
    p = sum(probabilities[:, token] for token in refusal_tokens)
    assert isinstance(p, Tensor)
    return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)


def kl_divergences(baseline: Tensor, changed: Tensor) -> Tensor:
    """sum P (log(P + 1e-6) - log(Q + 1e-6)) at the last position; logits are [prompt, position, vocab]."""
    p = torch.softmax(baseline[:, -1].double(), dim=-1)
    q = torch.softmax(changed[:, -1].double(), dim=-1)
    return (p * (torch.log(p + 1e-6) - torch.log(q + 1e-6))).sum(-1)


def padded(model: Model, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Model inputs for prompts of any lengths, padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.needs_position_ids:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


@torch.no_grad()
def logits_of(model: Model, prompts: Sequence[Prompt]) -> Tensor:
    """Logits at every position, [prompt, position, vocab]."""
    return model.module(**padded(model, prompts), use_cache=False).logits


def activations(model: Model, prompts: Sequence[Prompt], n_positions: int) -> Tensor:
    """The residual stream at the input of every layer at the last positions, [prompt, position, layer, d_model]."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden[:, -n_positions:].clone())
        return hidden

    with ExitStack() as hooks:
        for layer in model.layers:
            hooks.enter_context(changed_input(layer, keep))
        logits_of(model, prompts)
    return torch.stack(seen, dim=2)


def candidates(model: Model, harmful: Sequence[Prompt], harmless: Sequence[Prompt], n_positions: int) -> Tensor:
    """Differences of means, float64 [position, layer, d_model]."""
    of_harmful = activations(model, harmful, n_positions).double()
    of_harmless = activations(model, harmless, n_positions).double()
    return of_harmful.mean(dim=0) - of_harmless.mean(dim=0)


@contextmanager
def changed_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context the hidden states that go into `module` are changed."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context what comes out of `module` (first, if it is a tuple) is changed."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def ablated(model: Model, direction: Tensor) -> Iterator[None]:
    """Directional ablation: of the embedding output and of every write, in every layer."""
    u = direction.double() / (direction.double().norm() + 1e-8)

    def without_direction(x: Tensor) -> Tensor:
        along = (x * u.to(x.dtype)).sum(dim=-1, keepdim=True)
        return x - along * u.to(x.dtype)

    with ExitStack() as hooks:
        for layer in model.layers if model.adds_between_layers else model.layers[:1]:
            hooks.enter_context(changed_input(layer, without_direction))
        for layer in model.layers:
            for name in model.writes:
                hooks.enter_context(changed_output(layer.get_submodule(name), without_direction))
        yield


@contextmanager
def steered(model: Model, direction: Tensor, layer: int) -> Iterator[None]:
    """Activation addition: the direction is added to the input of one layer, at every position."""
    with changed_input(model.layers[layer], lambda x: x + direction.to(x.dtype)):
        yield


def report(
    model: Model,
    *,
    harmful_train: Sequence[Prompt],
    harmless_train: Sequence[Prompt],
    harmful_val: Sequence[Prompt],
    harmless_val: Sequence[Prompt],
    refusal_tokens: Sequence[int],
    n_positions: int,
) -> Report:
    """Candidates and, one candidate at a time, their scores; no prompt is filtered out."""
    r = candidates(model, harmful_train, harmless_train, n_positions)
    of_harmful = logits_of(model, harmful_val)
    of_harmless = logits_of(model, harmless_val)
    ablation = torch.zeros(*r.shape[:2], len(harmful_val), dtype=torch.float64)
    steering = torch.zeros(*r.shape[:2], len(harmless_val), dtype=torch.float64)
    kl = torch.zeros_like(steering)
    for position in range(r.shape[0]):
        for layer in range(r.shape[1]):
            direction = r[position, layer]
            with ablated(model, direction):
                ablation[position, layer] = refusal_scores(logits_of(model, harmful_val), refusal_tokens)
                kl[position, layer] = kl_divergences(of_harmless, logits_of(model, harmless_val))
            with steered(model, direction, layer):
                steering[position, layer] = refusal_scores(logits_of(model, harmless_val), refusal_tokens)
    return Report(
        baseline_harmful=refusal_scores(of_harmful, refusal_tokens),
        baseline_harmless=refusal_scores(of_harmless, refusal_tokens),
        candidates=r,
        ablation=ablation,
        steering=steering,
        kl=kl,
    )
