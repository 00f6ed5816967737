"""Pass 2: requests for scores become rows of the engine, and their logits scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.candidates import Candidates
from refusal_direction.engine import Engine, Intervention, Row, Tick, silent
from refusal_direction.prompts.sets import Kind, PromptSet, Split
from refusal_direction.runtime.log import RunLog
from refusal_direction.runtime.processes import all_sum, share
from refusal_direction.runtime.store import NO_CHECKPOINTS, CheckpointStore, Part
from refusal_direction.scoring.baseline import Baseline
from refusal_direction.scoring.metrics import Measure, kl_divergence, refusal_score
from refusal_direction.scoring.scores import ScoreRequest, Scores

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["MEASURED_ON", "ScoringContext", "measure", "request_all"]

MEASURED_ON = {Measure.ABLATION: Kind.HARMFUL, Measure.KL: Kind.HARMLESS, Measure.STEERING: Kind.HARMLESS}
"""The kind of validation prompts of each measure."""
_INTERVENTIONS = tuple(Intervention)


@dataclass(frozen=True, eq=False)
class ScoringContext:
    """Inputs of candidate scores."""

    engine: Engine
    tokens: Sequence[int]
    """Ids of the refusal tokens."""
    candidates: Candidates
    baseline: Baseline
    kept: Mapping[PromptSet, Sequence[int]]
    """The prompts of each set that the filter has left."""
    store: CheckpointStore = NO_CHECKPOINTS
    log: RunLog = field(default_factory=RunLog)

    def prompts(self, kind: Kind) -> Sequence[int]:
        """The validation prompts of a kind."""
        return self.kept[kind, Split.VALIDATION]

    def refusal(self, kind: Kind) -> Float[Tensor, "prompt"]:
        """Baseline refusal scores of the validation prompts of a kind."""
        return self.baseline.refusal[list(self.prompts(kind))]

    def train_activations(self, kind: Kind) -> Float[Tensor, "prompt position layer d_model"]:
        """Activations of the training prompts of a kind."""
        return self.baseline.activations_at(self.kept[kind, Split.TRAIN])

    def row(self, request: ScoreRequest) -> Row:
        """The row of the engine that measures a score."""
        prompt = self.prompts(MEASURED_ON[request.measure])[request.prompt]
        steered = request.measure is Measure.STEERING
        return Row(prompt, Intervention.STEERING if steered else Intervention.ABLATION, request.candidate)

    def unmeasured(self) -> Scores:
        """The scores before any has been measured."""
        return Scores.unmeasured(self.candidates.zero, self.refusal(Kind.HARMFUL), self.refusal(Kind.HARMLESS))


def request_all(
    context: ScoringContext, measures: Iterable[Measure] = tuple(Measure), among: Sequence[int] | None = None
) -> list[ScoreRequest]:
    """Requests for all scores of the candidates (all, or those in `among`) by some measures.

    Candidates of length zero are left out. Every prompt has the same embedding at an end-of-instruction token, so layer 0
    often gives such candidates; they change nothing, and their scores are the baseline's.
    """
    zero, wanted = context.candidates.zero.tolist(), set(measures)
    return [
        ScoreRequest(candidate, measure, prompt)
        for candidate in (range(len(zero)) if among is None else among)
        if not zero[candidate]
        for measure in Measure
        if measure in wanted
        for prompt in range(len(context.prompts(MEASURED_ON[measure])))
    ]


def measure(
    context: ScoringContext, candidates: Candidates, requests: Sequence[ScoreRequest], tick: Tick = silent
) -> Float[Tensor, "request"]:
    """Run the rows of distinct requests, and read off their scores, in float64.

    Args:
        context: the prompts, the baseline and the engine.
        candidates: the candidates that requests refer to; they may be others than the context's.
        requests: the scores to measure.
        tick: receives progress.
    """
    measured = _run(context, candidates, [context.row(request) for request in requests], tick)
    is_kl = torch.tensor([request.measure is Measure.KL for request in requests], dtype=torch.bool)
    return torch.where(is_kl, measured[:, 1], measured[:, 0])


def _run(context: ScoringContext, candidates: Candidates, rows: Sequence[Row], tick: Tick) -> Float[Tensor, "row 2"]:
    """Refusal score of each row, and KL divergence if its prompt's logits are known; gathered from all processes.

    Rows that an interrupted run has finished are not run again, even if it divided them into other passes, which depends on
    free memory.
    """
    engine, store = context.engine, context.store
    place = {row: index for index, row in enumerate(rows)}
    measured, n_processes = torch.zeros(len(rows), 2, dtype=torch.float64), torch.zeros(len(rows))

    def consume(some: list[Row], logits: Tensor) -> None:
        measured[[place[row] for row in some]] = _read(context, some, logits)

    mine = share(rows, engine.costs(rows, candidates))
    n_processes[[place[row] for row in mine]] = 1
    group = store.key(candidates.vectors)
    found = _resumed(context, group, mine)
    if found:
        measured[[place[row] for row in found]] = torch.stack(list(found.values()))
        tick(engine.work(list(found), candidates))
    for rows_of_pass in engine.passes(mine):
        if left := [row for row in rows_of_pass if row not in found]:
            with context.log.part() as record:
                engine.intervene(left, candidates, consume, tick=tick)
            numbers = torch.tensor([_as_numbers(row) for row in left])
            tensors = {"rows": numbers, "measured": measured[[place[row] for row in left]]}
            part = Part(tensors, record.seconds, engine.leak, tuple(record.warnings))
            store.save(f"{group}-{store.key(numbers)}", part)
    measured, n_processes = all_sum(measured, n_processes)
    assert bool((n_processes == 1).all()), "processes disagree on which of them runs a row"
    return measured


def _read(context: ScoringContext, rows: Sequence[Row], logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row 2"]:
    read = torch.zeros(len(rows), 2, dtype=torch.float64)
    read[:, 0] = refusal_score(logits, tuple(context.tokens)).cpu().double()
    known = context.baseline.logits
    compared = [i for i, row in enumerate(rows) if row.intervention is Intervention.ABLATION and row.prompt in known]
    if compared:
        before = torch.stack([known[rows[i].prompt] for i in compared]).to(logits.device)
        read[compared, 1] = kl_divergence(before, logits[compared]).cpu().double()
    return read


def _resumed(context: ScoringContext, group: str, rows: Sequence[Row]) -> dict[Row, Tensor]:
    """The rows that an interrupted run has measured."""
    wanted, found = set(rows), {}
    for part in context.store.load_all(group):
        measured = dict(zip(map(_as_row, part.tensors["rows"].tolist()), part.tensors["measured"], strict=True))
        used = {row: values for row, values in measured.items() if row in wanted}
        if used:
            context.log.resume(part, len(used) / len(measured))
        found.update(used)
    return found


def _as_numbers(row: Row) -> tuple[int, int, int]:
    return row.prompt, _INTERVENTIONS.index(row.intervention), row.candidate


def _as_row(numbers: Sequence[int]) -> Row:
    prompt, intervention, candidate = numbers
    return Row(prompt, _INTERVENTIONS[intervention], candidate)
