"""A model without its decoder layers: the computation before, between and after them.

No family is named here. The prelude runs the model's own forward with every layer replaced by a recorder, so that masks,
rotary embeddings and all other arguments of the layers are computed by the family's own code. The tail runs it again on one
token a row, with the last layer replaced by one that returns the final hidden states, so that the model's own final norm,
head, scaling and soft-capping compute the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from refusal_direction.engine.arguments import map_tensors
from refusal_direction.engine.residency import outside, resident
from refusal_direction.errors import UnsupportedModelError
from refusal_direction.models.layers import find_layers, other_blocks
from refusal_direction.models.placement import execution_device

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["LayerCall", "Prelude", "Skeleton", "hidden_states_of", "replaced_forwards", "shape_of"]


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    change: Float[Tensor, "row token d_model"] | None = None
    """Added to the stream by the model between the previous layer and this one, as Qwen3-VL does with visual features; None
    if the layers follow each other directly."""

    @property
    def shares_state(self) -> bool:
        """Whether a mapping, empty at first, is passed from layer to layer."""
        return any(isinstance(value, MutableMapping) and not value for value in self.kwargs.values())

    @torch.no_grad()
    def __call__(self, layer: Callable[..., Any], hidden: Tensor, *, private: bool = True) -> Tensor:
        """Run a layer on hidden states (row, token, d_model); if `private`, undo its writes to shared mappings."""
        return hidden_states_of(self.output(layer, hidden, private=private))

    def in_float32(self) -> LayerCall:
        """The same call with its floating-point tensors in float32."""
        widened = map_tensors(
            lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, (self.args, self.kwargs)
        )
        return LayerCall(*widened)

    def output(self, layer: Callable[..., Any], hidden: Tensor, *, private: bool = True) -> Any:
        """Run a layer as `__call__` does, and return its whole output, a tensor or a tuple."""
        kwargs = self.kwargs
        if private:
            kwargs = {k: copy.copy(v) if isinstance(v, MutableMapping) else v for k, v in kwargs.items()}
        return layer(hidden, *self.args, **kwargs)


@dataclass(frozen=True)
class Prelude:
    """The embedded prompts, and the arguments of each layer."""

    hidden: Float[Tensor, "prompt token d_model"]
    calls: tuple[LayerCall, ...]

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors, each counted once: layers share many of them."""
        held = {id(self.hidden): self.hidden.nbytes}
        map_tensors(
            lambda tensor: held.update({id(tensor): tensor.nbytes}),
            [(call.args, call.kwargs, call.change) for call in self.calls],
        )
        return sum(held.values())


_CODE_ERRORS = (AttributeError, IndexError, KeyError, NameError, NotImplementedError, TypeError, ValueError)
"""Errors of code that is wrong, or that lacks an input."""

_LOGITS_ALONE = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
"""Settings under which a model's only output is its logits."""


class _Recorded(Exception):
    """Ends a prelude at the last layer, since the final norm and the head are not needed."""


def hidden_states_of(output: Any) -> Float[Tensor, "row token d_model"]:
    """The hidden states in a layer's output, which is a tensor or a tuple that starts with them."""
    return output[0] if isinstance(output, tuple) else output


def shape_of(inputs: Mapping[str, Tensor]) -> tuple[torch.Size, ...]:
    """Shapes of a prompt's inputs; prompts must agree in them to share a batch."""
    return tuple(tensor.shape for tensor in inputs.values())


