"""Follows the residual stream operator by operator, and measures or cleans it after every addition.

Nothing is assumed about which modules write into the stream. Inside each decoder layer every operator that PyTorch
dispatches is watched: what comes out of an addition of a tensor as wide as the stream is the stream again; moving or
rescaling it leaves it the stream; anything else only reads it. Of what was added, that counts from which the layer's output
was reached; sums that are only read (Zamba 2's) are not the stream. Only norms that stand on the stream itself are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

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


AtAddition = Callable[[int, Tensor], Tensor]
"""Called with the number of an addition and the stream after it; returns the stream to go on with."""


class _Follow(TorchDispatchMode):
    """Knows which tensors are the stream, from one layer's input on, and what each was made of."""

    def __init__(self, start: Tensor, at_addition: AtAddition) -> None:
        super().__init__()
        self._at_addition = at_addition
        self._stream = {id(start): start}  # the tensors are kept, so that an id is not used again
        self._parents: dict[int, list[int]] = {id(start): []}
        self._additions: list[int] = []

    def is_stream(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._stream

    def path_to(self, output: Tensor) -> set[int]:
        """The numbers of the additions that led to a tensor of the stream."""
        led, found = [id(output)], {id(output)}
        while led:
            parents = set(self._parents[led.pop()]) - found
            led += parents
            found |= parents
        return {number for number, made in enumerate(self._additions) if made in found}

    def added(self, output: Tensor, parents: Sequence[Any]) -> Tensor:
        """Take in a tensor that begins a new stretch of the stream; what to go on with instead."""
        number = len(self._additions)
        changed = self._at_addition(number, output)
        self._take_in(changed, parents)
        self._additions.append(id(changed))
        return changed

    def _take_in(self, output: Tensor, parents: Sequence[Any]) -> None:
        self._stream[id(output)] = output
        self._parents.setdefault(id(output), []).extend(id(parent) for parent in parents if self.is_stream(parent))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        operator = name if name.startswith("_") else name.rstrip("_")  # in place or not
        operands = args[:2]
        if not isinstance(output, Tensor) or not any(map(self.is_stream, operands)):
            return output
        others = [value for value in operands if not self.is_stream(value)]
        if operator in _ADDITIONS and all(map(partial(_is_write, output), others)):
            changed = self.added(output, operands)  # the mode is off in here
            return output.copy_(changed) if output is args[0] else changed
        if operator in _MOVES or (operator in _SCALINGS and all(map(_is_scalar, others))):
            self._take_in(output, operands)
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


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def _walk(
    layer: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any, norms: Sequence[str], at_addition: AtAddition
) -> tuple[Any, set[int]]:
    """Call a layer under watch; its output, and the numbers of the additions that led there."""
    hidden = _hidden(args, kwargs)
    follow = _Follow(hidden, at_addition)

    def replaces_the_stream(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        with _disable_current_modes():
            return follow.added(output, inputs)

    with ExitStack() as hooks, follow:
        for name, module in layer.named_modules():
            if name in norms:
                hooks.callback(module.register_forward_hook(replaces_the_stream).remove)
        output = own(*args, **kwargs)
    after = output[0] if isinstance(output, tuple) else output
    if after is hidden or not follow.is_stream(after):
        raise LostStream("a layer's output was not reached by additions from its input")
    return output, follow.path_to(after)


Walk = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def _walked(layers: Sequence[nn.Module], walk: Walk) -> Iterator[None]:
    """Within the context every call of a layer goes through `walk`."""
    before = [layer.__dict__.get("forward") for layer in layers]

    def walking(layer: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: walk(layer, own, args, kwargs)

    try:
        for layer in layers:
            layer.forward = walking(layer, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextmanager
def followed(layers: Sequence[nn.Module], direction: Tensor, norms: Sequence[str] = ()) -> Iterator[Leaks]:
    """Within the context every call of a layer is measured. `direction` need not be of unit length."""
    u = direction.double() / direction.double().norm(dim=-1, keepdim=True)
    leaks = Leaks()

    def walk(layer: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaks.inputs.append(_share(_hidden(args, kwargs), u))
        shares: list[float] = []

        def measure(number: int, x: Tensor) -> Tensor:
            shares.append(_share(x, u))
            return x

        output, path = _walk(layer, own, args, kwargs, norms, measure)
        leaks.additions += [shares[number] for number in sorted(path)]
        return output

    with _walked(layers, walk):
        yield leaks


@contextmanager
def purged(layers: Sequence[nn.Module], direction: Tensor, norms: Sequence[str] = ()) -> Iterator[None]:
    """Directional ablation without knowing who writes: the stream is cleaned at each layer's input and after each addition.

    Each layer is run twice, first to see which additions lead to its output.
    """
    u = direction.double() / (direction.double().norm() + 1e-8)

    def clean(x: Tensor) -> Tensor:
        return (x.double() - (x.double() @ u).unsqueeze(-1) * u).to(x)

    def walk(layer: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = clean(_hidden(args, kwargs))
        _, path = _walk(layer, own, *_with_hidden(hidden.clone(), args, kwargs), norms, lambda number, x: x)

        def purge(number: int, x: Tensor) -> Tensor:
            return clean(x) if number in path else x

        return _walk(layer, own, *_with_hidden(hidden, args, kwargs), norms, purge)[0]

    with _walked(layers, walk):
        yield
