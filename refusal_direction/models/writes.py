"""Residual writes of a decoder layer, found by structure and not by name.

A layer computes `out = c0 * in + sum_i c_i * w_i`, where the writes w_i are outputs of some of its submodules. Names do not
tell which: `post_attention_layernorm` is a write in Gemma 2 and a read in Llama. The layer is therefore run on random
hidden states, and its writes are the smallest set of submodule outputs that explains its output exactly.

If a norm is applied to the stream itself (MiniMax, BERT), its output replaces the stream and is a write like the others; the
stream before the norm is then explained in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refusal_direction.errors import UnsupportedModelError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["WriteSite", "find_writes", "in_float32", "kind_of"]

_MAX_WRITES = 5
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRAINING = "The layer is in training mode, in which dropout can hide its writes: call model.eval() first. "


@dataclass(frozen=True)
class WriteSite:
    """A residual write: a submodule of a layer whose output is added to the residual stream."""

    module: str
    """Name of the submodule, relative to the layer."""
    element: int | None = None
    """Index into its output if that is a tuple, otherwise None."""


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """Class, submodules and names of weights: layers that agree in these have the same writes."""
    modules = ((name, type(module)) for name, module in layer.named_modules() if name)
    return (type(layer), *modules, *(name for name, _ in layer.named_parameters()))


def _is_plain(weight: Tensor) -> bool:
    """False for quantised weights: integers, 8-bit floats, or tensor subclasses that report another dtype."""
    return weight.dtype in _PLAIN and type(weight.data) is Tensor


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[bool]:
    """Convert a layer to float32 if its weights are plain half-precision numbers; restore its own tensors at exit.

    In bfloat16 a small write is lost in the rounding of the others. Yields whether the layer was converted.
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


@dataclass(frozen=True)
class _Output:
    """Output of a submodule, and its input if that has the size of the stream."""

    site: WriteSite
    made: Float[Tensor, "row token d_model"]
    given: Float[Tensor, "row token d_model"] | None


