"""A small instance of the method's problem on token ids, and the package's answer to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refusal_direction.candidates import Candidates
from refusal_direction.engine import Engine
from refusal_direction.engine.interventions import ResidualStream, ablated
from refusal_direction.methods import make_candidates
from refusal_direction.prompts.sets import SETS_FOR_SELECTION, Kind, PromptSet, Split, set_name
from refusal_direction.runtime.store import NO_CHECKPOINTS, CheckpointStore
from refusal_direction.scoring.baseline import Baseline, measure_baseline
from refusal_direction.scoring.requests import ScoringContext, measure, request_all
from refusal_direction.scoring.scores import Scores
from tests.families.building import Family, layers_of
from tests.families.sizes import VOCAB
from tests.oracles import reference, stream

Prompt = TypeVar("Prompt")

N_POSITIONS = 3
REFUSAL_TOKENS = (7, 11)
_END_OF_INSTRUCTION = [5, 9, 4]  # as a chat template would put there
_LENGTHS = (4, 7, 2, 9, 4, 6)  # shorter and longer than the sliding windows


@dataclass(frozen=True)
class Sets(ABC, Generic[Prompt]):
    """The four sets of prompts, of several lengths."""

    harmful_train: list[Prompt]
    harmless_train: list[Prompt]
    harmful_val: list[Prompt]
    harmless_val: list[Prompt]

    @staticmethod
    @abstractmethod
    def as_inputs(prompt: Prompt) -> dict[str, Tensor]:
        """The model's inputs: a batch of one, not padded."""

    @property
    def sets(self) -> dict[str, list[Prompt]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def inputs(self) -> list[dict[str, Tensor]]:
        """The model's inputs for every prompt, set after set."""
        return [self.as_inputs(prompt) for members in self.sets.values() for prompt in members]

    def indices(self) -> dict[PromptSet, list[int]]:
        """For each set, the indices of its prompts in `inputs`."""
        indices: dict[PromptSet, list[int]] = {}
        for which in SETS_FOR_SELECTION:
            begin = sum(map(len, indices.values()))
            indices[which] = list(range(begin, begin + len(self.sets[set_name(which)])))
        return indices


def as_inputs(prompt: list[int]) -> dict[str, Tensor]:
    """A batch of one, not padded."""
    ids = torch.tensor([prompt])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Problem(Sets[list[int]]):
    """Prompts are token ids."""

    as_inputs = staticmethod(as_inputs)


@dataclass(frozen=True)
class Answer:
    """What the package finds."""

    engine: Engine
    baseline: Baseline
    made: Candidates
    scores: Scores

    @property
    def candidates(self) -> Tensor:
        """[position, layer, d_model]"""
        return self.made.laid_out()


def make_problem(seed: int = 0, *, n_train: int = 5, n_val: int = 4, opening: Sequence[int] = (2, 6, 10)) -> Problem:
    """Random prompts that begin alike: the harmful ones are drawn from the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, low: int, high: int, shift: int) -> list[list[int]]:
        lengths = [_LENGTHS[(i + shift) % len(_LENGTHS)] for i in range(count)]
        bodies = [torch.randint(low, high, (length,), generator=generator).tolist() for length in lengths]
        return [[*opening, *body, *_END_OF_INSTRUCTION] for body in bodies]

    middle = VOCAB // 2
    return Problem(
        harmful_train=draw(n_train, middle, VOCAB, 0),
        harmless_train=draw(n_train, 12, middle, 1),
        harmful_val=draw(n_val, middle, VOCAB, 2),
        harmless_val=draw(n_val, 12, middle, 3),
    )


def engine_of(
    model: PreTrainedModel,
    problem: Sets[Any],
    batch_size: int | None = None,
    observed_tokens: int | None = N_POSITIONS,
    *,
    keep: bool = False,
) -> Engine:
    return Engine(
        ResidualStream(model), problem.inputs, batch_size=batch_size, observed_tokens=observed_tokens, keep=keep
    )


def solve(engine: Engine, problem: Sets[Any], store: CheckpointStore = NO_CHECKPOINTS) -> Answer:
    """Both passes of the package, as its pipeline runs them, with every prompt kept."""
    indices = problem.indices()
    train = {kind: indices[kind, Split.TRAIN] for kind in Kind}
    baseline = measure_baseline(
        engine,
        REFUSAL_TOKENS,
        n_positions=N_POSITIONS,
        activations_of=train[Kind.HARMFUL] + train[Kind.HARMLESS],
        logits_of=indices[Kind.HARMLESS, Split.VALIDATION],
        store=store,
    )
    candidates = make_candidates(["difference_of_means"], *(baseline.activations_at(train[kind]) for kind in Kind))
    context = ScoringContext(engine, REFUSAL_TOKENS, candidates, baseline, indices, store)
    return Answer(engine, baseline, candidates, score_all(context))


def score_all(context: ScoringContext) -> Scores:
    """Every score of every candidate, in one pass."""
    requests = request_all(context)
    return context.unmeasured().with_values(requests, measure(context, context.candidates, requests).tolist())


def known(model: PreTrainedModel, family: Family, writes: tuple[str, ...] | None = None) -> reference.Model:
    """The model as the reference implementation wants it: with the hand-written truth, or other writes."""
    return reference.Model(model, layers_of(model, family), writes or family.writes, family.needs_position_ids)


def solve_slowly(model: PreTrainedModel, family: Family, problem: Problem) -> reference.Report:
    """The reference implementation's answer to the same problem."""
    return reference.report(
        known(model, family), **problem.sets, refusal_tokens=REFUSAL_TOKENS, n_positions=N_POSITIONS
    )


def differences(answer: Answer, expected: reference.Report, problem: Sets[Any]) -> dict[str, float]:
    """The largest difference in each quantity; that of the candidates is relative to the largest of them."""
    indices, refusal = problem.indices(), answer.baseline.refusal
    pairs = {
        "harmful baseline": (refusal[indices[Kind.HARMFUL, Split.VALIDATION]], expected.baseline_harmful),
        "harmless baseline": (refusal[indices[Kind.HARMLESS, Split.VALIDATION]], expected.baseline_harmless),
        "ablation": (answer.scores.ablation, expected.ablation.flatten(0, 1)),
        "steering": (answer.scores.steering, expected.steering.flatten(0, 1)),
        "KL": (answer.scores.kl, expected.kl.flatten(0, 1)),
        "candidates": (
            answer.candidates / expected.candidates.abs().max(),
            expected.candidates / expected.candidates.abs().max(),
        ),
    }
    return {name: float((ours - theirs).abs().max()) for name, (ours, theirs) in pairs.items()}


def leak_of(model: PreTrainedModel, r: Tensor) -> float:
    """The largest share of the stream along r at any addition to it, while r is ablated."""
    layers = model.get_decoder().layers
    with torch.no_grad(), ablated(model, r), stream.followed(layers, r) as leaks:
        model(**as_inputs([5, 6, 7, 8, 9]), use_cache=False)
    assert len(leaks.additions) >= 2 * len(layers)
    return leaks.worst
