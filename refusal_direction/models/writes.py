"""Finding where a decoder layer writes into the residual stream, by structure and not by name.

A layer computes `out = c0 * in + sum_i c_i * w_i`, where the writes w_i are outputs of some of its submodules. Which, no
name tells: `post_attention_layernorm` is a write in Gemma 2 and a read in Llama. So the layer is run once on random hidden
states and the smallest set of submodule outputs that explains its output exactly is looked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refusal_direction.errors import UnsupportedModelError

__all__ = ["WriteSite", "find_writes", "in_float32", "kind_of"]

_MOST_WRITES = 5
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WriteSite:
    """A submodule of a layer whose output is added to the residual stream."""

    module: str
    """Its name, relative to the layer."""
    element: int | None = None
    """Which element of its output, where that is a tuple."""


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """Layers of one kind have the same class and submodules, and so the same writes."""
    return (type(layer), *((name, type(module)) for name, module in layer.named_modules() if name))


def _is_plain(weight: Tensor) -> bool:
    """Not so are quantised weights: integers, 8-bit floats, or tensors of a class of their own that pass for others."""
    return weight.dtype in _PLAIN and type(weight.data) is Tensor


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[bool]:
    """Within the context the layer computes in float32, if its weights are plain half-precision numbers.

    In bfloat16 a small write drowns in the rounding of the others. Afterwards the layer has its own tensors back.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    half = [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
    if not half or not all(map(_is_plain, layer.parameters())):
        yield False
        return
    own = [tensor.data for tensor in half]
    try:
        for tensor in half:
            tensor.data = tensor.data.float()
        yield True
    finally:
        for tensor, data in zip(half, own, strict=True):
            tensor.data = data


def find_writes(layer: nn.Module, run: Callable[[Tensor], Tensor], like: Tensor) -> tuple[WriteSite, ...]:
    """The layer's writes, in the order in which they happen.

    Args:
        layer: a decoder layer, its weights in memory.
        run: calls the layer on hidden states (row, token, d_model) and returns the new ones.
        like: hidden states whose shape, dtype and device are used.

    Raises UnsupportedModelError where no set of up to five submodule outputs explains the layer's output.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(like.shape, generator=generator).to(like)
    # A write that is small beside the stream would drown in rounding: bring the stream to the size of the writes.
    update = run(hidden.clone()) - hidden
    hidden = hidden * (update.float().std() / hidden.float().std()).clamp(1e-3, 1e3).to(like)
    sites, outputs, after = _record(layer, run, hidden)
    chosen = _explain(hidden, outputs, after, torch.finfo(like.dtype).eps)
    if chosen is None:
        raise UnsupportedModelError(
            f"The residual writes of {type(layer).__name__} were not found: its output is not its input plus a weighted sum "
            f"of up to {_MOST_WRITES} of its submodules' outputs ({', '.join(site.module for site in sites) or 'none fits'}). "
            "Ablation would leave part of the direction in the stream, so no direction is computed for this model."
        )
    return tuple(sites[index] for index in chosen)


def _record(
    layer: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor
) -> tuple[list[WriteSite], list[Tensor], Tensor]:
    """Run the layer; return each distinct submodule output of the stream's shape, and the layer's output."""
    seen: dict[WriteSite, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            parts = enumerate(output) if isinstance(output, tuple) else [(None, output)]
            for element, part in parts:
                same_size = isinstance(part, Tensor) and part.numel() == hidden.numel()
                if same_size and part.is_floating_point() and part.shape[-1] == hidden.shape[-1]:
                    seen.setdefault(WriteSite(name, element), []).append(part.detach().clone().view(hidden.shape))

        return hook

    names = [(name, module) for name, module in layer.named_modules() if name and not isinstance(module, nn.Dropout)]
    handles = [module.register_forward_hook(keep(name)) for name, module in names]
    try:
        after = run(hidden.clone())
    finally:
        for handle in handles:
            handle.remove()
    sites: list[WriteSite] = []
    outputs: list[Tensor] = []
    for site, calls in seen.items():
        handed_on = any(
            torch.equal(calls[0], output) for output in outputs
        )  # by an enclosing module: keep the inner one
        if len(calls) == 1 and not handed_on:
            sites.append(site)
            outputs.append(calls[0])
    return sites, outputs, after


def _explain(before: Tensor, outputs: list[Tensor], after: Tensor, eps: float) -> tuple[int, ...] | None:
    """The smallest set of outputs that, with `before`, gives `after` up to rounding and that no further output betters."""
    tokens = torch.stack([after, before, *outputs]).flatten(1, -2).double().cpu()
    tokens = tokens / tokens[0].norm(dim=-1, keepdim=True).clamp_min(1e-300)  # each token weighs the same
    flat = tokens.flatten(1)
    gram = flat @ flat.T

    def misfit(chosen: tuple[int, ...]) -> float:
        columns = flat[[1, *(index + 2 for index in chosen)]]
        which = [1, *(index + 2 for index in chosen)]
        weights = torch.linalg.lstsq(gram[which][:, which], gram[which, :1], driver="gelsd").solution
        if (weights.abs() < 1e-3).any():
            return float("inf")
        return float((weights.T @ columns - flat[0]).norm() / flat[0].norm())

    tolerance = max(1e-5, 2 * eps)
    everything = range(len(outputs))
    for size in range(1, _MOST_WRITES + 1):
        for chosen in itertools.combinations(everything, size):
            error = misfit(chosen)
            if error < tolerance:
                wider = (misfit(tuple(sorted({*chosen, more}))) for more in everything if more not in chosen)
                if all(error < 1e-7 or other > error / 3 for other in wider):
                    return chosen
    return None
