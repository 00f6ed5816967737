"""From candidates to the choice: every candidate in full, KL first, or no more than proves which is selected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.config import Config
from refusal_direction.directions import promise
from refusal_direction.engine import Candidates, Engine, Kind, Row
from refusal_direction.errors import ConfigurationError, NoCandidateError
from refusal_direction.metrics import LEAST_REFUSAL, entropy, kl_floor
from refusal_direction.scoring import (
    ALL,
    Baseline,
    Measure,
    Scores,
    intervention_rows,
    null_candidates,
    rows_of,
    score_candidates,
)
from refusal_direction.search import Cell, Conditions, Found, Hints, search
from refusal_direction.selection import (
    CandidateScore,
    Selection,
    layer_limit,
    reasons,
    select,
    select_survivor,
    selection,
    survivors,
    warn_of_relaxed_kl,
    warn_of_waived_steering,
)
from refusal_direction.store import NOWHERE, Store

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from refusal_direction.models.refusal_tokens import RefusalTokens

__all__ = ["Choice", "Progress", "Setting", "choose", "how"]

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


@dataclass(frozen=True)
class Choice:
    """The candidate chosen, and what it was chosen by."""

    scores: Scores
    means: tuple[CandidateScore, ...]
    """Mean scores in (position, layer) order; NaN where not measured on every prompt."""
    selection: Selection
    search: str
    """How it was found."""
    measured: Mapping[Measure, Int[Tensor, "candidate"]] = field(repr=False)
    """On how many prompts each candidate was run. Those of length zero are not run: their scores are the baseline's."""
    sweeps: int
    """Passes over the weights, if all rows of one fit into memory."""
    exhaustive: int
    """Prompt evaluations of an exhaustive search: prompts run under an intervention."""

    @property
    def evaluations(self) -> int:
        """Prompt evaluations made."""
        return sum(int(counts.sum()) for counts in self.measured.values())


class _Sweeps:
    """Measures, and keeps the scores and the account."""

    def __init__(self, setting: Setting, progress: Progress) -> None:
        self.setting, self.progress = setting, progress
        self.flat = setting.flat
        self.null = null_candidates(self.flat)
        self.scores: Scores | None = None
        self.counts: Counter[tuple[int, Measure]] = Counter()
        self.done = 0

    def run(self, name: str, rows: Sequence[Row]) -> Scores:
        """One sweep; returns all scores so far."""
        of = self.setting
        with self.progress(name, of.engine.work(rows, self.flat)) as tick:
            new = score_candidates(of.engine, of.tokens, self.flat, rows, of.baseline, of.kept, tick, of.store)
        self.scores = new if self.scores is None else self.scores.with_more(new)
        self.counts.update((row.candidate, self._measure(row)) for row in rows)
        self.done += 1
        return self.scores

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

    def choice(self, name: str, chosen: Selection) -> Choice:
        if self.scores is None:
            raise AssertionError("nothing has been measured")
        candidates = range(len(self.null))
        measured = {m: torch.tensor([self.counts[candidate, m] for candidate in candidates]) for m in Measure}
        return Choice(self.scores, self.means(), chosen, name, measured, self.done, len(self.rows(ALL)))


def how(config: Config) -> str:
    """Which search a configuration asks for.

    Raises ConfigurationError where the rules have no such search.
    """
    name = config.search or config.rules.searches[0]
    if name not in config.rules.searches:
        raise ConfigurationError(f"--search {name}: must be one of {', '.join(config.rules.searches)}.")
    return name


def choose(setting: Setting, config: Config, progress: Progress) -> Choice:
    """Score the candidates as the configuration asks, and select one.

    Raises NoCandidateError where no candidate can be selected.
    """
    name, sweeps = how(config), _Sweeps(setting, progress)
    if name == "pruned":
        chosen = _pruned(sweeps, config)
    elif not config.rules.relative_steering:
        chosen = _exhaustively(sweeps, config)
    else:
        chosen = _by_kl_first(sweeps, config, None if name == "exhaustive" else config.rules.top_k)
    return sweeps.choice(name, chosen)


def _exhaustively(sweeps: _Sweeps, config: Config) -> Selection:
    sweeps.run("Sweep 2: interventions", sweeps.rows(ALL))
    return select(sweeps.means(), sweeps.setting.candidates.shape[1], config.thresholds, _null(sweeps))


