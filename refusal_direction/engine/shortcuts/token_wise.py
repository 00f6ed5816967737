"""Which part of the last layer may see the last token alone.

Only the last position's logits are asked for, so in the last layer the MLP, the greater part of it, need not be computed at
the other positions. Its output for one token is then added to all positions of the stream; those besides the last are not
looked at. Which module that is, and whether the layer still gives the same output, is found out by trying.
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
    """The largest child of the layer that need not see any token but the last for the layer's last token; or None.

    `hidden` (row, token, d_model) must have at least two tokens: of one alone every child would do.
    """
    children = sorted(layer.children(), key=lambda child: -sum(weight.numel() for weight in child.parameters()))
    for child in children:
        whole, alone = (_outputs(layer, child, call, hidden, sliced=sliced) for sliced in (False, True))
        if whole is None or alone is None or not (_same(whole.child, alone.child) and _same(whole.layer, alone.layer)):
            continue
        other = _outputs(layer, child, call, hidden, instead=_otherwise(whole.child))
        if other is not None and torch.equal(other.layer[:, -1], whole.layer[:, -1]):
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
    """What child and layer give, the child maybe for the last token alone, or with another output `instead`.

    None where the child does not take the tokens once, or its layer cannot add one to many.
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


def _otherwise(output: Tensor) -> Tensor:
    """The contrary at all tokens but the last. If the layer's last token notices, as attention does, it needs them."""
    other = -output
    other[:, -1] = output[:, -1]
    return other


def _same(whole: Tensor, alone: Tensor) -> bool:
    """Equal at the last token up to rounding: the largest difference, and the usual one, which no large channel hides."""
    a, b = whole[:, -1].float(), alone[:, -1].float()
    tolerance = max(1e-5, 2 * torch.finfo(whole.dtype).eps)
    off, size = (a - b).abs(), torch.maximum(a.abs(), b.abs())
    usual = (off / size.clamp_min(torch.finfo(torch.float32).tiny)).median()
    return bool(off.max() <= tolerance * size.max()) and bool(usual <= tolerance)
