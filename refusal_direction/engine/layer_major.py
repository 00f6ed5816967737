"""Layer-major runner: one pass over the weights, for any number of rows.

For each layer, for each microbatch of rows, run the layer. A model that is larger than memory is thus read once a pass.
Rows of one length share a microbatch, so nothing is padded; steered rows branch off a baseline row at their own layer; only
the last position reaches the final norm and the head. See docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from refusal_direction.candidates import Candidates
from refusal_direction.directions import ablate, residual_component
from refusal_direction.engine.arguments import batch_axes, concatenate, take_rows
from refusal_direction.engine.budget import Budget, halving, must_fit
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.kept import KeptRows
from refusal_direction.engine.protocol import Consume, Observe, Tick, silent
from refusal_direction.engine.residency import resident
from refusal_direction.engine.rows import Intervention, LengthGroup, Row, Tables, lay_out
from refusal_direction.engine.shortcuts.prefix import find_prefix
from refusal_direction.engine.shortcuts.token_wise import last_token, token_wise_child
from refusal_direction.engine.skeleton import LayerCall, Prelude, hidden_states_of, replaced_forwards, shape_of
from refusal_direction.errors import UnsupportedModelError

__all__ = ["LayerMajor"]

_PREFIX = -1
"""Stands for the shared prefix in the place of a prompt's index."""


def _on_prefix(row: Row | None) -> Row:
    """The row of the shared prefix that serves a row; None stands for a baseline row."""
    return Row(_PREFIX) if row is None else replace(row, prompt=_PREFIX)


@dataclass(frozen=True)
class _PromptGroup:
    """Prompts of one shape, embedded together."""

    prompts: list[int]
    prelude: Prelude


