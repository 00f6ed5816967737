"""Two passes of the engine: what the model does by itself, and what each candidate does to it, prompt by prompt."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.candidates import Candidates
from refusal_direction.directions import NULL_NORM
from refusal_direction.engine import Engine, Intervention, Row, Tick, silent
from refusal_direction.runtime.processes import all_ranks, all_sum, share
from refusal_direction.runtime.store import NO_CHECKPOINTS, CheckpointStore
from refusal_direction.scoring.metrics import Measure, kl_divergence, refusal_probability, refusal_score
from refusal_direction.selection.pruned.search import ScoreRequest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from refusal_direction.engine.interventions import ResidualStream
    from refusal_direction.models.refusal_tokens import RefusalTokens

__all__ = [
    "ALL",
    "Baseline",
    "Scores",
    "ScoringContext",
    "baseline_bytes",
    "intervention_rows",
    "measure_baseline",
    "measure_of",
    "null_candidates",
    "rows_of",
    "score_candidates",
]


_KINDS = tuple(Intervention)


@dataclass(frozen=True)
class Baseline:
    """What the model does without intervention."""

    refusal: Float[Tensor, "prompt"]
    """Refusal scores, in float64."""
    mass: Float[Tensor, "prompt"]
    """Probability of the refusal tokens."""
    activations: Float[Tensor, "prompt position layer d_model"]
    """The residual stream at the input of each layer at the end-of-instruction tokens, of the prompts that candidates are made from."""
    logits: dict[int, Float[Tensor, "vocab"]]
    """Last-position logits of the prompts that the KL divergence is measured on, by their index."""


def baseline_bytes(stream: ResidualStream, *, n_activations: int, n_positions: int, n_logits: int) -> int:
    """What a Baseline will hold: the activations of so many prompts, and the logits of so many."""
    model = stream.skeleton.model
    activations = n_activations * n_positions * len(stream.layers) * stream.skeleton.d_model
    return (activations + n_logits * model.config.get_text_config().vocab_size) * model.dtype.itemsize


@dataclass(frozen=True)
class ScoringContext:
    """What candidates are scored in, and what a choice is made from."""

    engine: Engine
    tokens: RefusalTokens
    candidates: Float[Tensor, "position layer d_model"]
    baseline: Baseline
    kept: dict[str, list[int]]
    """For each set, the prompts that the filter left."""
    store: CheckpointStore = NO_CHECKPOINTS
    """Where earlier runs may have left results, and where they are left."""

    @property
    def flat(self) -> Candidates:
        """The candidates in (position, layer) order."""
        return Candidates.from_grid(self.candidates, "difference_of_means")

    @property
    def validation(self) -> dict[str, list[int]]:
        """The validation prompts."""
        return {"harmful": self.kept["harmful_val"], "harmless": self.kept["harmless_val"]}


@dataclass(frozen=True)
class Scores:
    """What each candidate does, prompt by prompt, in float64. Candidates are in (position, layer) order."""

    ablation: Float[Tensor, "candidate harmful"]
    """Refusal scores of the harmful validation prompts under directional ablation."""
    steering: Float[Tensor, "candidate harmless"]
    """Refusal scores of the harmless validation prompts under activation addition."""
    kl: Float[Tensor, "candidate harmless"]
    """KL divergence of the harmless validation prompts under directional ablation, in nats."""

    def of(self, measure: Measure) -> Float[Tensor, "candidate prompt"]:
        """The scores by one measure."""
        return {Measure.ABLATION: self.ablation, Measure.KL: self.kl, Measure.STEERING: self.steering}[measure]

    def first(self, count: int) -> Scores:
        """The scores of the first `count` candidates."""
        return Scores(self.ablation[:count], self.steering[:count], self.kl[:count])

    def with_more(self, more: Scores) -> Scores:
        """These scores, and where they are NaN (not measured) those of `more`."""
        pairs = ((self.ablation, more.ablation), (self.steering, more.steering), (self.kl, more.kl))
        return Scores(*(torch.where(mine.isnan(), theirs, mine) for mine, theirs in pairs))


def measure_baseline(
    engine: Engine,
    tokens: RefusalTokens,
    *,
    n_positions: int,
    activations_of: Sequence[int],
    logits_of: Sequence[int],
    tick: Tick = silent,
    store: CheckpointStore = NO_CHECKPOINTS,
) -> Baseline:
    """Sweep 1: every prompt once.

    Args:
        engine: holds the prompts.
        tokens: the refusal tokens.
        n_positions: how many positions, from the end, are looked at.
        activations_of: the prompts whose activations are wanted, in this order.
        logits_of: the prompts whose logits are wanted for the KL divergence.
        tick: receives progress.
        store: where an earlier run may have left the result, and where it is left.
    """
    if (stored := _stored_baseline(engine, store)) is not None:
        return _baseline(stored, logits_of)
    count, skeleton = len(engine.prompts), engine.stream.skeleton
    refusal, mass = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    place = {prompt: index for index, prompt in enumerate(activations_of)}
    logits_place = {prompt: index for index, prompt in enumerate(logits_of)}
    activations = torch.zeros(
        len(place), n_positions, len(engine.stream.layers), skeleton.d_model, dtype=skeleton.model.dtype
    )
    logits_kept = torch.zeros(len(logits_place), 0)

    def consume(rows: list[Row], logits: Tensor) -> None:
        nonlocal logits_kept
        if not logits_kept.numel():
            logits_kept = logits.new_zeros(len(logits_place), logits.shape[-1])
        prompts = [row.prompt for row in rows]
        refusal[prompts] = refusal_score(logits, tokens.ids).cpu().double()
        mass[prompts] = refusal_probability(logits, tokens.ids).cpu().double()
        ours = [index for index, prompt in enumerate(prompts) if prompt in logits_place]
        logits_kept[[logits_place[prompts[index]] for index in ours]] = logits[ours]

    def observe(layer: int, rows: list[Row], hidden: Tensor) -> None:
        ours = [index for index, row in enumerate(rows) if row.prompt in place]
        where = [place[rows[index].prompt] for index in ours]
        activations[where, :, layer] = hidden[ours, -n_positions:].to(activations)

    mine = share(range(count), engine.costs([Row(prompt) for prompt in range(count)], None))
    engine.baseline(consume, observe, tick, prompts=mine or [0])
    if not mine:  # a prompt of another process has shown what logits look like
        for seen in (refusal, mass, activations, logits_kept):
            seen.zero_()
    if not all_ranks(engine.name == "layer-major"):
        engine.adopt("hooked", "Run layer by layer, the model went astray in another process.")
    results = ("refusal", "mass", "activations", "logits")
    part = dict(zip(results, all_sum(refusal, mass, activations, logits_kept), strict=True))
    part["hooked"] = torch.tensor(engine.name == "hooked")
    store.save("baseline", part)
    return _baseline(part, logits_of)


def _stored_baseline(engine: Engine, store: CheckpointStore) -> Mapping[str, Tensor] | None:
    """What an earlier run has left, if every process finds it; the engine is then the one that was used."""
    stored = store.load("baseline")
    if not all_ranks(stored is not None) or stored is None:
        return None
    engine.adopt("hooked" if stored["hooked"] else "layer-major", "An earlier part of this run was done so.")
    return stored


def _baseline(part: Mapping[str, Tensor], logits_of: Sequence[int]) -> Baseline:
    logits = dict(zip(logits_of, part["logits"], strict=True))
    return Baseline(part["refusal"], part["mass"], part["activations"], logits)


ALL = frozenset(Measure)


def intervention_rows(
    candidates: Candidates,
    *,
    harmful: Sequence[int],
    harmless: Sequence[int],
    measures: frozenset[Measure] = ALL,
    among: Sequence[int] | None = None,
) -> list[Row]:
    """What sweep 2 runs: the candidates (all, or those `among`) on the validation prompts that the measures need.

    Candidates of length zero need not be run. Every prompt has the same embedding at an end-of-instruction token, so
    layer 0 often gives such candidates. They change nothing, and their scores are the baseline's.
    """
    needs = (
        (Measure.ABLATION, harmful, Intervention.ABLATION),
        (Measure.KL, harmless, Intervention.ABLATION),
        (Measure.STEERING, harmless, Intervention.STEERING),
    )
    null = null_candidates(candidates)
    return [
        Row(prompt, kind, candidate)
        for candidate in (range(len(candidates.layers)) if among is None else among)
        if not null[candidate]
        for measure, prompts, kind in needs
        if measure in measures
        for prompt in prompts
    ]


def rows_of(cells: Sequence[ScoreRequest], *, harmful: Sequence[int], harmless: Sequence[int]) -> list[Row]:
    """The rows that measure the cells of a search."""
    return [
        Row(
            (harmful if cell.measure is Measure.ABLATION else harmless)[cell.prompt],
            Intervention.STEERING if cell.measure is Measure.STEERING else Intervention.ABLATION,
            cell.candidate,
        )
        for cell in cells
    ]


def null_candidates(candidates: Candidates) -> Bool[Tensor, "candidate"]:
    """Which candidates have no length."""
    return candidates.vectors.norm(dim=-1) <= NULL_NORM


def measure_of(row: Row, harmful: Container[int]) -> Measure:
    """What an intervention's row is run for: it follows from what is done to which kind of prompt."""
    if row.kind is Intervention.STEERING:
        return Measure.STEERING
    return Measure.ABLATION if row.prompt in harmful else Measure.KL


