"""Directional ablation and activation addition on a running model. Hooks exist only inside these contexts.

Nothing here changes a weight: the interventions end with the `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refusal_direction.directions import ablate, unit
from refusal_direction.engine.residency import execution_device, resident
from refusal_direction.engine.skeleton import Prelude, Skeleton
from refusal_direction.models.writes import WriteSite, find_writes, in_float32, kind_of

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["ResidualStream", "ablated", "residual_stream", "steered"]

_PROBE_TOKENS = 12
_STREAM = "_refusal_direction_stream"  # the model carries what was found out about it


class ResidualStream:
    """Where a model's residual stream runs: its layers, and the writes of each."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.skeleton, self.training = Skeleton(model), model.training
        self.layers = self.skeleton.layers
        ids = torch.arange(3, 3 + _PROBE_TOKENS, device=execution_device(model)).unsqueeze(0)
        with resident(*self.skeleton.outer, recurse=False), self.skeleton.explained(ids):
            prelude = self.skeleton.prelude({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            self.skeleton.verify(prelude, ids)
        self.shares_state = any(call.shares_state for call in prelude.calls)
        """Whether layers hand state on to each other besides the stream (Gemma 3n and 4: keys and values)."""
        with ExitStack() as failed:
            failed.callback(self.skeleton.held.close)
            self.writes = self._find_writes(prelude)
            failed.pop_all()
        """For each layer, the submodules whose outputs are added to the stream."""

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
    def ablating(self, index: int, u: Tensor) -> Iterator[None]:
        """Within the context the writes of layer `index` are orthogonal to u: (d_model,), or (row, d_model)."""
        layer = self.layers[index]
        with ExitStack() as hooks:
            for site in self.writes[index]:
                module = layer.get_submodule(site.module)
                hooks.callback(module.register_forward_hook(_ablate_output(site, u)).remove)
            yield

    @contextmanager
    def ablated(self, u: Tensor) -> Iterator[None]:
        """Within the context the stream has no component along u (of unit length), anywhere."""
        project = _change_input(lambda x: ablate(x, u.to(x)))
        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                hooks.callback(layer.register_forward_pre_hook(project, with_kwargs=True).remove)
                hooks.enter_context(self.ablating(index, u))
            yield

    @contextmanager
    def steered(self, r: Tensor, layer: int) -> Iterator[None]:
        """Within the context r is added to the input of a layer, at every position."""

        def plus(x: Tensor) -> Tensor:
            if r.ndim == 2 and len(r) != len(x):
                raise ValueError(f"{len(r)} directions for {len(x)} rows: give one direction, or one for each row.")
            return x + (r if r.ndim == 1 else r.unsqueeze(1)).to(x)

        add = _change_input(plus)
        handle = self.layers[layer].register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _checked(vector: Tensor, d_model: int) -> Tensor:
    """Raise ValueError where a vector is no direction of this model."""
    if vector.ndim not in (1, 2) or vector.shape[-1] != d_model:
        raise ValueError(
            f"A direction of shape {tuple(vector.shape)} was given: this model needs ({d_model},) or (row, {d_model})."
        )
    if not vector.is_floating_point() or not vector.isfinite().all():
        raise ValueError("A direction must be of finite floating-point numbers.")
    return vector


def _ablate_output(site: WriteSite, u: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if site.element is None:
            return ablate(output, u.to(output))
        parts = list(output)
        parts[site.element] = ablate(parts[site.element], u.to(parts[site.element]))
        return tuple(parts)

    return hook


def residual_stream(model: PreTrainedModel) -> ResidualStream:
    """The model's residual stream, found at the first call, and anew once dropout may have come into play.

    Raises UnsupportedModelError where it cannot be found.
    """
    stream = model.__dict__.get(_STREAM)
    if stream is None or stream.training != model.training:
        stream = model.__dict__[_STREAM] = ResidualStream(model)
        stream.skeleton.held.close()
    return stream


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

    Projects the embedding output and every attention and MLP write, in every layer and at every position.

    Args:
        model: any transformers decoder, also a vision-language model.
        direction: need not be normalised; (row, d_model) gives each row of the batch its own.

    Raises UnsupportedModelError where the model's residual writes cannot be found, ValueError where `direction` is none.

        with ablated(model, direction):
            model.generate(**inputs)
    """
    stream = residual_stream(model)
    with stream.ablated(unit(_checked(direction, stream.skeleton.d_model))):
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

    Raises UnsupportedModelError where the model's decoder layers cannot be found, IndexError for a layer it has not, ValueError where `direction` is none of this model's.
    """
    stream = residual_stream(model)
    with stream.steered(coefficient * _checked(direction, stream.skeleton.d_model), layer):
        yield model
