"""The sweeps that measure candidates' scores, and the account of what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.config import Config
from refusal_direction.directions import promise
from refusal_direction.engine import Candidates, Engine, Kind, Row
from refusal_direction.metrics import entropy
from refusal_direction.rounding import Repeats
from refusal_direction.scoring import (
    Baseline,
    Measure,
    Scores,
    intervention_rows,
    null_candidates,
    score_candidates,
)
from refusal_direction.search import Hints
from refusal_direction.selection import CandidateScore, layer_limit
from refusal_direction.store import NOWHERE, Store

if TYPE_CHECKING:
    from jaxtyping import Float

    from refusal_direction.models.refusal_tokens import RefusalTokens

__all__ = ["Progress", "Setting", "Sweeps"]

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Given a description and a total, a context whose value is called with each bit of work done."""


@dataclass(frozen=True)
class Setting:
    """What a choice is made from."""

    engine: Engine
    tokens: RefusalTokens
    candidates: Float[Tensor, "position layer d_model"]
    baseline: Baseline
    kept: dict[str, list[int]]
    """For each set, the prompts that the filter left."""
    store: Store = NOWHERE
    """Where earlier runs may have left results, and where they are left."""

    @property
    def flat(self) -> Candidates:
        """The candidates in (position, layer) order."""
        n_positions, n_layers, _ = self.candidates.shape
        return Candidates(self.candidates.flatten(0, 1), tuple(range(n_layers)) * n_positions)

    @property
    def validation(self) -> dict[str, list[int]]:
        """The validation prompts."""
        return {"harmful": self.kept["harmful_val"], "harmless": self.kept["harmless_val"]}


class Sweeps:
    """Measures, and keeps the scores and the account."""

    def __init__(self, setting: Setting, config: Config, progress: Progress) -> None:
        self.setting, self.progress = setting, progress
        self.flat, self.hints = setting.flat, _hints(setting)
        self.null = null_candidates(self.flat)
        self.limit = layer_limit(setting.candidates.shape[1], config.thresholds)
        order = [candidate for candidate in self.hints.candidates if self.flat.layers[candidate] < self.limit]
        self.repeats = Repeats(self.flat, setting.engine.dtype, order, self._measure)
        self.repeated = 0
        self.scores: Scores | None = None
        self.counts: Counter[tuple[int, Measure]] = Counter()
        self.done = 0

    def run(self, name: str, rows: Sequence[Row]) -> Scores:
        """One sweep; returns all scores so far."""
        of, again, both = self.setting, self.repeats.of(rows), self.repeats.candidates
        everything = [*rows, *again]
        with self.progress(name, of.engine.work(everything, both)) as tick:
            new = score_candidates(of.engine, of.tokens, both, everything, of.baseline, of.kept, tick, of.store)
        self._compare(again, new)
        new = new.first(len(self.null))
        self.scores = new if self.scores is None else self.scores.with_more(new)
        self.counts.update((row.candidate, self._measure(row)) for row in rows)
        self.done += 1
        return self.scores

    def _compare(self, again: Sequence[Row], scores: Scores) -> None:
        """Take down how far rows run again are from themselves."""
        of = self.setting.validation
        place = {prompt: index for prompts in of.values() for index, prompt in enumerate(prompts)}
        for row in again:
            measure, prompt = self._measure(row), place[row.prompt]
            by = scores.of(measure)
            self.repeats.enter(measure, float(by[row.candidate, prompt] - by[row.candidate - len(self.null), prompt]))
        self.repeated += len(again)

    def rows(self, measures: frozenset[Measure], among: Sequence[int] | None = None) -> list[Row]:
        return intervention_rows(self.flat, **self.setting.validation, measures=measures, among=among)

    def _measure(self, row: Row) -> Measure:
        if row.kind is Kind.STEERING:
            return Measure.STEERING
        return Measure.ABLATION if row.prompt in self.setting.kept["harmful_val"] else Measure.KL

    def means(self) -> tuple[CandidateScore, ...]:
        """Of all scores so far."""
        if self.scores is None:
            raise AssertionError("nothing has been measured")
        n_positions, n_layers, _ = self.setting.candidates.shape
        columns = [self.scores.of(m).mean(dim=1).tolist() for m in (Measure.ABLATION, Measure.STEERING, Measure.KL)]
        return tuple(
            CandidateScore(position - n_positions, layer, *(column[position * n_layers + layer] for column in columns))
            for position in range(n_positions)
            for layer in range(n_layers)
        )


def _hints(setting: Setting) -> Hints:
    """Candidates by their promise. Prompts: what was most refused or answered stays so, what was least sure moves most."""
    harmful, harmless = setting.validation["harmful"], setting.validation["harmless"]
    refusal, logits = setting.baseline.refusal.cpu(), setting.baseline.logits
    seen = setting.baseline.activations[setting.kept["harmless_train"]]
    return Hints(
        candidates=promise(setting.candidates, seen).flatten().argsort(descending=True).tolist(),
        shape={
            Measure.ABLATION: refusal[harmful],
            Measure.KL: torch.cat([entropy(logits[prompt][None]).cpu().double() for prompt in harmless]),
            Measure.STEERING: -refusal[harmless],
        },
        depth=setting.candidates.shape[1],
    )
