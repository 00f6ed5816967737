"""The passes that measure candidates: accumulates scores and evaluation counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from refusal_direction.engine import Tick
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.noise import Repeats
from refusal_direction.scoring.requests import ScoringContext, measure
from refusal_direction.scoring.scores import CandidateScore, ScoreRequest

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

__all__ = ["Progress", "ScoringPasses"]

Progress = Callable[[str, int], AbstractContextManager[Tick]]
"""Given a description and a total, a context whose value is called with each amount of work done."""


class ScoringPasses:
    """Measures scores, and accumulates scores and evaluation counts.

    Args:
        context: everything that scores depend on.
        progress: shows each pass.
        order: candidates worth repeating for the noise, the most promising first.
    """

    def __init__(self, context: ScoringContext, progress: Progress, order: Sequence[int]) -> None:
        self.context, self._progress = context, progress
        self.repeats = Repeats(context.candidates, context.engine.dtype, order)
        self.scores = context.unmeasured()
        self.measured: dict[Measure, Int[Tensor, "candidate"]] = {
            measure: torch.zeros(len(context.candidates), dtype=torch.long) for measure in Measure
        }
        """The number of prompts that each candidate was measured on."""
        self.n_passes = 0

    def run(self, name: str, requests: Sequence[ScoreRequest]) -> list[float]:
        """Measure scores that have not been measured before, in one pass; returns their values."""
        repeats = self.repeats.plan(requests)
        together, candidates = [*requests, *repeats], self.repeats.candidates
        rows = [self.context.row(request) for request in together]
        with self._progress(name, self.context.engine.work(rows, candidates)) as tick:
            values = measure(self.context, candidates, together, tick).tolist()
        by_request = dict(zip(together, values, strict=True))
        originals = [by_request[self.repeats.original(repeat)] for repeat in repeats]
        self.repeats.record(repeats, values[len(requests) :], originals)
        self.scores = self.scores.with_values(requests, values[: len(requests)])
        for request in requests:
            self.measured[request.measure][request.candidate] += 1
        self.n_passes += 1
        return values[: len(requests)]

    def means(self) -> tuple[CandidateScore, ...]:
        """Mean scores; NaN where a candidate was not measured on every prompt."""
        return self.scores.means(self.context.candidates.labels)