def score_candidates(
    setting: ScoringContext, candidates: Candidates, *, rows: Sequence[Row], tick: Tick = silent
) -> Scores:
    """Sweep 2: run `rows` and read off the scores of each candidate.

    Args:
        setting: what they are scored in.
        candidates: in (position, layer) order; any, not only those of the setting.
        rows: the `intervention_rows`. What they leave out is NaN; candidates of length zero have the baseline's scores.
        tick: receives progress.
    """
    measured = _run_parts(setting, candidates, rows=rows, tick=tick)
    harmful, harmless = ({p: i for i, p in enumerate(prompts)} for prompts in setting.validation.values())
    unmeasured = torch.where(null_candidates(candidates), 0.0, torch.nan).double().unsqueeze(1).cpu()
    refusal = setting.baseline.refusal
    scores = Scores(
        ablation=unmeasured + refusal[list(harmful)],
        steering=unmeasured + refusal[list(harmless)],
        kl=unmeasured + torch.zeros(len(harmless), dtype=torch.float64),
    )
    for row, (refusing, divergence) in zip(rows, measured.tolist(), strict=True):
        measure = measure_of(row, harmful)
        place = (harmful if measure is Measure.ABLATION else harmless)[row.prompt]
        scores.of(measure)[row.candidate, place] = divergence if measure is Measure.KL else refusing
    return scores


