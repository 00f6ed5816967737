"""Directional ablation and activation addition on a running model. Hooks exist only inside these contexts.

Nothing here changes a weight: the interventions end with the `with` block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock, RLock
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
_STREAM = "_refusal_direction_stream"  # the model carries what was found out about it
_finding = RLock()
_NOTHING_LEFT = 1e-5  # of a unit vector, once what is ablated already is taken off


@dataclass(frozen=True, eq=False)
class _Ablated:
    """A direction that is ablated, and how far its elements may be rounded."""

    u: Tensor
    eps: float


class ResidualStream:
    """Where a model's residual stream runs: its layers, and the writes of each."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.skeleton, self.training = Skeleton(model), model.training
        self.layers = self.skeleton.layers
        self.members = tuple(self.layers)
        self.in_force = 0
        """How many of the contexts `ablated` and `steered` are open."""
        self._ablated: list[_Ablated] = []  # orthonormal, row by row
        ids = torch.arange(3, 3 + _PROBE_TOKENS, device=execution_device(model)).unsqueeze(0)
        with in_own_dtype(), resident(*self.skeleton.outer, recurse=False), self.skeleton.explained(ids):
            prelude = self.skeleton.prelude({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            self.skeleton.verify(prelude, ids)
        self.shares_state = any(call.shares_state for call in prelude.calls)
        """Whether layers hand state on to each other besides the stream (Gemma 3n and 4: keys and values)."""
        with in_own_dtype(), ExitStack() as on_failure:
            on_failure.callback(self.skeleton.held.close)
            self.writes = self._find_writes(prelude)
            """For each layer, the submodules whose outputs are added to the stream."""
            on_failure.pop_all()

    def _find_writes(self, prelude: Prelude) -> list[tuple[WriteSite, ...]]:
        """Look at one layer of each kind; its weights stay in memory until `skeleton.held` is closed."""
        found: dict[Any, tuple[WriteSite, ...]] = {}
        for layer, call in zip(self.layers, prelude.calls, strict=True):
            kind = kind_of(layer)
            if kind not in found:
                self.skeleton.held.enter_context(resident(layer))
                with in_float32(layer) as widened:
                    hidden = prelude.hidden.float() if widened else prelude.hidden
                    found[kind] = find_writes(layer, partial(call.in_float32() if widened else call, layer), hidden)
            if self.shares_state:  # the layers above need what this one leaves behind
                call(layer, prelude.hidden, private=False)
        return [found[kind_of(layer)] for layer in self.layers]

    @contextmanager
    def ablating(self, index: int, u: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"]) -> Iterator[None]:
        """Within the context the writes of layer `index` are orthogonal to u: (d_model,), or (row, d_model)."""
        layer = self.layers[index]
        with ExitStack() as hooks:
            for site in self.writes[index]:
                module = layer.get_submodule(site.module)
                hooks.callback(module.register_forward_hook(_ablate_output(site, u)).remove)
            yield

    @contextmanager
    def _opened(self, among_ablated: _Ablated | None = None) -> Iterator[None]:
        self.in_force += 1
        self._ablated += [] if among_ablated is None else [among_ablated]
        try:
            yield
        finally:
            self.in_force -= 1
            self._ablated = [v for v in self._ablated if v is not among_ablated]

    def _beyond_ablated(self, u: Tensor, eps: float) -> Tensor:
        """What u has beyond the directions that are ablated already, of unit length; zero where that is rounding."""
        if not self._ablated:
            return u
        for other in self._ablated:
            v = other.u.to(u)
            if u.ndim == v.ndim == 2 and len(u) != len(v):
                raise ValueError(f"{len(u)} directions within {len(v)}: give one direction, or one for each row.")
            u = u - (u * v).sum(-1, keepdim=True) * v
        rounding = max(_NOTHING_LEFT, 4 * max(eps, *(other.eps for other in self._ablated)))
        return unit(torch.where(u.norm(dim=-1, keepdim=True) > rounding, u, 0.0))

    @contextmanager
    def ablated(self, u: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"], eps: float = 0.0) -> Iterator[None]:
        """Within the context the stream has no component along u (of unit length, known up to `eps`), anywhere."""
        u = self._beyond_ablated(u, eps)  # else what is taken off along u would put back something along those
        project = _change_input(lambda x: ablate(x, u.to(x)))
        with self._opened(among_ablated=_Ablated(u, eps)), ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                hooks.callback(layer.register_forward_pre_hook(project, with_kwargs=True).remove)
                hooks.enter_context(self.ablating(index, u))
            yield

    @contextmanager
    def steered(self, r: Float[Tensor, "d_model"] | Float[Tensor, "row d_model"], layer: int) -> Iterator[None]:
        """Within the context r is added to the input of a layer, at every position (paper, eq. 4)."""

        def plus(x: Tensor) -> Tensor:
            if r.ndim == 2 and len(r) != len(x):
                raise ValueError(f"{len(r)} directions for {len(x)} rows: give one direction, or one for each row.")
            return x + (r if r.ndim == 1 else r.unsqueeze(1)).to(x)

        add = _change_input(plus)
        with self._opened(), ExitStack() as hooks:
            # before all ablation, so that it does not matter which context is opened first
            handle = self.layers[layer].register_forward_pre_hook(add, with_kwargs=True, prepend=True)
            hooks.callback(handle.remove)
            yield


def _checked(vector: Tensor, d_model: int) -> Tensor:
    """The vector in `precise`.

    Raises TypeError where it is no tensor, ValueError where it is no direction of this model.
    """
    if not isinstance(vector, Tensor):
        raise TypeError(f"A direction must be a tensor, as Direction.vector is, not a {type(vector).__name__}.")
    if vector.ndim not in (1, 2) or vector.shape[-1] != d_model or not len(vector):
        raise ValueError(
            f"A direction of shape {tuple(vector.shape)} was given: this model needs ({d_model},) or (row, {d_model})."
        )
    if not vector.is_floating_point() or not vector.isfinite().all():
        raise ValueError("A direction must be of finite floating-point numbers.")
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
    """The model's residual stream, found at the first call, and anew once layers or dropout are others.

    Raises UnsupportedModelError where it cannot be found, TypeError where it is no model of transformers.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"A model of transformers is needed, not a {type(model).__name__}. Give what is inside of it: chat.model of a "
            "ChatModel, wrapper.module of a DataParallel."
        )
    with _finding:
        stream = model.__dict__.get(_STREAM)
        if stream is None or stream.training != model.training or stream.members != tuple(find_layers(model)):
            if intervened(model):
                raise ValueError("Within `ablated` or `steered` layers were replaced, or train() or eval() was called.")
            stream = model.__dict__[_STREAM] = ResidualStream(model)
            stream.skeleton.held.close()
    return stream


def intervened(model: PreTrainedModel) -> bool:
    """Whether a context of `ablated` or `steered` is open on the model."""
    stream = unwrapped(model).__dict__.get(_STREAM)
    return stream is not None and stream.in_force > 0


class _Stance:
    """torch has one stance towards compiled code for all threads: the first context sets it, the last sets it back."""

    def __init__(self) -> None:
        self._lock, self._open, self._restore = Lock(), 0, ExitStack()

    @contextmanager
    def eager(self) -> Iterator[None]:
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
    """Within the context compiled code is passed over: torch.compile neither sees hooks come nor sees them go."""
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
    nested, if they end as `with` blocks do: then there is no component along any of their directions, and what `steered`
    adds along them is taken off, too. Within them compiled code is not used.

    Args:
        model: any transformers decoder with its head, also a vision-language model.
        direction: need not be normalised; (row, d_model) gives each row of the batch its own. Zero changes nothing.

    Raises UnsupportedModelError where the model's residual writes cannot be found, ValueError where `direction` is not of the
    model's width or not finite, TypeError where it is no tensor.

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

    `direction` is used as it is, not normalised; (row, d_model) gives each row of the batch its own.

    Raises UnsupportedModelError where the decoder layers cannot be found, IndexError where the model has no such layer,
    ValueError where the coefficient is not finite, and otherwise as `ablated`.
    """
    if not math.isfinite(coefficient):
        raise ValueError(f"The coefficient of a direction must be a finite number, not {coefficient}.")
    with eagerly():
        stream = residual_stream(model)
        if not 0 <= layer < len(stream.layers):
            raise IndexError(f"There is no layer {layer}: the model has layers 0 to {len(stream.layers) - 1}.")
        with stream.steered(coefficient * _checked(direction, stream.skeleton.d_model), layer):
            yield model