@contextmanager
def replaced_forwards(layers: nn.ModuleList, make: Callable[[int, Callable[..., Any]], Any]) -> Iterator[None]:
    """Replace each layer's forward by `make(index, forward)`; restore it at exit, also if accelerate had replaced it."""
    before = [layer.__dict__.get("forward") for layer in layers]
    own = [layer.forward for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = make(index, own[index])
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward


@contextmanager
def _logits_alone(configs: Sequence[PretrainedConfig]) -> Iterator[None]:
    """Have a model return its logits and nothing else, whatever its configuration asks for.

    Router logits would be expected of layers that are replaced, and hidden states would be kept for every microbatch.
    """
    others = [
        (config, name, wanted)
        for config in configs
        for name, wanted in _LOGITS_ALONE.items()
        if getattr(config, name, wanted) != wanted
    ]
    before = [dict(vars(config)) for config, _, _ in others]
    try:
        for config, name, wanted in others:
            setattr(config, name, wanted)
        yield
    finally:
        for (config, _, _), attributes in zip(others, before, strict=True):
            for added in vars(config).keys() - attributes.keys():
                delattr(config, added)
            vars(config).update(attributes)  # not by setattr, which validates them against each other


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The configurations of a model and its submodels."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if isinstance(config, PretrainedConfig)}.values())


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate a layer's hidden states from its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


class Skeleton:
    """Prelude and tail of one model. Weights are only read. No hook may be active while its methods run.

    Raises UnsupportedModelError for encoder-decoder models, and if no decoder layers are found.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{type(model).__name__} has an encoder, but the method is defined for decoders only. Use a decoder."
            )
        self.model, self._configs = model, _configs(model)
        self.layers = find_layers(model)
        self.held = ExitStack()
        """Keeps in memory the layers that were run for a trial, until `held.close()`."""
        self.d_model = 0
        """Width of the residual stream; 0 before the first prelude."""
        self._tuple_length: dict[type[nn.Module], int] = {}  # 0: the class returns a bare tensor

    @property
    def outer(self) -> Iterator[nn.Module]:
        """The modules outside of the layers."""
        return outside(self.model, self.layers)

    def forward(self, **inputs: Any) -> Any:
        """Run the model's own forward, without a cache and with the logits as its only output."""
        with _logits_alone(self._configs):
            return self.model(**inputs, use_cache=False)

    @contextmanager
    def explained(self, ids: Int[Tensor, "row token"]) -> Iterator[None]:
        """Raise UnsupportedModelError if the context fails and the model's own forward fails, too."""
        try:
            yield
        except _CODE_ERRORS:
            try:
                with torch.no_grad():
                    self.forward(input_ids=ids, attention_mask=torch.ones_like(ids))
            except _CODE_ERRORS as error:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} does not run in transformers {transformers.__version__} on text alone: its own "
                    f"forward raises {type(error).__name__}: {error}. Try another version of transformers."
                ) from error
            raise

    def _as_output(self, index: int, hidden: Tensor) -> Any:
        """Hidden states in the form in which the layer returns them."""
        length = self._tuple_length[type(self.layers[index])]
        return (hidden, *(None,) * (length - 1)) if length else hidden

    def _learn_output(self, index: int, forward: Callable[..., Any], hidden: Tensor, call: LayerCall) -> None:
        """Call a layer once to find out whether its class returns a tensor or a tuple: annotations are often wrong."""
        layer = self.layers[index]
        if type(layer) not in self._tuple_length:
            self.held.enter_context(resident(layer))
            output = call.output(forward, hidden.clone())
            self._tuple_length[type(layer)] = len(output) if isinstance(output, tuple) else 0

    def _check_turn(self, index: int, turn: int) -> None:
        """Raise UnsupportedModelError unless layer `index` is the next one (the number of layers stands for the end)."""
        if index == turn:
            return
        fault = f"does not run layer {turn} on text alone" if index > turn else f"runs layer {index} again"
        raise UnsupportedModelError(
            f"The forward of {type(self.model).__name__} {fault}. Candidate directions belong to layers that run once each, in "
            "order, so no direction is computed for this model."
        )

    @torch.no_grad()
    def verify(self, prelude: Prelude, ids: Int[Tensor, "row token"]) -> None:
        """Raise UnsupportedModelError unless there is one residual stream, and it runs through the layers alone.

        Args:
            prelude: the prelude of `ids`.
            ids: token ids of the prompts.
        """
        name, shape = type(self.model).__name__, tuple(prelude.hidden.shape)
        if shape[:-1] != ids.shape:
            raise UnsupportedModelError(
                f"{name} carries several residual streams side by side: {ids.shape[1]} tokens reach its layers in the shape "
                f"{shape}, not (1, {ids.shape[1]}, d_model). The method is defined for one stream, so no direction is computed "
                "for this model."
            )
        begun = False

        def begin(layer: nn.Module, args: Any) -> None:
            nonlocal begun
            begun = True

        def refuse(block: nn.Module, args: Any) -> None:
            if begun:
                raise UnsupportedModelError(
                    f"In {name} the residual stream also runs through {type(block).__name__}, which is not one of "
                    f"its {len(self.layers)} decoder layers, so no direction is computed for this model."
                )

        with ExitStack() as hooks:
            hooks.callback(self.layers[0].register_forward_pre_hook(begin).remove)
            for block in other_blocks(self.model, self.layers):
                hooks.callback(block.register_forward_pre_hook(refuse).remove)
            self.tail(prelude.hidden[:, -1], int(ids[0, -1]))

    @torch.no_grad()
    def prelude(self, inputs: Mapping[str, Tensor]) -> Prelude:
        """Run the model's own forward on `inputs` (prompts of equal length, not padded) up to its last layer.

        Raises UnsupportedModelError if the sequence changes its length between layers, or if the forward does not run each
        layer once, in order.
        """
        hidden: list[Tensor] = []
        calls: list[LayerCall] = []

        def recorder(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                h, args, kwargs = _split(args, kwargs)
                self._check_turn(index, len(calls))
                if hidden and h.shape != hidden[-1].shape:
                    raise UnsupportedModelError(f"The sequence changes its length before layer {index}.")
                changed = bool(hidden) and h is not hidden[-1] and not torch.equal(h, hidden[-1])
                calls.append(LayerCall(args, kwargs, h - hidden[-1] if changed else None))
                hidden.append(h)
                self._learn_output(index, own, h, calls[-1])
                if index == len(self.layers) - 1:
                    raise _Recorded
                return self._as_output(index, h)

            return record

        with replaced_forwards(self.layers, recorder), suppress(_Recorded):
            self.forward(**inputs)  # no logits_to_keep: Gemma 4 would slice the sequence mid-stack
        self._check_turn(len(self.layers), len(calls))
        self.d_model = hidden[0].shape[-1]
        return Prelude(hidden[0], tuple(calls))

    def embeds_independently(self, prompts: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether prompts that are embedded in one batch reach the layers as they do alone, judged by two of one shape.

        In some vision towers the images of a batch attend to each other (MiniMax M3 in transformers 5.17).
        """
        by_shape: dict[Any, Mapping[str, Tensor]] = {}
        for inputs in prompts:
            other = by_shape.setdefault(shape_of(inputs), inputs)
            images = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
            if any(not torch.equal(inputs[name], other[name]) for name in images or inputs):
                together = self.prelude({name: torch.cat([inputs[name], other[name]]) for name in inputs}).hidden[0]
                alone = self.prelude(inputs).hidden[0]
                tolerance = max(1e-4, 8 * torch.finfo(alone.dtype).eps)
                return bool((together - alone).abs().max() <= tolerance * alone.abs().max())
        return True

    @torch.no_grad()
    def tail(self, hidden: Float[Tensor, "row d_model"], token: int) -> Float[Tensor, "row vocab"]:
        """Logits of final hidden states.

        Args:
            hidden: the residual stream after the last layer.
            token: any ordinary text token; it is embedded and then discarded.

        Raises UnsupportedModelError if the model has no head.
        """
        rows, last, turn = hidden.shape[0], len(self.layers) - 1, 0

        def stand_in(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal turn
                self._check_turn(index, turn)
                turn += 1
                return self._as_output(index, hidden.unsqueeze(1) if index == last else _split(args, kwargs)[0])

            return forward

        ids: Int[Tensor, "row 1"] = torch.full((rows, 1), token, device=execution_device(self.model))
        with replaced_forwards(self.layers, stand_in):
            output = self.forward(input_ids=ids, attention_mask=torch.ones_like(ids))
        if getattr(output, "logits", None) is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returns no logits. Load the model with its head: AutoModelForCausalLM."
            )
        return output.logits[:, -1]
