"""Two passes of the engine: what the model does by itself, and what each candidate does to it, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.directions import NULL_NORM
from refusal_direction.engine import Candidates, Engine, Kind, Row
from refusal_direction.metrics import kl_divergence, refusal_mass, refusal_score
from refusal_direction.processes import everywhere, share, summed
from refusal_direction.search import Cell, Measure
from refusal_direction.store import NOWHERE, Store

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from refusal_direction.engine.interventions import ResidualStream
    from refusal_direction.engine.layer_major import Tick
    from refusal_direction.models.refusal_tokens import RefusalTokens

__all__ = [
    "ALL",
    "Baseline",
    "Measure",
    "Scores",
    "intervention_rows",
    "kept_bytes",
    "measure_baseline",
    "null_candidates",
    "rows_of",
    "score_candidates",
]


@dataclass(frozen=True)
class Baseline:
    """What the model does without intervention."""

    refusal: Float[Tensor, "prompt"]
    """Refusal scores, in float64."""
    mass: Float[Tensor, "prompt"]
    """Probability of the refusal tokens."""
    activations: Float[Tensor, "prompt position layer d_model"]
    """The residual stream at the input of each layer at the end-of-instruction tokens, of the prompts observed."""
    logits: dict[int, Float[Tensor, "vocab"]]
    """Last-position logits of the prompts kept for the KL divergence."""


def kept_bytes(stream: ResidualStream, *, observed: int, n_positions: int, kept: int) -> int:
    """What a Baseline will hold: activations of so many observed prompts, and logits of those kept for the KL."""
    model = stream.skeleton.model
    activations = observed * n_positions * len(stream.layers) * stream.skeleton.d_model
    return (activations + kept * model.config.get_text_config().vocab_size) * model.dtype.itemsize


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
        """Of so many candidates alone."""
        return Scores(self.ablation[:count], self.steering[:count], self.kl[:count])

    def with_more(self, more: Scores) -> Scores:
        """These scores, and where they are NaN (not measured) those of `more`."""
        pairs = ((self.ablation, more.ablation), (self.steering, more.steering), (self.kl, more.kl))
        return Scores(*(torch.where(mine.isnan(), theirs, mine) for mine, theirs in pairs))


def measure_baseline(
    engine: Engine,
    tokens: RefusalTokens,
    n_positions: int,
    *,
    observed: Sequence[int],
    kept: Sequence[int],
    tick: Tick = lambda done: None,
    store: Store = NOWHERE,
) -> Baseline:
    """Sweep 1: every prompt once.

    Args:
        engine: holds the prompts.
        tokens: the refusal tokens.
        n_positions: how many positions, from the end, are looked at.
        observed: the prompts whose activations are wanted, in this order.
        kept: the prompts whose logits are wanted for the KL divergence.
        tick: receives progress.
        store: where an earlier run may have left the result, and where it is left.
    """
    stored = store.load("baseline")
    if everywhere(stored is not None) and stored is not None:
        engine.adopt("hooked" if stored["hooked"] else "layer-major")
        return _baseline(stored, kept)
    count, skeleton = len(engine.prompts), engine.stream.skeleton
    refusal, mass = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    place = {prompt: index for index, prompt in enumerate(observed)}
    logits_place = {prompt: index for index, prompt in enumerate(kept)}
    activations = torch.zeros(
        len(place), n_positions, len(engine.stream.layers), skeleton.d_model, dtype=skeleton.model.dtype
    )
    logits_kept = torch.zeros(len(logits_place), 0)

    def consume(rows: list[Row], logits: Tensor) -> None:
        nonlocal logits_kept
        prompts = [row.prompt for row in rows]
        refusal[prompts] = refusal_score(logits, tokens.ids).cpu().double()
        mass[prompts] = refusal_mass(logits, tokens.ids).cpu().double()
        if not logits_kept.numel():
            logits_kept = logits.new_zeros(len(logits_place), logits.shape[-1])
        ours = [index for index, prompt in enumerate(prompts) if prompt in logits_place]
        logits_kept[[logits_place[prompts[index]] for index in ours]] = logits[ours]

    def observe(layer: int, rows: list[Row], hidden: Tensor) -> None:
        ours = [index for index, row in enumerate(rows) if row.prompt in place]
        where = [place[rows[index].prompt] for index in ours]
        activations[where, :, layer] = hidden[ours, -n_positions:].to(activations)

    mine = share(range(count), engine.costs([Row(prompt) for prompt in range(count)], None))
    engine.baseline(consume, observe, tick, prompts=mine)
    results = ("refusal", "mass", "activations", "logits")
    part = dict(zip(results, summed(refusal, mass, activations, logits_kept), strict=True))
    part["hooked"] = torch.tensor(engine.name == "hooked")
    store.save("baseline", part)
    return _baseline(part, kept)


def _baseline(part: Mapping[str, Tensor], kept: Sequence[int]) -> Baseline:
    logits = dict(zip(kept, part["logits"], strict=True))
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
        (Measure.ABLATION, harmful, Kind.ABLATION),
        (Measure.KL, harmless, Kind.ABLATION),
        (Measure.STEERING, harmless, Kind.STEERING),
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


def rows_of(cells: Sequence[Cell], *, harmful: Sequence[int], harmless: Sequence[int]) -> list[Row]:
    """The rows that measure the cells of a search."""
    return [
        Row(
            (harmful if cell.measure is Measure.ABLATION else harmless)[cell.prompt],
            Kind.STEERING if cell.measure is Measure.STEERING else Kind.ABLATION,
            cell.candidate,
        )
        for cell in cells
    ]


def null_candidates(candidates: Candidates) -> Bool[Tensor, "candidate"]:
    """Which candidates have no length."""
    return candidates.vectors.norm(dim=-1) <= NULL_NORM


def score_candidates(
    engine: Engine,
    tokens: RefusalTokens,
    candidates: Candidates,
    rows: Sequence[Row],
    baseline: Baseline,
    kept: dict[str, list[int]],
    tick: Tick = lambda done: None,
    store: Store = NOWHERE,
) -> Scores:
    """Sweep 2: run `rows` and read off the scores of each candidate.

    Args:
        engine: holds the prompts.
        tokens: the refusal tokens.
        candidates: in (position, layer) order.
        rows: the `intervention_rows`. What they leave out is NaN; candidates of length zero have the baseline's scores.
        baseline: of the same prompts.
        kept: the validation prompts, "harmful_val" and "harmless_val".
        tick: receives progress.
        store: where earlier runs may have left results, and where they are left.
    """
    measured = _run_parts(engine, tokens, candidates, rows, baseline, tick, store)
    harmful = {prompt: index for index, prompt in enumerate(kept["harmful_val"])}
    harmless = {prompt: index for index, prompt in enumerate(kept["harmless_val"])}
    unmeasured = torch.where(null_candidates(candidates), 0.0, torch.nan).double().unsqueeze(1).cpu()
    ablation = unmeasured + baseline.refusal[list(harmful)]
    steering = unmeasured + baseline.refusal[list(harmless)]
    kl = unmeasured + torch.zeros(len(harmless), dtype=torch.float64)
    for row, (refusal, divergence) in zip(rows, measured.tolist(), strict=True):
        if row.kind is Kind.STEERING:
            steering[row.candidate, harmless[row.prompt]] = refusal
        elif row.prompt in harmful:
            ablation[row.candidate, harmful[row.prompt]] = refusal
        if row.kind is Kind.ABLATION and row.prompt in harmless:
            kl[row.candidate, harmless[row.prompt]] = divergence
    return Scores(ablation, steering, kl)


def _run_parts(
    engine: Engine,
    tokens: RefusalTokens,
    candidates: Candidates,
    rows: Sequence[Row],
    baseline: Baseline,
    tick: Tick,
    store: Store,
) -> Float[Tensor, "row 2"]:
    """Each row's refusal score, and where its prompt's logits were kept its KL divergence: of this and all other processes.

    Parts that an earlier run has finished are not run again.
    """
    place = {row: index for index, row in enumerate(rows)}
    measured = torch.zeros(len(rows), 2, dtype=torch.float64)

    def consume(some: list[Row], logits: Tensor) -> None:
        places = [place[row] for row in some]
        measured[places, 0] = refusal_score(logits, tokens.ids).cpu().double()
        compared = [i for i, row in enumerate(some) if row.kind is Kind.ABLATION and row.prompt in baseline.logits]
        if compared:
            before = torch.stack([baseline.logits[some[i].prompt] for i in compared]).to(logits.device)
            divergence = kl_divergence(before, logits[compared])
            measured[[places[i] for i in compared], 1] = divergence.cpu().double()

    for part in engine.parts(share(rows, engine.costs(rows, candidates))):
        key = store.key(candidates.vectors, [(row.prompt, row.kind.value, row.candidate) for row in part])
        places = [place[row] for row in part]
        if (stored := store.load(key)) is None:
            engine.intervene(part, candidates, consume, tick)
            store.save(key, {"measured": measured[places]})
        else:
            measured[places] = stored["measured"]
            tick(engine.work(part, candidates))
    return summed(measured)[0]
