"""Fallback runner: the model's own forward under hooks, a microbatch of rows at a time.

Slower than layer-major, but nothing is assumed about the computation between layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refusal_direction.candidates import Candidates
from refusal_direction.directions import residual_component, unit
from refusal_direction.engine.budget import Budget, halving
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.protocol import Consume, Observe, Tick, silent
from refusal_direction.engine.rows import Intervention, Row
from refusal_direction.engine.skeleton import hidden_states_of, shape_of

__all__ = ["Hooked"]

_ROWS_PER_PASS = 1024


class Hooked:
    """Runs rows of the given prompts through the model's own forward, under hooks.

    Args:
        stream: the model's residual stream.
        prompts: the model's inputs for each prompt, each a batch of one: input_ids (1, token), attention_mask, ...
        budget: limits on the rows that go through the model at once.
        batched: whether prompts can be run in one batch (`Skeleton.embeds_independently`).
    """

    name = "hooked"
    branches = False
    shared = 0

    def __init__(
        self,
        stream: ResidualStream,
        prompts: Sequence[Mapping[str, Tensor]],
        budget: Budget,
        *,
        batched: bool = True,
    ) -> None:
        self.stream, self.prompts, self.budget, self._batched = stream, prompts, budget, batched
        self.leak = 0.0
        """Largest `residual_component` of an ablated stream at a layer's output so far."""

    def passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Rows after which finished work is saved. Memory sets no limit, and each microbatch reads all weights."""
        yield from (rows[begin : begin + _ROWS_PER_PASS] for begin in range(0, len(rows), _ROWS_PER_PASS))

    def row_bytes(self, rows: Sequence[Row]) -> list[int]:
        """Zero for each row: nothing is held between microbatches."""
        return [0] * len(rows)

    @torch.no_grad()
    def run(
        self,
        rows: Sequence[Row],
        *,
        consume: Consume,
        candidates: Candidates | None = None,
        observe: Observe | None = None,
        tick: Tick = silent,
    ) -> None:
        """Run rows through the whole model (`Runner.run`)."""
        for compatible in self._compatible(rows, candidates):

            def run_model(some: slice, compatible: list[Row] = compatible) -> None:
                microbatch = compatible[some]
                with ExitStack() as hooks:
                    hooks.enter_context(self._intervention(microbatch, candidates))
                    if observe is not None:
                        hooks.enter_context(self._observing(microbatch, observe))
                    inputs = [self.prompts[row.prompt] for row in microbatch]
                    stacked = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
                    logits = self.stream.skeleton.forward(**stacked).logits[:, -1]
                consume(microbatch, logits)
                tick(len(microbatch) * len(self.stream.layers))

            length = self.prompts[compatible[0].prompt]["input_ids"].shape[-1]
            halving(run_model, len(compatible), self.budget, limit=partial(self._most_rows, length))

    def _most_rows(self, length: int) -> int:
        return self.budget.rows(length) if self._batched else 1

    def _compatible(self, rows: Sequence[Row], candidates: Candidates | None) -> Iterator[list[Row]]:
        """Rows that can share a forward pass: of one shape and one intervention, and at one layer if steered."""
        compatible: dict[Any, list[Row]] = {}
        for row in rows:
            layer = (
                None
                if candidates is None or row.intervention is not Intervention.STEERING
                else candidates.layers[row.candidate]
            )
            compatible.setdefault((shape_of(self.prompts[row.prompt]), row.intervention, layer), []).append(row)
        yield from compatible.values()

    @contextmanager
    def _intervention(self, rows: list[Row], candidates: Candidates | None) -> Iterator[None]:
        kind = rows[0].intervention
        if candidates is None or kind is Intervention.BASELINE:
            yield
            return
        vectors = candidates.vectors[[row.candidate for row in rows]]
        if kind is Intervention.STEERING:
            with self.stream.steered(vectors, candidates.layers[rows[0].candidate]):
                yield
            return
        with self.stream.ablated(unit(vectors)), self._watching_for_leaks(unit(vectors)):
            yield

    @contextmanager
    def _watching_for_leaks(self, u: Tensor) -> Iterator[None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            self.leak = max(self.leak, residual_component(hidden_states_of(output), u))

        with ExitStack() as hooks:
            for layer in self.stream.layers:
                hooks.callback(layer.register_forward_hook(see).remove)
            yield

    @contextmanager
    def _observing(self, rows: list[Row], observe: Observe) -> Iterator[None]:
        def hook(index: int) -> Any:
            def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                observe(index, rows, args[0] if args else kwargs["hidden_states"])

            return see

        with ExitStack() as hooks:
            for index, layer in enumerate(self.stream.layers):
                hooks.callback(layer.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
            yield
