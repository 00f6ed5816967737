"""Shortcut for the prefix that all prompts share: it is run once for each intervention instead of once for each row.

A chat template opens all prompts with the same tokens: beginning of text, user's turn, often a system prompt. In a causal
decoder these tokens do not depend on later ones, so under one intervention their activations are the same for every prompt.
They go through the layers as prefix rows, one for each intervention, and the remainder of each prompt attends to their
keys and values through the model's own cache. A trial shows whether the layers still give the same output.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from refusal_direction.engine.kept import KeptRows
from refusal_direction.engine.residency import resident
from refusal_direction.engine.rows import Row
from refusal_direction.models.writes import kind_of

if TYPE_CHECKING:
    from jaxtyping import Int

    from refusal_direction.engine.skeleton import Prelude, Skeleton

__all__ = ["Prefix", "common_length", "find_prefix"]

log = logging.getLogger(__name__)

_TEXT = {"input_ids", "attention_mask"}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def common_length(prompts: Sequence[Mapping[str, Tensor]], spared: int) -> int:
    """Number of leading tokens that all prompts share, excluding each prompt's last `spared` tokens."""
    ids = [inputs["input_ids"][0] for inputs in prompts]
    length = max(0, min(len(one) for one in ids) - spared)
    for one in ids[1:]:
        differing = (one[:length] != ids[0][:length]).nonzero()
        length = int(differing[0]) if len(differing) else length
    return length


class _PrefixCache(DynamicCache):  # type: ignore[misc]  # untyped
    """Records the keys and values of the prefix rows, by the first row of each microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = 0
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.recorded[self.begin] = (key_states, value_states)
        return key_states, value_states


class _RemainderCache(DynamicCache):  # type: ignore[misc]
    """Reports the length of the prefix, and gives each row the keys and values of its prefix row."""

    def __init__(self, length: int, n_layers: int) -> None:
        super().__init__()
        for layer in range(n_layers):
            nothing = torch.zeros(1, 1, length, 1)
            super().update(nothing, nothing, layer)
        self.prefix_rows: Int[Tensor, "row"] = torch.empty(0, dtype=torch.long)
        self.prefix: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        prefix_rows = self.prefix_rows.to(key_states.device)
        keys, values = (
            torch.cat([prefix.index_select(0, prefix_rows), new], dim=-2)
            for prefix, new in zip(self.prefix, (key_states, value_states), strict=True)
        )
        return keys, values


class Prefix:
    """The tokens (1, token) with which all prompts of a model begin, and the caches that connect them to the prompts."""

    def __init__(self, ids: Int[Tensor, "1 token"], skeleton: Skeleton) -> None:
        self.ids = ids
        self._own, self._remainder = _PrefixCache(), _RemainderCache(ids.shape[1], len(skeleton.layers))
        self._n_layers = len(skeleton.layers)
        self.kept: KeptRows[Row] = KeptRows()
        """Keys and values of prefix rows of earlier passes."""
        takes_cache = "cache" in inspect.signature(skeleton.model.forward).parameters
        self._argument = "cache" if takes_cache else "past_key_values"  # an older name

    def inputs(self) -> dict[str, Any]:
        """The model's inputs for the prefix."""
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), self._argument: self._own}

    def remainder(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The model's inputs for the tokens after the prefix, in prompts of one length."""
        after = inputs["input_ids"][:, self.ids.shape[1] :]
        return {**inputs, "input_ids": after, self._argument: self._remainder}

    def select(self, prefix_rows: Int[Tensor, "row"] | None, rows: slice) -> None:
        """Select the rows that go through the layer next.

        Args:
            prefix_rows: the prefix row of every row of the length group; None if the rows are prefix rows themselves.
            rows: the microbatch, as a slice of its length group.
        """
        if prefix_rows is None:
            self._own.begin = rows.start
        else:
            self._remainder.prefix_rows = prefix_rows[rows]

    def publish(self, layer: int, n_rows: int) -> None:
        """Give the other rows the keys and values of the prefix rows, once those are through a layer.

        Args:
            layer: index of the layer.
            n_rows: number of prefix rows of this pass; the last ones may not have entered yet.
        """
        microbatches = [self._own.recorded[begin] for begin in sorted(self._own.recorded)]
        own = (torch.cat(side) for side in zip(*microbatches, strict=True))
        padded = (torch.cat([side, side.new_zeros(n_rows - len(side), *side.shape[1:])]) for side in own)
        self._remainder.prefix = self.kept.joined(layer, tuple(padded))
        self._own.recorded.clear()

    @property
    def row_bytes(self) -> int:
        """Memory of the keys and values of one row in all layers, after a trial of one row."""
        return self._n_layers * sum(side[0].nbytes for side in self._remainder.prefix)


def find_prefix(skeleton: Skeleton, prompts: Sequence[Mapping[str, Tensor]], spared: int) -> Prefix | None:
    """The prefix of all prompts; None if there is none, or if the layers' output changes when it is run separately.

    Args:
        skeleton: the model's skeleton.
        prompts: the model's inputs for each prompt.
        spared: number of last tokens of each prompt that are never part of the prefix.
    """
    length = common_length(prompts, spared)
    config = skeleton.model.config.get_text_config()
    attends = _ATTENTION.issuperset(getattr(config, "layer_types", None) or ())
    stateful = getattr(skeleton.model, "_is_stateful", False)
    if not length or not attends or stateful or any(inputs.keys() - _TEXT for inputs in prompts):
        return None
    longest = max(prompts, key=lambda inputs: inputs["input_ids"].shape[1])
    prefix = Prefix(longest["input_ids"][:, :length], skeleton)
    return prefix if _unchanged_by(skeleton, prefix, longest) else None


@torch.no_grad()
def _unchanged_by(skeleton: Skeleton, prefix: Prefix, inputs: Mapping[str, Tensor]) -> bool:
    """Whether each kind of layer gives a prompt the same output when its prefix is run separately."""
    length = prefix.ids.shape[1]
    one = torch.zeros(1, dtype=torch.long)
    try:
        whole, opening, rest = map(skeleton.prelude, (inputs, prefix.inputs(), prefix.remainder(inputs)))
        same = _close(whole.hidden[:, length:], rest.hidden) and _close(whole.hidden[:, :length], opening.hidden)
        for index in {kind_of(layer): index for index, layer in reversed(list(enumerate(skeleton.layers)))}.values():
            with resident(skeleton.layers[index]):
                expected = _output(skeleton, index, whole)
                prefix.select(None, slice(0, 1))
                first = _output(skeleton, index, opening)
                prefix.publish(index, 1)
                prefix.select(one, slice(0, 1))
                found = torch.cat([first, _output(skeleton, index, rest)], dim=1)
                same = same and _close(expected, found)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        log.debug("The shared prefix is not run separately: %r", error)  # another kind of cache
        return False
    return same


def _output(skeleton: Skeleton, index: int, prelude: Prelude) -> Tensor:
    return prelude.calls[index](skeleton.layers[index], prelude.hidden.clone())  # some layers add in place


def _close(expected: Tensor, found: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, relative to the largest element."""
    tolerance = max(1e-5, 8 * torch.finfo(expected.dtype).eps)
    return expected.shape == found.shape and bool((expected - found).abs().max() <= tolerance * expected.abs().max())
