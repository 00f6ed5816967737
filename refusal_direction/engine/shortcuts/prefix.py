"""The tokens with which every prompt begins, run once for each intervention instead of once for each row.

A chat template opens all prompts alike: the beginning of the text, whose turn it is, often a system prompt. In a causal
decoder those tokens do not see what follows, so under one intervention they are the same for every prompt. They go through
the layers as rows of their own (the lead), and the rest of each prompt attends to the keys and values that they leave, by
way of the model's own cache. Whether the layers still give the same output is found out by trying.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from refusal_direction.engine.residency import resident
from refusal_direction.models.writes import kind_of

if TYPE_CHECKING:
    from jaxtyping import Int

    from refusal_direction.engine.skeleton import Prelude, Skeleton

__all__ = ["Prefix", "common_length", "find_prefix"]

log = logging.getLogger(__name__)

_TEXT = {"input_ids", "attention_mask"}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def common_length(prompts: Sequence[Mapping[str, Tensor]], spared: int) -> int:
    """How many leading tokens all prompts share, if the last `spared` of each are left to it."""
    ids = [inputs["input_ids"][0] for inputs in prompts]
    length = max(0, min(len(one) for one in ids) - spared)
    for one in ids[1:]:
        differing = (one[:length] != ids[0][:length]).nonzero()
        length = int(differing[0]) if len(differing) else length
    return length


class _Lead(DynamicCache):  # type: ignore[misc]  # untyped
    """Records what the lead's attention computes, by the first row of each microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = 0
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen[self.begin] = (key_states, value_states)
        return key_states, value_states


class _Rest(DynamicCache):  # type: ignore[misc]
    """As long as the lead; gives each row the keys and values of its lead."""

    def __init__(self, length: int, n_layers: int) -> None:
        super().__init__()
        for layer in range(n_layers):
            nothing = torch.zeros(1, 1, length, 1)
            super().update(nothing, nothing, layer)
        self.leads: Int[Tensor, "row"] = torch.empty(0, dtype=torch.long)
        self.kept: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        leads = self.leads.to(key_states.device)
        keys, values = (
            torch.cat([kept.index_select(0, leads), new], dim=-2)
            for kept, new in zip(self.kept, (key_states, value_states), strict=True)
        )
        return keys, values


class Prefix:
    """The common tokens (1, token) of all prompts of a model."""

    def __init__(self, ids: Int[Tensor, "1 token"], skeleton: Skeleton) -> None:
        self.ids = ids
        self._lead, self._rest = _Lead(), _Rest(ids.shape[1], len(skeleton.layers))
        takes_cache = "cache" in inspect.signature(skeleton.model.forward).parameters
        self._argument = "cache" if takes_cache else "past_key_values"  # an older name

    def lead(self) -> dict[str, Any]:
        """The model's inputs for the lead."""
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), self._argument: self._lead}

    def rest(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The model's inputs for what follows the lead in prompts of one length."""
        after = inputs["input_ids"][:, self.ids.shape[1] :]
        return {**inputs, "input_ids": after, self._argument: self._rest}

    def serve(self, leads: Int[Tensor, "row"] | None, rows: slice) -> None:
        """Say which rows go through the layer next: of the lead (`leads` is None), or with these rows of it as leads."""
        if leads is None:
            self._lead.begin = rows.start
        else:
            self._rest.leads = leads[rows]

    def hand_over(self) -> None:
        """The lead is through a layer: its keys and values serve the other rows there."""
        parts = [self._lead.seen[begin] for begin in sorted(self._lead.seen)]
        self._rest.kept = tuple(torch.cat(side) for side in zip(*parts, strict=True))
        self._lead.seen.clear()


def find_prefix(skeleton: Skeleton, prompts: Sequence[Mapping[str, Tensor]], spared: int) -> Prefix | None:
    """The prefix of all prompts, where there is one and the model's layers give the same output with it run apart.

    Args:
        skeleton: of the model.
        prompts: the model's inputs for each.
        spared: the last tokens of a prompt that are not to be shared.
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
    """Whether each kind of layer gives the rest of a prompt the same output with the prefix run apart."""
    length = prefix.ids.shape[1]
    one = torch.zeros(1, dtype=torch.long)
    try:
        whole, lead, rest = map(skeleton.prelude, (inputs, prefix.lead(), prefix.rest(inputs)))
        alike = _close(whole.hidden[:, length:], rest.hidden) and _close(whole.hidden[:, :length], lead.hidden)
        for index in {kind_of(layer): index for index, layer in reversed(list(enumerate(skeleton.layers)))}.values():
            with resident(skeleton.layers[index]):
                expected = _output(skeleton, index, whole)
                prefix.serve(None, slice(0, 1))
                opening = _output(skeleton, index, lead)
                prefix.hand_over()
                prefix.serve(one, slice(0, 1))
                found = torch.cat([opening, _output(skeleton, index, rest)], dim=1)
                alike = alike and _close(expected, found)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        log.debug("The common prefix is not run apart: %r", error)  # a cache of another form
        return False
    return alike


def _output(skeleton: Skeleton, index: int, prelude: Prelude) -> Tensor:
    return prelude.calls[index](skeleton.layers[index], prelude.hidden.clone())  # some layers add in place


def _close(expected: Tensor, found: Tensor) -> bool:
    """Up to rounding, by the largest element."""
    tolerance = max(1e-5, 8 * torch.finfo(expected.dtype).eps)
    return expected.shape == found.shape and bool((expected - found).abs().max() <= tolerance * expected.abs().max())