def _run_parts(
    setting: ScoringContext, candidates: Candidates, *, rows: Sequence[Row], tick: Tick
) -> Float[Tensor, "row 2"]:
    """Each row's refusal score, and where its prompt's logits are known its KL divergence: of this and all other processes.

    Rows that an earlier run has finished are not run again, however it was cut into parts: that depends on free memory.
    """
    engine, baseline, store = setting.engine, setting.baseline, setting.store
    place = {row: index for index, row in enumerate(rows)}
    measured, n_processes = torch.zeros(len(rows), 2, dtype=torch.float64), torch.zeros(len(rows))

    def consume(some: list[Row], logits: Tensor) -> None:
        places = [place[row] for row in some]
        measured[places, 0] = refusal_score(logits, setting.tokens.ids).cpu().double()
        compared = [
            i for i, row in enumerate(some) if row.kind is Intervention.ABLATION and row.prompt in baseline.logits
        ]
        if compared:
            before = torch.stack([baseline.logits[some[i].prompt] for i in compared]).to(logits.device)
            divergence = kl_divergence(before, logits[compared])
            measured[[places[i] for i in compared], 1] = divergence.cpu().double()

    mine = share(rows, engine.costs(rows, candidates))
    n_processes[[place[row] for row in mine]] = 1
    group = store.key(candidates.vectors)
    known: dict[Row, Tensor] = {}
    for kept in store.load_all(group):
        known |= dict(zip(map(_as_row, kept["rows"].tolist()), kept["measured"], strict=True))
    if found := [row for row in mine if row in known]:
        measured[[place[row] for row in found]] = torch.stack([known[row] for row in found])
        tick(engine.work(found, candidates))
    for part in engine.parts(mine):
        if left := [row for row in part if row not in known]:
            engine.intervene(left, candidates, consume, tick=tick)
            ran = torch.tensor([_as_numbers(row) for row in left])
            store.save(f"{group}-{store.key(ran)}", {"rows": ran, "measured": measured[[place[row] for row in left]]})
    measured, n_processes = all_sum(measured, n_processes)
    assert bool((n_processes == 1).all()), "processes disagree on who runs what"
    return measured


def _as_numbers(row: Row) -> tuple[int, int, int]:
    return row.prompt, _KINDS.index(row.kind), row.candidate


def _as_row(numbers: Sequence[int]) -> Row:
    prompt, kind, candidate = numbers
    return Row(prompt, _KINDS[kind], candidate)
