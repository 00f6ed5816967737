"""What the package does with a family, beside what a slow oracle does that knows only where the layers are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.engine.interventions import ResidualStream, ablated
from refusal_direction.errors import UnsupportedModelError
from refusal_direction.prompts.sets import Kind, Split
from tests.candidates import at_layers
from tests.families.building import Family, build, layers_of
from tests.families.sizes import is_installed
from tests.families.tables import TEXT_FAMILIES, VISION_FAMILIES
from tests.families.vision import VisionFamily, build_vision
from tests.oracles import one_by_one, reference, stream
from tests.problems import N_POSITIONS, REFUSAL_TOKENS, Answer, Sets, make_problem, solve
from tests.vision_problems import make_vision_problem

__all__ = ["Finding", "examine", "is_there", "row_names"]

_N_PROMPTS = 2  # of each set


@dataclass(frozen=True)
class Finding:
    """What was seen. Where the package refused, nothing but why."""

    refusal: str = ""
    engine: str = ""
    """Which engine ran: "layer-major" or "hooked"."""
    writes: tuple[tuple[str, ...], ...] = ()
    """What was found to write into the stream, of each kind of layer, in the order of the layers."""
    difference: float = 0.0
    """The largest difference from the oracle's scores and (relative to the largest) candidates."""
    moved: float = 0.0
    """How far an intervention that changes least moves the oracle's scores: the control of `difference`."""
    leak: float = 0.0
    """The largest share of the stream along the ablated direction, after any addition in `ablated` and in the engine."""
    plain: float = 0.0
    """The smallest such share of the stream as it is: the control of `leak`."""


def row_names() -> list[tuple[str, str]]:
    """The rows of the matrix: ("text" or "vision", name)."""
    return [("text", name) for name in TEXT_FAMILIES] + [("vision", name) for name in VISION_FAMILIES]


def is_there(kind: str, name: str) -> bool:
    """Whether the installed transformers has what the row needs."""
    if kind == "text":
        return is_installed(TEXT_FAMILIES[name].model_type)
    family = VISION_FAMILIES[name]
    return is_installed(family.model_type) and is_installed(family.text)


@cache
def examine(kind: str, name: str) -> Finding:
    """Build one row's model and look at it from both sides."""
    if kind == "text":
        text = TEXT_FAMILIES[name]
        return _examine(build(text), text, make_problem(n_train=_N_PROMPTS, n_val=_N_PROMPTS))
    vision = VISION_FAMILIES[name]
    problem = make_vision_problem(vision, n_train=_N_PROMPTS, n_val=_N_PROMPTS)
    return _examine(build_vision(vision), vision, problem)


def _examine(model: PreTrainedModel, family: Family | VisionFamily, problem: Sets[Any]) -> Finding:
    try:
        residual = ResidualStream(model)
        engine = Engine(residual, problem.inputs, batch_size=6, observed_tokens=N_POSITIONS)
        answer = solve(engine, problem)
    except UnsupportedModelError as error:
        return Finding(refusal=str(error))
    known = reference.Model(model, layers_of(model, family), family.writes)
    difference, moved = _compared(answer, known, family.norms, problem)
    u = torch.randn(residual.skeleton.d_model, generator=torch.Generator().manual_seed(1))
    following = partial(stream.followed, known.layers, u, family.norms)
    with following() as plain:
        one_by_one.logits_of(known, problem.inputs[:1])
    return Finding(
        engine=engine.name,
        writes=tuple(dict.fromkeys(tuple(site.module for site in writes) for writes in residual.writes)),
        difference=difference,
        moved=moved,
        leak=max(_leak_of_ablated(known, u, following, problem), _leak_of_engine(engine, u, following)),
        plain=min(plain.additions),
    )


def _compared(
    answer: Answer, known: reference.Model, norms: tuple[str, ...], problem: Sets[Any]
) -> tuple[float, float]:
    """The largest difference from the oracle, on one candidate of each layer; and the least movement of its scores."""
    n_layers, indices = len(known.layers), problem.indices()
    among = [(layer % N_POSITIONS, layer) for layer in range(1, n_layers)]
    expected = one_by_one.report(
        known,
        **{name: list(map(problem.as_inputs, prompts)) for name, prompts in problem.sets.items()},
        refusal_tokens=REFUSAL_TOKENS,
        n_positions=N_POSITIONS,
        ablated=partial(stream.purged, known.layers, norms=norms),
        among=among,
    )
    chosen = [position * n_layers + layer for position, layer in among]
    scored = [
        (ours[chosen], theirs.flatten(0, 1)[chosen], baseline)
        for ours, theirs, baseline in (
            (answer.scores.ablation, expected.ablation, expected.baseline_harmful),
            (answer.scores.steering, expected.steering, expected.baseline_harmless),
            (answer.scores.kl, expected.kl, torch.zeros(1)),
        )
    ]
    size, refusal = expected.candidates.abs().max(), answer.baseline.refusal
    pairs = [
        (answer.candidates / size, expected.candidates / size),
        (refusal[indices[Kind.HARMFUL, Split.VALIDATION]], expected.baseline_harmful),
        (refusal[indices[Kind.HARMLESS, Split.VALIDATION]], expected.baseline_harmless),
        *((ours, theirs) for ours, theirs, _ in scored),
    ]
    moved = min(float((theirs - baseline).abs().amax(-1).min()) for _, theirs, baseline in scored)
    return max(_farthest(ours, theirs) for ours, theirs in pairs), moved


def _farthest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max().nan_to_num(torch.inf))


Following = partial[AbstractContextManager[stream.Leaks]]


def _leak_of_ablated(known: reference.Model, u: Tensor, following: Following, problem: Sets[Any]) -> float:
    with ablated(known.module, u), following() as leaks:
        one_by_one.logits_of(known, problem.inputs[:1])
    return leaks.worst


def _leak_of_engine(engine: Engine, u: Tensor, following: Following) -> float:
    rows = [Row(prompt, Intervention.ABLATION, 0) for prompt in range(len(engine.prompts))]
    with following() as leaks:
        engine.intervene(rows, at_layers(u.unsqueeze(0), (1,)), lambda rows, logits: None)
    return leaks.worst
