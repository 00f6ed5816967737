"""The layer-major engine: one pass over the weights, whatever the number of rows.

For each layer, for each microbatch of rows, run the layer. A model that is larger than memory is then read once a pass.
Rows of one length share a microbatch, so nothing is padded; steered rows branch off a baseline row at their own layer; only
the last position reaches the final norm and the head. See docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refusal_direction.candidates import Candidates
from refusal_direction.directions import ablate, residual_component
from refusal_direction.engine.arguments import batch_axes, concatenate, take_rows
from refusal_direction.engine.budget import Budget, halving, must_fit
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.residency import resident
from refusal_direction.engine.rows import Intervention, LengthGroup, Row, Tables, lay_out
from refusal_direction.engine.shortcuts.prefix import find_prefix
from refusal_direction.engine.shortcuts.token_wise import last_token, token_wise_child
from refusal_direction.engine.skeleton import LayerCall, Prelude, hidden_states_of, replaced_forwards, shape_of
from refusal_direction.errors import UnsupportedModelError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Consume", "LayerMajor", "Observe", "Tick", "silent"]

Consume = Callable[[list[Row], "Float[Tensor, 'row vocab']"], None]
"""Called with rows that have come through, and their logits at the last position."""
Observe = Callable[[int, list[Row], "Float[Tensor, 'row token d_model']"], None]
"""Called with a layer's index and rows, and the residual stream at the input of that layer."""
Tick = Callable[[int], object]
"""Called with the number of (row, layer) pairs just done."""


def silent(done: int) -> None:
    """The `Tick` that shows nothing."""


@dataclass(frozen=True)
class _Group:
    """Prompts of equal length, embedded together."""

    prompts: list[int]
    prelude: Prelude


_LEAD = -1  # stands for the prompts' common prefix where a prompt's index is asked for


