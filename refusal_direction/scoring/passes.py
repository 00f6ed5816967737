"""The sweeps that measure candidates' scores, and the account of what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from refusal_direction.config import Config
from refusal_direction.directions import rank_heuristic
from refusal_direction.engine import Row, Tick
from refusal_direction.scoring.metrics import Measure, entropy
from refusal_direction.scoring.noise import Repeats
from refusal_direction.scoring.scores import (
    Scores,
    ScoringContext,
    intervention_rows,
    measure_of,
    null_candidates,
    score_candidates,
)
from refusal_direction.selection.pruned.search import Hints
from refusal_direction.selection.rules import CandidateScore, layer_limit

__all__ = ["Progress", "ScoringPasses"]

Progress = Callable[[str, int], AbstractContextManager[Tick]]
"""Given a description and a total, a context whose value is called with each bit of work done."""


class ScoringPasses:
    """Measures, and keeps the scores and the account."""

    def __init__(self, setting: ScoringContext, config: Config, progress: Progress) -> None:
        self.setting, self.progress = setting, progress
        self.flat, self.hints = setting.flat, _hints(setting)
        self.null = null_candidates(self.flat)
        self.limit = layer_limit(setting.candidates.shape[1], config.thresholds)
        order = [candidate for candidate in self.hints.candidates if self.flat.layers[candidate] < self.limit]
        self.repeats = Repeats(self.flat, setting.engine.dtype, order, self._measure)
        self.n_repeated = 0
        self.scores: Scores | None = None
        self.counts: Counter[tuple[int, Measure]] = Counter()
        self.n_sweeps = 0

    def run(self, name: str, rows: Sequence[Row]) -> Scores:
        """One sweep; returns all scores so far."""
        again, both = self.repeats.of(rows), self.repeats.candidates
        everything = [*rows, *again]
        with self.progress(name, self.setting.engine.work(everything, both)) as tick:
            new = score_candidates(self.setting, both, rows=everything, tick=tick)
        self._compare(again, new)
        new = new.first(len(self.null))
        self.scores = new if self.scores is None else self.scores.with_more(new)
        self.counts.update((row.candidate, self._measure(row)) for row in rows)
        self.n_sweeps += 1
        return self.scores

    def _compare(self, again: Sequence[Row], scores: Scores) -> None:
        """Record how far rows run again are from themselves."""
        validation = self.setting.validation.values()
        place = {prompt: index for prompts in validation for index, prompt in enumerate(prompts)}
        for row in again:
            measure, prompt = self._measure(row), place[row.prompt]
            ours = scores.of(measure)[:, prompt]
            self.repeats.enter(measure, float(ours[row.candidate] - ours[row.candidate - len(self.null)]))
        self.n_repeated += len(again)

    def rows(self, measures: frozenset[Measure], among: Sequence[int] | None = None) -> list[Row]:
        return intervention_rows(self.flat, **self.setting.validation, measures=measures, among=among)

    def _measure(self, row: Row) -> Measure:
        return measure_of(row, self.setting.kept["harmful_val"])

    def means(self) -> tuple[CandidateScore, ...]:
        """Mean scores, NaN where a candidate was not measured on every prompt."""
        assert self.scores is not None, "nothing has been measured"
        n_positions, n_layers, _ = self.setting.candidates.shape
        columns = {measure.value: self.scores.of(measure).mean(dim=1).tolist() for measure in Measure}
        return tuple(
            CandidateScore(
                index // n_layers - n_positions,
                index % n_layers,
                **{name: column[index] for name, column in columns.items()},
            )
            for index in range(n_positions * n_layers)
        )


def _hints(setting: ScoringContext) -> Hints:
    """Candidates by their promise. Prompts: what was most refused or answered stays so, what was least sure moves most."""
    harmful, harmless = setting.validation["harmful"], setting.validation["harmless"]
    refusal, logits = setting.baseline.refusal.cpu(), setting.baseline.logits
    seen = setting.baseline.activations[setting.kept["harmless_train"]]
    return Hints(
        candidates=rank_heuristic(setting.candidates, seen).flatten().argsort(descending=True).tolist(),
        shape={
            Measure.ABLATION: refusal[harmful],
            Measure.KL: torch.cat([entropy(logits[prompt][None]).cpu().double() for prompt in harmless]),
            Measure.STEERING: -refusal[harmless],
        },
        depth=setting.candidates.shape[1],
    )
