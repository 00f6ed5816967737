"""Two passes of the engine: what the model does by itself, and what each candidate does to it, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.directions import NULL_NORM
from refusal_direction.engine import Candidates, Engine, Kind, Row
from refusal_direction.metrics import kl_divergence, refusal_mass, refusal_score

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
) -> Baseline:
    """Sweep 1: every prompt once.

    Args:
        engine: holds the prompts.
        tokens: the refusal tokens.
        n_positions: how many positions, from the end, are looked at.
        observed: the prompts whose activations are wanted, in this order.
        kept: the prompts whose logits are wanted for the KL divergence.
        tick: receives progress.
    """
    count = len(engine.prompts)
    refusal, mass = (torch.full((count,), float("nan"), dtype=torch.float64) for _ in range(2))
    place = {prompt: index for index, prompt in enumerate(observed)}
    wanted = set(kept)
    logits_of: dict[int, Tensor] = {}
    activations = torch.empty(0)

    def consume(rows: list[Row], logits: Tensor) -> None:
        prompts = [row.prompt for row in rows]
        refusal[prompts] = refusal_score(logits, tokens.ids).cpu().double()
        mass[prompts] = refusal_mass(logits, tokens.ids).cpu().double()
        logits_of.update({prompt: logits[i].clone() for i, prompt in enumerate(prompts) if prompt in wanted})

    def observe(layer: int, rows: list[Row], hidden: Tensor) -> None:
        nonlocal activations
        if activations.numel() == 0:
            shape = (len(observed), n_positions, len(engine.stream.layers), hidden.shape[-1])
            activations = torch.empty(shape, dtype=hidden.dtype)
        ours = [index for index, row in enumerate(rows) if row.prompt in place]
        where = [place[rows[index].prompt] for index in ours]
        activations[where, :, layer] = hidden[ours, -n_positions:].cpu()

    engine.baseline(consume, observe, tick)
    return Baseline(refusal, mass, activations, logits_of)


class Measure(Enum):
    """What a candidate is scored by."""

    ABLATION = "ablation"
    KL = "kl"
    STEERING = "steering"


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
    """
    harmful = {prompt: index for index, prompt in enumerate(kept["harmful_val"])}
    harmless = {prompt: index for index, prompt in enumerate(kept["harmless_val"])}
    unmeasured = torch.where(null_candidates(candidates), 0.0, torch.nan).double().unsqueeze(1).cpu()
    ablation = unmeasured + baseline.refusal[list(harmful)]
    steering = unmeasured + baseline.refusal[list(harmless)]
    kl = unmeasured + torch.zeros(len(harmless), dtype=torch.float64)

    def consume(rows: list[Row], logits: Tensor) -> None:
        for row, score in zip(rows, refusal_score(logits, tokens.ids).tolist(), strict=True):
            if row.kind is Kind.STEERING:
                steering[row.candidate, harmless[row.prompt]] = score
            elif row.prompt in harmful:
                ablation[row.candidate, harmful[row.prompt]] = score
        compared = [i for i, row in enumerate(rows) if row.kind is Kind.ABLATION and row.prompt in harmless]
        if compared:
            before = torch.stack([baseline.logits[rows[i].prompt] for i in compared]).to(logits.device)
            for i, value in zip(compared, kl_divergence(before, logits[compared]).tolist(), strict=True):
                kl[rows[i].candidate, harmless[rows[i].prompt]] = value

    engine.intervene(rows, candidates, consume, tick)
    return Scores(ablation, steering, kl)