class LayerMajor:
    """Runs rows of the given prompts through a model, layer by layer.

    Args:
        stream: the model's residual stream.
        prompts: the model's inputs for each prompt, a batch of one each: input_ids (1, token), attention_mask, ...
        budget: how many rows may go through a layer at once, and how much memory hidden states may take.
        observed_tokens: observers look at so many of a prompt's last tokens; None: at all of them.
        together: whether prompts can be embedded together (`Skeleton.keeps_apart`).

    Raises UnsupportedModelError where layers share mutable state or hold arguments that cannot be followed; the caller
    then falls back to hooked forwards.
    """

    name = "layer-major"
    branches = True
    """Whether steered rows start at their own layer."""

    def __init__(
        self,
        stream: ResidualStream,
        prompts: Sequence[Mapping[str, Tensor]],
        budget: Budget,
        *,
        observed_tokens: int | None = None,
        together: bool = True,
    ) -> None:
        self.stream, self.skeleton, self.budget, self._together = stream, stream.skeleton, budget, together
        self.prompts = prompts
        self.leak = 0.0
        """Largest `share_along` at a layer's output in ablated rows."""
        by_shape: dict[Any, list[int]] = {}
        for index, inputs in enumerate(prompts):
            by_shape.setdefault(shape_of(inputs), []).append(index)
        with resident(*self.skeleton.outer, recurse=False):
            self._prefix = (
                None if observed_tokens is None else find_prefix(self.skeleton, prompts, spared=observed_tokens)
            )
            self._axes = self._learn_axes(max(range(len(prompts)), key=self._length))
            self._groups = [self._embed(members) for members in by_shape.values()]
            if self._prefix is not None:
                self._groups.append(_Group([_LEAD], self.skeleton.prelude(self._prefix.lead())))
        budget.reserve(sum(group.prelude.nbytes for group in self._groups))
        self._token_wise: nn.Module | None = None
        self._looked = False  # for what is token-wise in the last layer
        self._places = {
            prompt: (number, place)
            for number, group in enumerate(self._groups)
            for place, prompt in enumerate(group.prompts)
        }
        """Each prompt's group, and its place there."""

    @property
    def shared(self) -> int:
        """How many tokens all prompts begin with that are run apart."""
        return 0 if self._prefix is None else self._prefix.ids.shape[1]

    def _length(self, prompt: int) -> int:
        return self.prompts[prompt]["input_ids"].shape[-1]

    def _stack(self, prompts: Sequence[int]) -> dict[str, Any]:
        chosen = [self.prompts[prompt] for prompt in prompts]
        stacked = {name: torch.cat([inputs[name] for inputs in chosen]) for name in chosen[0]}
        return stacked if self._prefix is None else self._prefix.rest(stacked)

    def _learn_axes(self, longest: int) -> list[Any]:
        two, three = (self.skeleton.prelude(self._stack([longest] * count)) for count in (2, 3))
        if any(call.shares_state for call in two.calls):
            raise UnsupportedModelError("Its layers hand state on to each other besides the residual stream.")
        return [
            batch_axes((a.args, a.kwargs, a.change), (b.args, b.kwargs, b.change))
            for a, b in zip(two.calls, three.calls, strict=True)
        ]

    def _embed(self, members: list[int]) -> _Group:
        parts: list[Prelude] = []

        def through(some: slice) -> None:
            parts.append(self.skeleton.prelude(self._stack(members[some])))

        def at_once() -> int:
            return self.budget.rows(self._length(members[0])) if self._together else 1

        halving(through, len(members), self.budget, limit=at_once)
        joined: dict[int, Tensor] = {}
        calls = []
        for index, axes in enumerate(self._axes):
            of_parts = [(part.calls[index].args, part.calls[index].kwargs, part.calls[index].change) for part in parts]
            calls.append(LayerCall(*concatenate(of_parts, axes, joined)))
        return _Group(members, Prelude(torch.cat([part.hidden for part in parts]), tuple(calls)))

    @torch.no_grad()
    def run(
        self,
        rows: Sequence[Row],
        *,
        consume: Consume,
        candidates: Candidates | None = None,
        observe: Observe | None = None,
        tick: Tick = silent,
        reference_prompt: int | None = None,
    ) -> Tensor | None:
        """Run rows through the whole model, in as few passes over the weights as memory allows.

        Args:
            rows: what to run.
            consume: receives the logits of each row once, a few rows at a time, in no particular order.
            candidates: the directions that ablated and steered rows refer to.
            observe: receives the residual stream of the baseline rows at the input of every layer.
            tick: receives progress.
            witness: a prompt that the model's own forward runs alongside the first pass, layer by layer, so that it
                costs no further read of the weights.

        Returns the witness's logits (vocab,) by the model's own forward, if there is one.
        """
        tables = Tables.of(candidates, self._groups[0].prelude.hidden)
        reference_logits = None
        for some in self.passes(rows):
            length_groups = list(lay_out(some, self._places, candidates, tables=tables))
            step = self._step(length_groups, self._lead(some, length_groups, candidates, tables), observe, tick)
            with self.skeleton.held:  # layers kept in memory for the probes are released after the first pass
                if reference_prompt is not None and reference_logits is None:
                    reference_logits = self._alongside(reference_prompt, step)
                else:
                    for index in range(len(self.stream.layers)):
                        with resident(self.stream.layers[index]):
                            step(index)
            self._finish(length_groups, consume)
        return reference_logits

    def passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows as they go through together: each part is a pass over the weights of its own."""
        yield from self.budget.chunks(rows, self.row_bytes(rows))

    def row_bytes(self, rows: Sequence[Row]) -> list[int]:
        """What each row holds while it is under way; the first of an intervention also its lead, with keys and values."""
        sizes = {prompt: self._groups[group].prelude.hidden[0].nbytes for prompt, (group, _) in self._places.items()}
        lead = 3 * sizes.get(_LEAD, 0)
        before = [None, *((row.intervention, row.candidate) for row in rows)]
        return [
            sizes[row.prompt] + (lead if (row.intervention, row.candidate) != last else 0)
            for row, last in zip(rows, before, strict=False)
        ]

    def _lead(
        self, rows: Sequence[Row], length_groups: list[LengthGroup], candidates: Candidates | None, tables: Tables
    ) -> LengthGroup | None:
        """The lane of the common prefix, one row an intervention; the other lanes learn which of them is theirs."""
        if self._prefix is None:
            return None
        apart = dict.fromkeys(replace(row, prompt=_LEAD) for row in rows)
        (length_group,) = lay_out(list(apart), self._places, candidates, tables=tables)
        place = {row: index for index, row in enumerate(length_group.rows)}
        branch_point = 0  # where steered rows branch off without a baseline row that is asked for, it stands first
        for other in length_groups:
            own = (None if row is None else place[replace(row, prompt=_LEAD)] for row in other.rows)
            other.leads = torch.tensor([branch_point if index is None else index for index in own])
        return length_group

    def _alongside(self, prompt: int, step: Callable[[int], None]) -> Tensor:
        """Let the model's own forward of one prompt drive a pass: each layer, once in memory, serves both."""
        layers = self.stream.layers
        nested = False

        def driving(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal nested
                if nested:  # `step` calling the layer
                    return own(*args, **kwargs)
                with resident(layers[index]):
                    output = own(*args, **kwargs)
                    nested = True
                    try:
                        step(index)
                    finally:
                        nested = False
                return output

            return forward

        with replaced_forwards(layers, driving), must_fit():
            return self.skeleton.forward(**self.prompts[prompt]).logits[0, -1]

    def _step(
        self, length_groups: list[LengthGroup], lead: LengthGroup | None, observe: Observe | None, tick: Tick
    ) -> Callable[[int], None]:
        def step(index: int) -> None:
            if lead is not None and self._prefix is not None:
                with must_fit():
                    lead.enter(index, self._groups[lead.group].prelude.hidden, self.budget.rows(self.shared))
                self._advance(lead, index, silent)
                self._prefix.hand_over()
            for length_group in length_groups:
                self._through_layer(length_group, index, observe, tick)

        return step

    def _through_layer(self, length_group: LengthGroup, index: int, observe: Observe | None, tick: Tick) -> None:
        prelude = self._groups[length_group.group].prelude
        self._add_change(length_group, index, prelude.calls[index].change)
        with must_fit():
            length_group.enter(index, prelude.hidden, self.budget.rows(prelude.hidden.shape[1]))
        if observe is not None:
            baseline = [row for row in length_group.rows[: length_group.n_baseline] if row is not None]
            observe(index, baseline, length_group.hidden[: len(baseline)])
        self._advance(length_group, index, tick)

    def _add_change(self, length_group: LengthGroup, index: int, change: Tensor | None) -> None:
        if change is None:
            return

        def through(rows: slice) -> None:
            changed = length_group.hidden[rows] + change[length_group.places[rows]]
            length_group.hidden[rows] = (
                ablate(changed, length_group.units(rows)) if length_group.any_ablated else changed
            )

        halving(
            through,
            length_group.entered(index - 1),
            self.budget,
            limit=lambda: self.budget.rows(length_group.hidden.shape[1]),
        )

    def _advance(self, length_group: LengthGroup, index: int, tick: Tick) -> None:
        layer, group = self.stream.layers[index], self._groups[length_group.group]
        call, axes = group.prelude.calls[index], self._axes[index]

        def through(rows: slice) -> None:
            args, kwargs, _ = take_rows(
                (call.args, call.kwargs, None), axes, length_group.places[rows], prompts=len(group.prompts)
            )
            if self._prefix is not None:
                self._prefix.serve(length_group.leads, rows)
            with (
                self._intervention(length_group, index, rows),
                self._shortcut(index, length_group, LayerCall(args, kwargs), rows),
            ):
                output = hidden_states_of(layer(length_group.hidden[rows], *args, **kwargs))
            length_group.hidden[rows] = output
            tick(sum(row is not None for row in length_group.rows[rows]))

        entered = length_group.entered(index)
        if entered:
            halving(through, entered, self.budget, limit=lambda: self.budget.rows(length_group.hidden.shape[1]))
            self._watch_for_leaks(length_group, entered)

    @contextmanager
    def _shortcut(self, index: int, length_group: LengthGroup, call: LayerCall, rows: slice) -> Iterator[None]:
        """In the last layer the MLP sees the last token alone, where that is found to change nothing."""
        if index < len(self.stream.layers) - 1:
            yield
            return
        if not self._looked and length_group.hidden.shape[1] > 1:
            self._token_wise = token_wise_child(self.stream.layers[index], call, length_group.hidden[rows])
            self._looked = True
        with ExitStack() as hooks:
            if self._token_wise is not None:
                hooks.callback(self._token_wise.register_forward_pre_hook(last_token).remove)
            yield

    def _intervention(self, length_group: LengthGroup, index: int, rows: slice) -> AbstractContextManager[None]:
        return self.stream.ablating(index, length_group.units(rows)) if length_group.any_ablated else nullcontext()

    def _watch_for_leaks(self, length_group: LengthGroup, entered: int) -> None:
        """Check on a few ablated rows that nothing along u has come back into the stream."""
        ablated = [
            index
            for index, row in enumerate(length_group.rows[:entered])
            if row is not None and row.intervention is Intervention.ABLATION
        ]
        some = ablated[:: max(1, len(ablated) // 4)]
        if some:
            units = length_group.tables.units[length_group.ablated[some]]
            self.leak = max(self.leak, residual_component(length_group.hidden[some], units))

    def _finish(self, length_groups: list[LengthGroup], consume: Consume) -> None:
        """Final norm and head for the last position of every row."""
        rows = [row for length_group in length_groups for row in length_group.rows if row is not None]
        if not rows:
            return
        last = torch.cat(
            [length_group.hidden[[row is not None for row in length_group.rows], -1] for length_group in length_groups]
        )
        length_groups.clear()
        token = int(self.prompts[rows[0].prompt]["input_ids"][0, -1])

        def through(some: slice) -> None:
            consume(rows[some], self.skeleton.tail(last[some], token))

        with resident(*self.skeleton.outer, recurse=False):
            halving(through, len(rows), self.budget, limit=self.budget.logit_rows)