class LayerMajor:
    """Runs rows of the given prompts through a model, layer by layer.

    Args:
        stream: the model's residual stream.
        prompts: the model's inputs for each prompt, each a batch of one: input_ids (1, token), attention_mask, ...
        budget: limits on the rows that go through a layer at once, and on the memory of hidden states.
        observed_tokens: number of last tokens of a prompt that observers read; None: all of them.
        batched: whether prompts can be embedded in one batch (`Skeleton.embeds_independently`).
        keep: whether later passes return to the same interventions and prompts, so that prefix rows and branch points are
            kept for them, as far as memory allows.

    Raises UnsupportedModelError if layers share mutable state or take arguments that cannot be followed; the caller
    then falls back to hooked forwards.
    """

    name = "layer-major"
    branches = True
    """Whether steered rows start at their own layer instead of at layer 0."""

    def __init__(
        self,
        stream: ResidualStream,
        prompts: Sequence[Mapping[str, Tensor]],
        budget: Budget,
        *,
        observed_tokens: int | None = None,
        batched: bool = True,
        keep: bool = False,
    ) -> None:
        self.stream, self.skeleton, self.budget, self._batched = stream, stream.skeleton, budget, batched
        self._keep = keep
        self.prompts = prompts
        self.leak = 0.0
        """Largest `residual_component` of an ablated row at a layer's output so far."""
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
                self._groups.append(_PromptGroup([_PREFIX], self.skeleton.prelude(self._prefix.inputs())))
        self._kept_for: Candidates | None = None
        self._branch_points: list[KeptRows[int]] = [KeptRows() for _ in self._groups]
        budget.reserve(sum(group.prelude.nbytes for group in self._groups))
        self._token_wise: nn.Module | None = None
        self._looked = False  # for a token-wise child in the last layer
        self._places = {
            prompt: (number, place)
            for number, group in enumerate(self._groups)
            for place, prompt in enumerate(group.prompts)
        }
        """For each prompt, the index of its group and its place there."""

    @property
    def shared(self) -> int:
        """Number of leading tokens that are run once for each intervention, for all prompts together."""
        return 0 if self._prefix is None else self._prefix.ids.shape[1]

    def _length(self, prompt: int) -> int:
        return self.prompts[prompt]["input_ids"].shape[-1]

    def _stack(self, prompts: Sequence[int]) -> dict[str, Any]:
        selected = [self.prompts[prompt] for prompt in prompts]
        stacked = {name: torch.cat([inputs[name] for inputs in selected]) for name in selected[0]}
        return stacked if self._prefix is None else self._prefix.remainder(stacked)

    def _learn_axes(self, longest: int) -> list[Any]:
        """Batch axes of each layer's arguments."""
        two, three = (self.skeleton.prelude(self._stack([longest] * count)) for count in (2, 3))
        if any(call.shares_state for call in two.calls):
            raise UnsupportedModelError("Its layers pass state to each other besides the residual stream.")
        return [
            batch_axes((a.args, a.kwargs, a.change), (b.args, b.kwargs, b.change))
            for a, b in zip(two.calls, three.calls, strict=True)
        ]

    def _embed(self, members: list[int]) -> _PromptGroup:
        preludes: list[Prelude] = []

        def embed(some: slice) -> None:
            preludes.append(self.skeleton.prelude(self._stack(members[some])))

        def limit() -> int:
            return self.budget.rows(self._length(members[0])) if self._batched else 1

        halving(embed, len(members), self.budget, limit=limit)
        joined: dict[int, Tensor] = {}
        calls = []
        for index, axes in enumerate(self._axes):
            same_layer = [prelude.calls[index] for prelude in preludes]
            arguments = [(call.args, call.kwargs, call.change) for call in same_layer]
            calls.append(LayerCall(*concatenate(arguments, axes, joined)))
        return _PromptGroup(members, Prelude(torch.cat([prelude.hidden for prelude in preludes]), tuple(calls)))

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
        """Run rows through the whole model (`Runner.run`), in as few passes over the weights as memory allows.

        Args:
            reference_prompt: index of a prompt that the model's own forward runs beside the first pass, layer by layer,
                so that no further read of the weights is needed.

        Returns the reference prompt's logits (vocab,) by the model's own forward; None without a reference prompt.
        """
        tables = Tables.of(candidates, self._groups[0].prelude.hidden)
        self._forget_unless(candidates)
        reference_logits = None
        for some in self.passes(rows):
            length_groups = self._lay_out(some, candidates, tables)
            prefix_group = self._prefix_group(length_groups, candidates, tables)
            self._begin_keeping(length_groups, prefix_group)
            step = self._step(length_groups, prefix_group, observe, tick)
            with self.skeleton.held:  # layers kept in memory since the probes are released after the first pass
                if reference_prompt is not None and reference_logits is None:
                    reference_logits = self._alongside(reference_prompt, step)
                else:
                    for index in range(len(self.stream.layers)):
                        with resident(self.stream.layers[index]):
                            step(index)
            for kept in self._all_kept():
                kept.commit()
            self._finish(length_groups, consume)
        return reference_logits

    def _lay_out(self, rows: Sequence[Row], candidates: Candidates | None, tables: Tables) -> list[LengthGroup]:
        return list(lay_out(rows, self._places, candidates, tables=tables, kept=self._branch_points))

    def _all_kept(self) -> list[KeptRows[Any]]:
        return [*self._branch_points, *([] if self._prefix is None else [self._prefix.kept])]

    def _forget_unless(self, candidates: Candidates | None) -> None:
        """Forget what earlier passes kept, unless they had the same candidates."""
        if candidates is not self._kept_for:
            self._kept_for = candidates
            self._branch_points = [KeptRows() for _ in self._groups]
            if self._prefix is not None:
                self._prefix.kept = KeptRows()

    def _begin_keeping(self, length_groups: list[LengthGroup], prefix_group: LengthGroup | None) -> None:
        """Choose the rows of this pass to keep: branch points, then prefix rows, as far as memory allows."""
        free = self.budget.kept_bytes - sum(kept.nbytes for kept in self._all_kept()) if self._keep else 0
        for group in length_groups if prefix_group is None else [*length_groups, prefix_group]:
            row_bytes = self._groups[group.group].prelude.hidden[0].nbytes * len(self.stream.layers)
            first = group.n_baseline
            own = [
                self._groups[group.group].prompts[place]
                for place in group.places[first : first + group.n_branch_points]
            ]
            chosen = own[: max(0, free) // row_bytes]
            self._branch_points[group.group].begin(chosen)
            free -= len(chosen) * row_bytes
        if self._prefix is not None:
            rows = [] if prefix_group is None else [_on_prefix(row) for row in prefix_group.rows]
            self._prefix.kept.begin(rows[: max(0, free) // self._prefix.row_bytes])

    def passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows of each pass over the weights, in order."""
        yield from self.budget.passes(rows, self.row_bytes(rows))

    def row_bytes(self, rows: Sequence[Row]) -> list[int]:
        """Memory that each row holds while it is under way; the first row of an intervention includes its prefix row."""
        sizes = {prompt: self._groups[group].prelude.hidden[0].nbytes for prompt, (group, _) in self._places.items()}
        prefix_row = 3 * sizes.get(_PREFIX, 0)  # hidden states, keys and values
        before = [None, *((row.intervention, row.candidate) for row in rows)]
        return [
            sizes[row.prompt] + (prefix_row if (row.intervention, row.candidate) != last else 0)
            for row, last in zip(rows, before, strict=False)
        ]

    def _prefix_group(
        self, length_groups: list[LengthGroup], candidates: Candidates | None, tables: Tables
    ) -> LengthGroup | None:
        """Lay out the shared prefix, one row for each intervention of which none is kept, and tell every other row its own."""
        if self._prefix is None:
            return None
        own = {group.group: [_on_prefix(row) for row in group.rows] for group in length_groups}
        kept = self._prefix.kept
        new = [row for row in dict.fromkeys(chain(*own.values())) if row not in kept.places]
        prefix_group = next(iter(self._lay_out(new, candidates, tables)), None)
        rows = [] if prefix_group is None else prefix_group.rows
        place = {**{_on_prefix(row): kept.count + index for index, row in enumerate(rows)}, **kept.places}
        for group in length_groups:
            group.prefix_rows = torch.tensor([place[row] for row in own[group.group]])
        return prefix_group

    def _alongside(self, prompt: int, step: Callable[[int], None]) -> Tensor:
        """Let the model's own forward of one prompt drive a pass, so that both use each layer while it is in memory."""
        layers = self.stream.layers
        nested = False

        def driving(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal nested
                if nested:  # `step` calls the layer
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
        self, length_groups: list[LengthGroup], prefix_group: LengthGroup | None, observe: Observe | None, tick: Tick
    ) -> Callable[[int], None]:
        """A function that runs one layer on all rows that are under way there, the shared prefix first."""

        def step(index: int) -> None:
            if prefix_group is not None:
                self._through_layer(prefix_group, index, None, silent)
            if self._prefix is not None:
                self._prefix.publish(index, 0 if prefix_group is None else len(prefix_group.rows))
            for length_group in length_groups:
                self._through_layer(length_group, index, observe, tick)

        return step

    def _through_layer(self, length_group: LengthGroup, index: int, observe: Observe | None, tick: Tick) -> None:
        """Let rows enter at the layer, show the baseline rows to the observer, and run the layer."""
        prelude = self._groups[length_group.group].prelude
        self._add_change(length_group, index, prelude.calls[index].change)
        with must_fit():
            length_group.enter(index, prelude.hidden, self.budget.rows(prelude.hidden.shape[1]))
        if observe is not None:
            baseline = [row for row in length_group.rows[: length_group.n_baseline] if row is not None]
            observe(index, baseline, length_group.hidden[: len(baseline)])
        self._advance(length_group, index, tick)

    def _add_change(self, length_group: LengthGroup, index: int, change: Tensor | None) -> None:
        """Apply the change that the model makes to the stream before this layer (`LayerCall.change`)."""
        if change is None:
            return

        def add(rows: slice) -> None:
            changed = length_group.hidden[rows] + change[length_group.places[rows]]
            length_group.hidden[rows] = (
                ablate(changed, length_group.units(rows)) if length_group.any_ablated else changed
            )

        halving(
            add,
            length_group.entered(index - 1),
            self.budget,
            limit=lambda: self.budget.rows(length_group.hidden.shape[1]),
        )

    def _advance(self, length_group: LengthGroup, index: int, tick: Tick) -> None:
        """Run the layer on the rows that are under way, a microbatch at a time."""
        layer, group = self.stream.layers[index], self._groups[length_group.group]
        call, axes = group.prelude.calls[index], self._axes[index]

        def run_layer(rows: slice) -> None:
            args, kwargs, _ = take_rows(
                (call.args, call.kwargs, None), axes, length_group.places[rows], prompts=len(group.prompts)
            )
            if self._prefix is not None:
                self._prefix.select(length_group.prefix_rows, rows)
            with (
                self._intervention(length_group, index, rows),
                self._shortcut(index, length_group, LayerCall(args, kwargs), rows),
            ):
                output = hidden_states_of(layer(length_group.hidden[rows], *args, **kwargs))
            length_group.hidden[rows] = output
            tick(sum(row is not None for row in length_group.rows[rows]))

        entered = length_group.entered(index)
        if entered:
            halving(run_layer, entered, self.budget, limit=lambda: self.budget.rows(length_group.hidden.shape[1]))
            self._watch_for_leaks(length_group, entered)

    @contextmanager
    def _shortcut(self, index: int, length_group: LengthGroup, call: LayerCall, rows: slice) -> Iterator[None]:
        """Give the last layer's MLP the last token alone, if a trial shows that this changes nothing."""
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
        """Measure on a few ablated rows whether the stream has regained a component along u."""
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
        """Run the final norm and the head on the last position of every row."""
        rows = [row for length_group in length_groups for row in length_group.rows if row is not None]
        if not rows:
            return
        last = torch.cat(
            [length_group.hidden[[row is not None for row in length_group.rows], -1] for length_group in length_groups]
        )
        length_groups.clear()
        token = int(self.prompts[rows[0].prompt]["input_ids"][0, -1])

        def run_head(some: slice) -> None:
            consume(rows[some], self.skeleton.tail(last[some], token))

        with resident(*self.skeleton.outer, recurse=False):
            halving(run_head, len(rows), self.budget, limit=self.budget.logit_rows)