def find_writes(
    layer: nn.Module, run: Callable[[Tensor], Tensor], like: Float[Tensor, "row token d_model"]
) -> tuple[WriteSite, ...]:
    """The layer's writes, in order of execution.

    Args:
        layer: a decoder layer, its weights in memory.
        run: calls the layer on hidden states (row, token, d_model) and returns the new ones.
        like: hidden states whose shape, dtype and device are used.

    Raises UnsupportedModelError if no set of up to five submodule outputs explains the layer's output, or if that is not
    finite.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(like.shape, generator=generator).to(like)
    # Scale the stream to the size of the writes: one that is small beside the stream would be lost in rounding.
    update = run(hidden.clone()) - hidden
    if not update.isfinite().all():
        half = like.dtype in (torch.float16, torch.bfloat16)
        raise UnsupportedModelError(
            f"The output of {type(layer).__name__} is not finite: its weights are damaged"
            + (", or overflow in their dtype. Try --dtype float32, or download" if half else ". Download")
            + " them again."
        )
    hidden = hidden * (update.float().std() / hidden.float().std()).clamp(1e-3, 1e3).to(like)
    outputs, after = _record(layer, run, hidden)
    writes = _retrace(after, hidden, outputs, torch.finfo(like.dtype).eps)
    if writes is None:
        raise UnsupportedModelError(
            f"The residual writes of {type(layer).__name__} were not found: its output is not its input plus a weighted sum of "
            f"up to {_MAX_WRITES} of its submodules' outputs ({', '.join(o.site.module for o in outputs) or 'none fits'}). "
            + (_TRAINING if layer.training else "")
            + "Ablation would leave part of the direction in the stream, so no direction is computed for this model."
        )
    return tuple(outputs[index].site for index in writes)


def _record(layer: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[list[_Output], Tensor]:
    """Run the layer; return its distinct submodule outputs of the stream's shape, and its own output."""
    seen: dict[WriteSite, list[_Output]] = {}
    generator = torch.Generator().manual_seed(1)

    def like_the_stream(part: Any) -> bool:
        same_size = isinstance(part, Tensor) and part.numel() == hidden.numel()
        return same_size and part.is_floating_point() and part.shape[-1] == hidden.shape[-1]

    def copied(part: Tensor) -> Tensor:
        return part.detach().clone().view(hidden.shape)

    def made_visible(part: Any) -> Any:
        """Replace zeros by noise: this layer may not use a write that another one of its kind does."""
        if not like_the_stream(part) or part.any():
            return part
        return torch.randn(part.shape, generator=generator).to(part) * hidden.std()

    def keep(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            given = copied(args[0]) if args and like_the_stream(args[0]) else None
            parts = tuple(map(made_visible, output if isinstance(output, tuple) else (output,)))
            for element, part in enumerate(parts):
                if like_the_stream(part):
                    site = WriteSite(name, element if isinstance(output, tuple) else None)
                    seen.setdefault(site, []).append(_Output(site, copied(part), given))
            return parts if isinstance(output, tuple) else parts[0]

        return hook

    names = [(name, module) for name, module in layer.named_modules() if name and not isinstance(module, nn.Dropout)]
    with ExitStack() as hooks:
        for name, module in names:
            hooks.callback(module.register_forward_hook(keep(name)).remove)
        after = run(hidden.clone())
    distinct: list[_Output] = []
    for calls in seen.values():
        # an output that an enclosing module passes on belongs to the inner module
        passed_on = any(torch.equal(calls[0].made, output.made) for output in distinct)
        if len(calls) == 1 and not passed_on and calls[0].made.isfinite().all():
            distinct.append(calls[0])
    return distinct, after


def _retrace(stream: Tensor, before: Tensor, outputs: list[_Output], eps: float) -> tuple[int, ...] | None:
    """Indices of the writes that lead from `before` to `stream`, through norms on the stream if there are any."""
    if torch.equal(stream, before):
        return ()
    indices = range(len(outputs))
    writes = _explain(before, outputs, indices, stream, eps)
    if writes is not None:
        return writes
    for index, norm in enumerate(outputs):
        if norm.given is None or not _is_norm(norm.given, norm.made):
            continue
        others = [other for other in indices if other != index]
        since = () if torch.equal(stream, norm.made) else _explain(norm.made, outputs, others, stream, eps)
        until = None if since is None else _retrace(norm.given, before, outputs[:index], eps)
        if since is not None and until is not None:
            return (*until, index, *since)
    return None


def _is_norm(given: Tensor, made: Tensor) -> bool:
    """Whether `made` is `given` normalised token by token (centred or not), then scaled and shifted by channel."""
    x, y = (tensor.flatten(0, -2).cpu().double() for tensor in (given, made))
    y = y - y.mean(0)
    for centred in (x, x - x.mean(-1, keepdim=True)):
        z = centred / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-300)
        z = z - z.mean(0)
        scale = (z * y).sum(0) / z.square().sum(0).clamp_min(1e-300)
        if (y - scale * z).norm() < 1e-3 * y.norm():
            return True
    return False


def _explain(
    before: Tensor, outputs: list[_Output], among: Sequence[int], after: Tensor, eps: float
) -> tuple[int, ...] | None:
    """Indices of the smallest set of outputs, among those given, that explains `after` up to rounding, or None.

    A set is rejected if a further output improves its fit: then a small write is missing from it.
    """
    tokens = torch.stack([after, before, *(output.made for output in outputs)]).flatten(1, -2).cpu().double()
    tokens = tokens / tokens[0].norm(dim=-1, keepdim=True).clamp_min(1e-300)  # each token weighs the same
    flat = tokens.flatten(1)
    gram = flat @ flat.T

    def misfit(subset: tuple[int, ...]) -> float:
        """Relative residual of a least-squares fit; infinite if an output gets no weight."""
        terms = [1, *(index + 2 for index in subset)]
        columns = flat[terms]
        weights = torch.linalg.lstsq(gram[terms][:, terms], gram[terms, :1], driver="gelsd").solution
        if (weights.abs() < 1e-3).any():
            return float("inf")
        return float((weights.T @ columns - flat[0]).norm() / flat[0].norm())

    tolerance = max(1e-5, 2 * eps)
    for size in range(1, _MAX_WRITES + 1):
        for subset in itertools.combinations(among, size):
            error = misfit(subset)
            if error < tolerance:
                wider = (misfit(tuple(sorted({*subset, more}))) for more in among if more not in subset)
                if all(error < 1e-7 or other > error / 3 for other in wider):
                    return subset
    return None
