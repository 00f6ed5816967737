"""From candidates to the choice: every candidate in full, KL first, or no more than proves which is selected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.config import Config
from refusal_direction.errors import ConfigurationError, NoCandidateError
from refusal_direction.scoring.metrics import LEAST_REFUSAL, Measure, kl_floor
from refusal_direction.scoring.noise import Noise, ties
from refusal_direction.scoring.passes import Progress, ScoringPasses
from refusal_direction.scoring.scores import ALL, Scores, ScoringContext, rows_of
from refusal_direction.selection.pruned.search import Conditions, Found, ScoreRequest, search
from refusal_direction.selection.rules import (
    CandidateScore,
    Rejection,
    Selection,
    all_admitted,
    reasons,
    select,
    select_survivor,
    selection,
    survivors,
    warn_of_relaxed_kl,
    warn_of_waived_steering,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["SelectionResult", "select_direction", "search_name"]


@dataclass(frozen=True)
class SelectionResult:
    """The candidate chosen, and what it was chosen by."""

    scores: Scores
    means: tuple[CandidateScore, ...]
    """Mean scores in (position, layer) order; NaN where not measured on every prompt."""
    selection: Selection
    search: str
    """How it was found."""
    measured: Mapping[Measure, Int[Tensor, "candidate"]] = field(repr=False)
    """On how many prompts each candidate was run. Those of length zero are not run: their scores are the baseline's."""
    n_sweeps: int
    """Passes over the weights, if all rows of one fit into memory."""
    exhaustive_evaluations: int
    """Prompt evaluations of an exhaustive search: prompts run under an intervention."""
    noise: Noise
    """How far rounding alone moves mean scores, measured."""
    n_repeated: int
    """Rows run a second time to measure it; they are no prompt evaluations."""
    ties: tuple[int, ...]
    """The candidates that rounding alone may have kept from being selected instead."""

    @property
    def tied(self) -> list[CandidateScore]:
        """The mean scores of the `ties`."""
        return [self.means[index] for index in self.ties]

    @property
    def evaluations(self) -> int:
        """Prompt evaluations made."""
        return sum(int(counts.sum()) for counts in self.measured.values())


@dataclass(frozen=True)
class _Outcome:
    """What was selected, and by which conditions in the end."""

    chosen: Selection
    among: Sequence[int]
    """The candidates that met those conditions which know of no rounding: on layer, length and rank."""
    kl: float
    steering: float
    at_best: Sequence[CandidateScore] = ()
    """Where not every candidate was measured in full: the best that their means may be."""


def search_name(config: Config) -> str:
    """Which search a configuration asks for.

    Raises ConfigurationError where the rules have no such search.
    """
    name = config.search or config.rules.searches[0]
    if name not in config.rules.searches:
        raise ConfigurationError(f"--search {name}: must be one of {', '.join(config.rules.searches)}.")
    return name


def select_direction(setting: ScoringContext, config: Config, *, progress: Progress) -> SelectionResult:
    """Score the candidates as the configuration asks, and select one.

    Raises NoCandidateError where no candidate can be selected.
    """
    name, sweeps = search_name(config), ScoringPasses(setting, config, progress)
    if bool(sweeps.null.all()):
        raise NoCandidateError(
            "Every candidate has length zero: harmful and harmless training prompts leave the same activations. Are they the same?"
        )
    if name == "pruned":
        outcome = _pruned(sweeps, config)
    elif not config.rules.relative_steering:
        outcome = _exhaustively(sweeps, config)
    else:
        outcome = _by_kl_first(sweeps, config, None if name == "exhaustive" else config.rules.top_k)
    return _choice(sweeps, name, outcome)


def _choice(sweeps: ScoringPasses, name: str, outcome: _Outcome) -> SelectionResult:
    assert sweeps.scores is not None, "nothing has been measured"
    means, noise = sweeps.means(), sweeps.repeats.noise
    return SelectionResult(
        scores=sweeps.scores,
        means=means,
        selection=outcome.chosen,
        search=name,
        measured={m: torch.tensor([sweeps.counts[index, m] for index in range(len(means))]) for m in Measure},
        n_sweeps=sweeps.n_sweeps,
        exhaustive_evaluations=len(sweeps.rows(ALL)),
        noise=Noise(**{measure.value: noise[measure] for measure in Measure}),
        n_repeated=sweeps.n_repeated,
        ties=ties(
            means,
            outcome.chosen.index,
            outcome.among,
            kl=outcome.kl,
            steering=outcome.steering,
            noise=noise,
            at_best=outcome.at_best,
        ),
    )


def _exhaustively(sweeps: ScoringPasses, config: Config) -> _Outcome:
    sweeps.run("Sweep 2: interventions", sweeps.rows(ALL))
    chosen = select(
        sweeps.means(), sweeps.setting.candidates.shape[1], thresholds=config.thresholds, null=_null(sweeps)
    )
    return _Outcome(chosen, among=_shallow(sweeps), kl=config.thresholds.kl, steering=config.thresholds.induce)


