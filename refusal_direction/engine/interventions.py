"""Directional ablation and activation addition on a running model (paper, section 2.4).

Hooks exist only inside these contexts, and no weight is changed: an intervention ends with its `with` block. Hooks belong
to the model: a forward in another thread meets them too, and a copy that is made inside of a context (copy.deepcopy, pickle)
keeps them for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from threading import Lock, RLock, get_ident
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refusal_direction.directions import ablate, in_own_dtype, unit, widest_dtype
from refusal_direction.engine.residency import resident
from refusal_direction.engine.skeleton import Prelude, Skeleton
from refusal_direction.models.layers import find_layers, unwrapped
from refusal_direction.models.placement import execution_device
from refusal_direction.models.writes import WriteSite, find_writes, in_float32, kind_of

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["ResidualStream", "ablated", "eagerly", "intervened", "residual_stream", "steered"]

_PROBE_TOKENS = 12
_STREAM = "_refusal_direction_stream"  # attribute of the model that holds its ResidualStream
_lock = RLock()
_ZERO_REMAINDER = 1e-5
"""Norm up to which a unit vector counts as zero once its components along ablated directions are removed."""


@dataclass(frozen=True, eq=False)
class _Ablated:
    """An ablated direction."""

    u: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"]
    eps: float
    """Relative rounding error of its elements."""


class ResidualStream:
    """A model's residual stream: the layers that it runs through, and the writes of each.

    Raises UnsupportedModelError if layers or writes cannot be found, or if there is more than one stream.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.skeleton, self.training = Skeleton(model), model.training
        self.layers = self.skeleton.layers
        self.members = tuple(self.layers)  # since `layers` may change in place
        self.n_open = 0
        """Number of open `ablated` and `steered` contexts."""
        self._opener = 0  # the thread that opened them
        self._ablated: list[_Ablated] = []  # orthonormal, row by row
        ids = torch.arange(3, 3 + _PROBE_TOKENS, device=execution_device(model)).unsqueeze(0)
        with in_own_dtype(), resident(*self.skeleton.outer, recurse=False), self.skeleton.explained(ids):
            prelude = self.skeleton.prelude({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            self.skeleton.verify(prelude, ids)
        self.shares_state = any(call.shares_state for call in prelude.calls)
        """Whether layers pass state to each other besides the stream (Gemma 3n and 4: keys and values)."""
        with in_own_dtype(), ExitStack() as on_failure:
            on_failure.callback(self.skeleton.held.close)
            self.writes = self._find_writes(prelude)
            """For each layer, the submodules that write into the stream."""
            on_failure.pop_all()

    def _find_writes(self, prelude: Prelude) -> list[tuple[WriteSite, ...]]:
        """Examine one layer of each kind; its weights stay in memory until `skeleton.held` is closed."""
        found: dict[Any, tuple[WriteSite, ...]] = {}
        for layer, call in zip(self.layers, prelude.calls, strict=True):
            kind = kind_of(layer)
            if kind not in found:
                self.skeleton.held.enter_context(resident(layer))
                with in_float32(layer) as widened:
                    hidden = prelude.hidden.float() if widened else prelude.hidden
                    found[kind] = find_writes(layer, partial(call.in_float32() if widened else call, layer), hidden)
            if self.shares_state:  # later layers need the state that this one adds
                call(layer, prelude.hidden, private=False)
        return [found[kind_of(layer)] for layer in self.layers]

    @contextmanager
    def ablating(self, index: int, u: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"]) -> Iterator[None]:
        """Keep the writes of layer `index` orthogonal to u."""
        layer = self.layers[index]
        with ExitStack() as hooks:
            for site in self.writes[index]:
                module = layer.get_submodule(site.module)
                hooks.callback(module.register_forward_hook(_ablate_output(site, u)).remove)
            yield

    @contextmanager
    def _opened(self, ablated: _Ablated | None = None) -> Iterator[None]:
        """Count an open context, and list its direction if it ablates one.

        Raises ValueError if another thread has one open: hooks act on every forward, whatever thread runs it.
        """
        with _lock:
            if self.n_open and self._opener != get_ident():
                raise ValueError(
                    "Another thread runs this model within `ablated` or `steered`, and hooks act on the forwards of all threads. "
                    "Give each thread a model of its own, or let one wait for the other (threading.Lock)."
                )
            self.n_open, self._opener = self.n_open + 1, get_ident()
            self._ablated += [] if ablated is None else [ablated]
        try:
            yield
        finally:
            with _lock:
                self.n_open -= 1
                self._ablated = [v for v in self._ablated if v is not ablated]

    def _orthogonal_to_ablated(self, u: Tensor, eps: float) -> Tensor:
        """The component of u orthogonal to the directions ablated already, normalised; zero if it is only rounding."""
        if not self._ablated:
            return u
        for other in self._ablated:
            v = other.u.to(u)
            if u.ndim == v.ndim == 2 and len(u) != len(v):
                raise ValueError(f"{len(u)} directions within {len(v)}: give one direction, or one for each row.")
            u = u - (u * v).sum(-1, keepdim=True) * v
        rounding = max(_ZERO_REMAINDER, 4 * max(eps, *(other.eps for other in self._ablated)))
        return unit(torch.where(u.norm(dim=-1, keepdim=True) > rounding, u, 0.0))

    @contextmanager
    def ablated(self, u: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"], eps: float = 0.0) -> Iterator[None]:
        """Keep the stream free of any component along u, at every layer and position.

        Args:
            u: direction of unit length, one for all rows or one for each.
            eps: relative rounding error of its elements.

        Raises ValueError if this context and an open one have directions for different numbers of rows.
        """
        u = self._orthogonal_to_ablated(u, eps)  # otherwise ablating u would restore components along those
        project = _change_input(lambda x: ablate(x, u.to(x)))
        with self._opened(_Ablated(u, eps)), ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                hooks.callback(layer.register_forward_pre_hook(project, with_kwargs=True).remove)
                hooks.enter_context(self.ablating(index, u))
            yield

    @contextmanager
    def steered(self, r: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"], layer: int) -> Iterator[None]:
        """Add r to the input of a layer, at every position (paper, eq. 4).

        Raises ValueError when the model runs, if r has a direction for each of another number of rows.
        """

        def plus(x: Tensor) -> Tensor:
            if r.ndim == 2 and len(r) != len(x):
                raise ValueError(f"{len(r)} directions for {len(x)} rows: give one direction, or one for each row.")
            return x + (r if r.ndim == 1 else r.unsqueeze(1)).to(x)

        add = _change_input(plus)
        with self._opened(), ExitStack() as hooks:
            # before all ablation, so that the order in which contexts are opened does not matter
            handle = self.layers[layer].register_forward_pre_hook(add, with_kwargs=True, prepend=True)
            hooks.callback(handle.remove)
            yield


def _checked(vector: Tensor, d_model: int) -> Tensor:
    """The vector in `widest_dtype`.

    Raises TypeError if it is not a tensor, ValueError if it cannot be a direction of this model.
    """
    if not isinstance(vector, Tensor):
        raise TypeError(f"A direction must be a tensor, as Direction.vector is, not a {type(vector).__name__}.")
    if vector.ndim not in (1, 2) or vector.shape[-1] != d_model or not len(vector):
        raise ValueError(
            f"A direction of shape {tuple(vector.shape)} was given: this model needs ({d_model},) or (row, {d_model})."
        )
    if not vector.is_floating_point() or not vector.isfinite().all():
        raise ValueError("A direction must consist of finite floating-point numbers.")
    return vector.to(widest_dtype(vector.device))


def _ablate_output(site: WriteSite, u: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if site.element is None:
            return ablate(output, u.to(output))
        parts = list(output)
        parts[site.element] = ablate(parts[site.element], u.to(parts[site.element]))
        return tuple(parts)

    return hook


def residual_stream(model: PreTrainedModel) -> ResidualStream:
    """The model's residual stream, found at the first call, and again after layers or the training mode have changed.

    Raises UnsupportedModelError if it cannot be found, TypeError if this is not a model of transformers, ValueError if
    layers or the training mode have changed within `ablated` or `steered`.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"A model of transformers is needed, not a {type(model).__name__}. Give the model inside of it: chat.model of "
            "a ChatModel, wrapper.module of a DataParallel."
        )
    with _lock:
        stream = model.__dict__.get(_STREAM)
        if stream is None or stream.training != model.training or stream.members != tuple(find_layers(model)):
            if intervened(model):
                raise ValueError(
                    "Within `ablated` or `steered` layers were replaced, or train() or eval() was called. End these contexts first."
                )
            stream = model.__dict__[_STREAM] = ResidualStream(model)
            stream.skeleton.held.close()
    return stream


def intervened(model: PreTrainedModel) -> bool:
    """Whether an `ablated` or `steered` context is open on the model."""
    stream = unwrapped(model).__dict__.get(_STREAM)
    return stream is not None and stream.n_open > 0


class _Stance:
    """torch's stance towards compiled code, which all threads share: the first context sets it, the last restores it."""

    def __init__(self) -> None:
        self._lock, self._open, self._restore = Lock(), 0, ExitStack()

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run compiled models uncompiled."""
        with self._lock:
            if self._open == 0:
                self._restore.enter_context(torch.compiler.set_stance("force_eager"))
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    self._restore.close()


_stance = _Stance()


def eagerly() -> AbstractContextManager[None]:
    """Run compiled models uncompiled: torch.compile does not notice when hooks are added or removed."""
    return _stance.eager()


def _change_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


@contextmanager
def ablated(
    model: PreTrainedModel, direction: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"]
) -> Iterator[PreTrainedModel]:
    """Directional ablation (paper, eq. 5): no write into the residual stream has a component along `direction`.

    Projects the embedding output and every attention and MLP write, in every layer and at every position. Contexts may be
    nested, as `with` blocks are: then the stream has no component along any of their directions, even if `steered` adds
    one. Compiled models run uncompiled. Within the context do not copy the model, since the copy would keep its hooks, and
    run it in this thread alone; another thread cannot open a context on it meanwhile.

    Args:
        model: any transformers decoder with its head, also a vision-language model.
        direction: need not be normalised; (row, d_model) gives each row of the batch its own. Zero changes nothing.

    Raises UnsupportedModelError if the model's residual writes cannot be found, ValueError if `direction` has another width
    than the model or is not finite, or if another thread has a context open on the model, TypeError if it is not a tensor.

        with ablated(model, direction):
            model.generate(**inputs)
    """
    with eagerly():
        stream = residual_stream(model)
        u = unit(_checked(direction, stream.skeleton.d_model))
        with stream.ablated(u, torch.finfo(direction.dtype).eps):
            yield model


@contextmanager
def steered(
    model: PreTrainedModel,
    direction: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"],
    *,
    layer: int,
    coefficient: float = 1.0,
) -> Iterator[PreTrainedModel]:
    """Activation addition (paper, eq. 4): `coefficient * direction` is added to the input of `layer`, at every position.

    Args:
        model: any transformers decoder with its head, also a vision-language model.
        direction: used without normalising; (row, d_model) gives each row of the batch its own.
        layer: index of the decoder layer.
        coefficient: factor of the direction.

    Raises IndexError if the model has no such layer, TypeError if `layer` is not a whole number, ValueError if the coefficient is
    not finite, and the errors of `ablated`.
    """
    if isinstance(coefficient, str | NoneType) or not math.isfinite(coefficient):
        raise ValueError(f"The coefficient of a direction must be a finite number, not {coefficient!r}.")
    if not isinstance(layer, Integral) or isinstance(layer, bool):
        raise TypeError(f"layer must be the index of a layer, a whole number, not {layer!r}.")
    with eagerly():
        stream = residual_stream(model)
        if not 0 <= layer < len(stream.layers):
            raise IndexError(f"There is no layer {layer}. Give one from 0 to {len(stream.layers) - 1}.")
        with stream.steered(coefficient * _checked(direction, stream.skeleton.d_model), layer):
            yield model
