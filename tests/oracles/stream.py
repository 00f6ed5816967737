"""Follows the residual stream operator by operator, and measures it after every addition.

Nothing is assumed about which modules write into the stream. Inside each decoder layer every operator that PyTorch
dispatches is watched: what comes out of an addition of a tensor as wide as the stream is the stream again; moving or
rescaling it leaves it the stream; anything else only reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_MOVES = frozenset(
    {"_reshape_alias", "_to_copy", "_unsafe_view", "alias", "clone", "contiguous", "detach"}
    | {"expand", "select", "slice", "squeeze", "unsqueeze", "view"}
)
_ADDITIONS = frozenset({"add", "sub"})
_SCALINGS = frozenset({"mul", "div"})


class LostStream(AssertionError):
    """A layer returned something that was not reached by additions from its input."""


class Leaks:
    """What was measured: |x . u| / |x|, the largest over rows and tokens, at each point of the stream in turn."""

    def __init__(self) -> None:
        self.inputs: list[float] = []
        """At the input of each layer."""
        self.additions: list[float] = []
        """After each addition to the stream."""

    @property
    def worst(self) -> float:
        return max(self.inputs + self.additions)


class _Follow(TorchDispatchMode):
    """Knows which tensors are the stream, from one layer's input on."""

    def __init__(self, start: Tensor, measure: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._stream = {id(start): start}  # the tensors are kept, so that an id is not used again
        self._shape = start.shape
        self._measure = measure

    def is_stream(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket.__name__
        operator = operator if operator.startswith("_") else operator.rstrip("_")  # in place or not
        operands = args[:2]
        if not isinstance(output, Tensor) or not any(map(self.is_stream, operands)):
            return output
        others = [value for value in operands if not self.is_stream(value)]
        if operator in _ADDITIONS and all(map(partial(_is_write, output), others)):
            self._stream[id(output)] = output
            self._measure(output)  # the mode is off in here
        elif operator in _MOVES or (operator in _SCALINGS and all(map(_is_scalar, others))):
            self._stream[id(output)] = output
        return output


def _is_write(stream: Tensor, value: Any) -> bool:
    """As wide as the stream, for each token or one for all."""
    return isinstance(value, Tensor) and value.ndim == stream.ndim and value.shape[-1] == stream.shape[-1]


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or (value.ndim <= 1 and value.numel() == 1)


def _share(x: Tensor, u: Tensor) -> float:
    """max |x . u| / |x|; u is (d_model,), or (row, d_model)."""
    x, u = x.double(), u.double()
    if u.ndim == 2:
        x = x.reshape(u.shape[0], -1, u.shape[1])
        u = u.unsqueeze(1)
    return float(((x * u).sum(-1).abs() / x.norm(dim=-1).clamp_min(1e-30)).max())


@contextmanager
def followed(layers: Sequence[nn.Module], direction: Tensor) -> Iterator[Leaks]:
    """Within the context every call of a layer is followed. `direction` need not be of unit length."""
    u = direction.double() / direction.double().norm(dim=-1, keepdim=True)
    leaks = Leaks()

    def following(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            leaks.inputs.append(_share(hidden, u))
            with _Follow(hidden, lambda x: leaks.additions.append(_share(x, u))) as follow:
                output = own(*args, **kwargs)
            after = output[0] if isinstance(output, tuple) else output
            if after is hidden or not follow.is_stream(after):
                raise LostStream("a layer's output was not reached by additions from its input")
            return output

        return forward

    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = following(layer.forward)
        yield leaks
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