def _by_kl_first(sweeps: ScoringPasses, config: Config, top_k: int | None) -> _Outcome:
    """The published rule for images with text; without `top_k` every candidate is scored, and considered."""
    n_layers = sweeps.setting.candidates.shape[1]
    everyone = range(len(sweeps.null))
    sweeps.run("Sweep 2: KL divergence", sweeps.rows(frozenset({Measure.KL})))
    finalists = survivors(
        sweeps.means(), n_layers, thresholds=config.thresholds, top_k=top_k or len(everyone), null=_null(sweeps)
    )
    rest = sweeps.rows(ALL - {Measure.KL}, everyone if top_k is None else finalists)
    sweeps.run("Sweep 3: ablation and steering", rest)
    means, baseline = sweeps.means(), _harmless_baseline(sweeps.setting)
    chosen = select_survivor(
        means, finalists, thresholds=config.thresholds, baseline=baseline, n_layers=n_layers, null=_null(sweeps)
    )
    strict = all_admitted(means, finalists, thresholds=config.thresholds, limit=sweeps.limit)
    steering = baseline + config.thresholds.induce
    steering = steering if any(means[i].steering_refusal >= steering for i in finalists) else -inf
    return _Outcome(chosen, among=finalists, kl=config.thresholds.kl if strict else inf, steering=steering)


def _pruned(sweeps: ScoringPasses, config: Config) -> _Outcome:
    """The same candidate, by bounds (search/)."""
    setting, thresholds = sweeps.setting, config.thresholds

    def ask(cells: Sequence[ScoreRequest]) -> list[float]:
        name = f"Sweep {sweeps.n_sweeps + 2}: {len({cell.candidate for cell in cells})} candidates"
        scores = sweeps.run(name, rows_of(cells, **setting.validation))
        return [float(scores.of(cell.measure)[cell.candidate, cell.prompt]) for cell in cells]

    conditions = _conditions(sweeps, config)
    relative = config.rules.relative_steering
    found = search(
        conditions,
        _floors(setting),
        hints=sweeps.hints,
        ask=ask,
        fallbacks=relative,
        noise=lambda: sweeps.repeats.noise,
    )
    if relative and (found.conditions.kl, found.conditions.limit) != (conditions.kl, conditions.limit):
        warn_of_relaxed_kl(thresholds, sweeps.limit)
    if relative and found.conditions.steering != conditions.steering:
        warn_of_waived_steering(conditions.steering)
    return _unselected(sweeps, config, found) if found.best is None else _selected(sweeps, config, found, found.best)


def _selected(sweeps: ScoringPasses, config: Config, found: Found, best: int) -> _Outcome:
    why, means = reasons(config.rules, sweeps.limit, config.thresholds), sweeps.means()
    ruled_out = {Rejection.NULL, Rejection.BROKEN, Rejection.LAYER, Rejection.RANK}
    bounds = {measure.value: (measure.sign * found.table.bound(measure)).tolist() for measure in Measure}
    return _Outcome(
        chosen=selection(best, means[best], found.fates, why),
        among=[index for index, fate in enumerate(found.fates) if fate not in ruled_out],
        kl=found.conditions.kl,
        steering=found.conditions.steering,
        at_best=[
            replace(score, **{name: bound[index] for name, bound in bounds.items()})
            for index, score in enumerate(means)
        ],
    )


def _unselected(sweeps: ScoringPasses, config: Config, found: Found) -> _Outcome:
    """Measure the rest and select as an exhaustive search does, which raises NoCandidateError with the nearest misses."""
    if config.rules.relative_steering:
        raise NoCandidateError("Every score of every candidate is NaN. Try --dtype float32.")
    alive = torch.nonzero(~sweeps.null).flatten().tolist()
    missing = [cell for candidate in alive for m in Measure for cell in found.table.missing(candidate, m)]
    sweeps.run("Nothing passes; the rest, for the nearest misses", rows_of(missing, **sweeps.setting.validation))
    chosen = select(
        sweeps.means(), sweeps.setting.candidates.shape[1], thresholds=config.thresholds, null=_null(sweeps)
    )
    return _Outcome(chosen, among=_shallow(sweeps), kl=config.thresholds.kl, steering=config.thresholds.induce)


def _conditions(sweeps: ScoringPasses, config: Config) -> Conditions:
    thresholds, rules = config.thresholds, config.rules
    layers = torch.tensor(sweeps.flat.layers)
    start = _harmless_baseline(sweeps.setting) if rules.relative_steering else 0.0
    return Conditions(
        layers=layers,
        null=sweeps.null.cpu(),
        limit=sweeps.limit,
        kl=thresholds.kl,
        steering=start + thresholds.induce,
        top_k=rules.top_k or len(layers),
    )


def _floors(setting: ScoringContext) -> dict[Measure, Float[Tensor, "prompt"]]:
    """Costs cannot be lower: a refusal score on either side, the KL by each prompt's own baseline."""
    harmful, harmless = setting.validation["harmful"], setting.validation["harmless"]
    return {
        Measure.ABLATION: torch.full((len(harmful),), LEAST_REFUSAL),
        Measure.KL: torch.cat([kl_floor(setting.baseline.logits[prompt][None]) for prompt in harmless]),
        Measure.STEERING: torch.full((len(harmless),), LEAST_REFUSAL),
    }


def _shallow(sweeps: ScoringPasses) -> list[int]:
    """The candidates that have a length and are not of the last layers."""
    return [i for i, layer in enumerate(sweeps.flat.layers) if layer < sweeps.limit and not sweeps.null[i]]


def _null(sweeps: ScoringPasses) -> frozenset[int]:
    return frozenset(torch.nonzero(sweeps.null).flatten().tolist())


def _harmless_baseline(setting: ScoringContext) -> float:
    return float(setting.baseline.refusal[setting.kept["harmless_val"]].mean())