def _by_kl_first(sweeps: _Sweeps, config: Config, top_k: int | None) -> Selection:
    """The published rule for images with text; without `top_k` every candidate is scored, and considered."""
    n_layers = sweeps.setting.candidates.shape[1]
    everyone = range(len(sweeps.null))
    sweeps.run("Sweep 2: KL divergence", sweeps.rows(frozenset({Measure.KL})))
    finalists = survivors(sweeps.means(), n_layers, config.thresholds, top_k or len(everyone), _null(sweeps))
    rest = sweeps.rows(ALL - {Measure.KL}, everyone if top_k is None else finalists)
    sweeps.run("Sweep 3: ablation and steering", rest)
    return select_survivor(sweeps.means(), finalists, config.thresholds, _harmless_baseline(sweeps.setting))


def _pruned(sweeps: _Sweeps, config: Config) -> Selection:
    """The same candidate, by bounds (search/)."""
    setting, thresholds = sweeps.setting, config.thresholds

    def ask(cells: Sequence[Cell]) -> list[float]:
        name = f"Sweep {sweeps.done + 2}: {len({cell.candidate for cell in cells})} candidates"
        scores = sweeps.run(name, rows_of(cells, **setting.validation))
        return [float(scores.of(cell.measure)[cell.candidate, cell.prompt]) for cell in cells]

    conditions = _conditions(sweeps, config)
    relative = config.rules.relative_steering
    found = search(conditions, _floors(setting), _hints(setting), ask, fallbacks=relative)
    limit = layer_limit(setting.candidates.shape[1], thresholds)
    if relative and found.conditions.kl != conditions.kl:
        warn_of_relaxed_kl(thresholds, limit)
    if relative and found.conditions.steering != conditions.steering:
        warn_of_waived_steering(conditions.steering)
    if found.best is None:
        return _unselected(sweeps, config, found)
    said = reasons(config.rules, limit, thresholds)
    return selection(found.best, sweeps.means()[found.best], found.fates, said)


def _unselected(sweeps: _Sweeps, config: Config, found: Found) -> Selection:
    """Raise the error that an exhaustive search raises; it shows the nearest misses, so they must be known."""
    if config.rules.relative_steering:
        raise NoCandidateError("Every score of every candidate is NaN. Try --dtype float32.")
    alive = torch.nonzero(~sweeps.null).flatten().tolist()
    missing = [cell for candidate in alive for m in Measure for cell in found.table.missing(candidate, m)]
    sweeps.run("Nothing passes; the rest, for the nearest misses", rows_of(missing, **sweeps.setting.validation))
    return select(sweeps.means(), sweeps.setting.candidates.shape[1], config.thresholds, _null(sweeps))


def _conditions(sweeps: _Sweeps, config: Config) -> Conditions:
    thresholds, rules = config.thresholds, config.rules
    layers = torch.tensor(sweeps.flat.layers)
    start = _harmless_baseline(sweeps.setting) if rules.relative_steering else 0.0
    return Conditions(
        layers=layers,
        null=sweeps.null.cpu(),
        limit=layer_limit(sweeps.setting.candidates.shape[1], thresholds),
        kl=thresholds.kl,
        steering=start + thresholds.induce,
        top_k=rules.top_k or len(layers),
    )


def _floors(setting: Setting) -> dict[Measure, Float[Tensor, "prompt"]]:
    """Costs cannot be lower: a refusal score on either side, the KL by each prompt's own baseline."""
    harmful, harmless = setting.validation["harmful"], setting.validation["harmless"]
    return {
        Measure.ABLATION: torch.full((len(harmful),), LEAST_REFUSAL),
        Measure.KL: torch.cat([kl_floor(setting.baseline.logits[prompt][None]) for prompt in harmless]),
        Measure.STEERING: torch.full((len(harmless),), LEAST_REFUSAL),
    }


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


def _null(sweeps: _Sweeps) -> frozenset[int]:
    return frozenset(torch.nonzero(sweeps.null).flatten().tolist())


def _harmless_baseline(setting: Setting) -> float:
    return float(setting.baseline.refusal[setting.kept["harmless_val"]].mean())
