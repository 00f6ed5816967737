"""Shortcut in the last layer: its MLP is computed for the last token alone.

Only the logits at the last position are needed, and the MLP is the larger part of a layer. Its output for one token is
then added at all positions of the stream, of which only the last is read. Trials show which module is the MLP, and
whether the layer still gives the same output.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refusal_direction.engine.skeleton import LayerCall, hidden_states_of

__all__ = ["last_token", "token_wise_child"]


def last_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook that leaves only the last token of (row, token, d_model)."""
    return (args[0][:, -1:], *args[1:])


@torch.no_grad()
def token_wise_child(layer: nn.Module, call: LayerCall, hidden: Tensor) -> nn.Module | None:
    """The largest child of the layer that needs no other token for the layer's output at the last one, or None.

    Args:
        layer: the last decoder layer, its weights in memory.
        call: its arguments for the rows of `hidden`.
        hidden: hidden states (row, token, d_model) of at least two tokens, since with one every child would pass.
    """
    children = sorted(layer.children(), key=lambda child: -sum(weight.numel() for weight in child.parameters()))
    for child in children:
        whole, alone = (_outputs(layer, child, call, hidden, sliced=sliced) for sliced in (False, True))
        if whole is None or alone is None or not (_same(whole.child, alone.child) and _same(whole.layer, alone.layer)):
            continue
        flipped = _outputs(layer, child, call, hidden, instead=_flipped(whole.child))
        if flipped is not None and torch.equal(flipped.layer[:, -1], whole.layer[:, -1]):
            return child
    return None


class _Outputs(NamedTuple):
    child: Tensor
    layer: Tensor


def _outputs(
    layer: nn.Module,
    child: nn.Module,
    call: LayerCall,
    hidden: Tensor,
    *,
    sliced: bool = False,
    instead: Tensor | None = None,
) -> _Outputs | None:
    """Outputs of the child and of its layer; None if the child is not called once on all tokens, or shapes do not fit.

    Args:
        layer: the layer to run.
        child: one of its children.
        call: the layer's arguments.
        hidden: the layer's hidden states (row, token, d_model).
        sliced: give the child the last token alone.
        instead: tensor that replaces the child's output.
    """
    seen: list[Tensor] = []
    takes_tokens: list[bool] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        takes_tokens.append(bool(args) and isinstance(args[0], Tensor) and args[0].shape == hidden.shape)
        return last_token(module, args) if sliced and takes_tokens[-1] else None

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(hidden_states_of(output))
        if instead is None:
            return None
        return (instead, *output[1:]) if isinstance(output, tuple) else instead

    with ExitStack() as hooks:
        hooks.callback(child.register_forward_pre_hook(before).remove)
        hooks.callback(child.register_forward_hook(after).remove)
        try:
            output = call(layer, hidden)
        except (RuntimeError, ValueError, IndexError):
            return None
    fits = takes_tokens == [True] and output.shape == hidden.shape and seen[0].ndim == hidden.ndim
    return _Outputs(seen[0], output) if fits else None


def _flipped(output: Tensor) -> Tensor:
    """The output with its sign flipped at all tokens but the last: changes the layer's last token if it depends on them."""
    flipped = -output
    flipped[:, -1] = output[:, -1]
    return flipped


def _same(whole: Tensor, alone: Tensor) -> bool:
    """Whether the last token is equal up to rounding: by the largest difference, and by the median of relative ones,
    which a channel of large values cannot hide."""
    a, b = whole[:, -1].float(), alone[:, -1].float()
    tolerance = max(1e-5, 2 * torch.finfo(whole.dtype).eps)
    difference, size = (a - b).abs(), torch.maximum(a.abs(), b.abs())
    median = (difference / size.clamp_min(torch.finfo(torch.float32).tiny)).median()
    return bool(difference.max() <= tolerance * size.max()) and bool(median <= tolerance)
