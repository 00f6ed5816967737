"""Which part of the last layer may see the last token alone.

Only the last position's logits are asked for, so in the last layer the MLP, the greater part of it, need not be computed at
the other positions. Its output for one token is then added to all positions of the stream; those besides the last are not
looked at. Which module that is, and whether the layer still gives the same output, is found out by trying.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from refusal_direction.engine.skeleton import LayerCall, hidden_states_of

__all__ = ["last_token", "token_wise_child"]


def last_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook that leaves only the last token of (row, token, d_model)."""
    return (args[0][:, -1:], *args[1:])


@torch.no_grad()
def token_wise_child(layer: nn.Module, call: LayerCall, hidden: Tensor) -> nn.Module | None:
    """The largest child of the layer whose output for the last token is the same when it sees no other; or None."""
    children = sorted(layer.children(), key=lambda child: -sum(weight.numel() for weight in child.parameters()))
    for child in children:
        whole, alone = (_outputs(layer, child, call, hidden, sliced=sliced) for sliced in (False, True))
        if whole is not None and alone is not None and _same_last_token(whole, alone):
            return child
    return None


def _outputs(
    layer: nn.Module, child: nn.Module, call: LayerCall, hidden: Tensor, *, sliced: bool
) -> tuple[Tensor, Tensor] | None:
    """What child and layer give; None where the child does not take the tokens once, or its layer cannot add one to many."""
    seen: list[Tensor] = []
    takes_tokens: list[bool] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        takes_tokens.append(bool(args) and isinstance(args[0], Tensor) and args[0].shape == hidden.shape)
        return last_token(module, args) if sliced and takes_tokens[-1] else None

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(hidden_states_of(output))

    with ExitStack() as hooks:
        hooks.callback(child.register_forward_pre_hook(before).remove)
        hooks.callback(child.register_forward_hook(after).remove)
        try:
            output = call(layer, hidden)
        except (RuntimeError, ValueError, IndexError):
            return None
    fits = takes_tokens == [True] and output.shape == hidden.shape and seen[0].ndim == hidden.ndim
    return (seen[0][:, -1], output[:, -1]) if fits else None


def _same_last_token(whole: tuple[Tensor, Tensor], alone: tuple[Tensor, Tensor]) -> bool:
    """Child and layer agree up to rounding, each by its own measure: attention, which needs the others, does not."""
    tolerance = max(1e-5, 2 * torch.finfo(whole[0].dtype).eps)
    return all(
        float((a - b).abs().max()) <= tolerance * float(a.abs().max()) for a, b in zip(whole, alone, strict=True)
    )
