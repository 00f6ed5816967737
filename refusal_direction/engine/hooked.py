"""The fallback engine: the model's own forward under hooks, a microbatch of rows at a time.

Slower than layer-major, and with nothing assumed about what happens between layers. The same interface, but no witness.
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
from refusal_direction.engine.layer_major import Consume, Observe, Tick, silent
from refusal_direction.engine.rows import Intervention, Row
from refusal_direction.engine.skeleton import hidden_states_of, shape_of

__all__ = ["Hooked"]

_ROWS_IN_A_PART = 1024


class Hooked:
    """Runs rows of the given prompts through the model's own forward, under hooks.

    Rows go `together` unless the model mixes them (`Skeleton.keeps_apart`).
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
        together: bool = True,
    ) -> None:
        self.stream, self.prompts, self.budget, self._together = stream, prompts, budget, together
        self.leak = 0.0

    def passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """As LayerMajor.parts; here they only say how often finished work is kept."""
        yield from (rows[begin : begin + _ROWS_IN_A_PART] for begin in range(0, len(rows), _ROWS_IN_A_PART))

    def row_bytes(self, rows: Sequence[Row]) -> list[int]:
        """Nothing is held between microbatches."""
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
        """As LayerMajor.run, without a witness: the model's own forward is all there is."""
        for alike in self._alike(rows, candidates):

            def through(some: slice, alike: list[Row] = alike) -> None:
                microbatch = alike[some]
                with ExitStack() as hooks:
                    hooks.enter_context(self._intervention(microbatch, candidates))
                    if observe is not None:
                        hooks.enter_context(self._observing(microbatch, observe))
                    inputs = [self.prompts[row.prompt] for row in microbatch]
                    stacked = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
                    logits = self.stream.skeleton.forward(**stacked).logits[:, -1]
                consume(microbatch, logits)
                tick(len(microbatch) * len(self.stream.layers))

            length = self.prompts[alike[0].prompt]["input_ids"].shape[-1]
            halving(through, len(alike), self.budget, limit=partial(self._at_once, length))

    def _at_once(self, length: int) -> int:
        return self.budget.rows(length) if self._together else 1

    def _alike(self, rows: Sequence[Row], candidates: Candidates | None) -> Iterator[list[Row]]:
        """Rows of one shape and one kind; steered rows of one layer."""
        together: dict[Any, list[Row]] = {}
        for row in rows:
            layer = (
                None
                if candidates is None or row.intervention is not Intervention.STEERING
                else candidates.layers[row.candidate]
            )
            together.setdefault((shape_of(self.prompts[row.prompt]), row.intervention, layer), []).append(row)
        yield from together.values()

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
