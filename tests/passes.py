"""Rows of a small problem, run by an engine, and their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from refusal_direction.candidates import Candidates
from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.engine.hooked import Hooked
from refusal_direction.engine.layer_major import LayerMajor
from tests.candidates import at_layers
from tests.families import D_MODEL, N_LAYERS
from tests.problems import Problem

TOLERANCE = 2e-5
"""On logits of a few units, in float32; rows in other company round differently."""


def candidates(count: int = 5, seed: int = 1) -> Candidates:
    """Random directions of layers 0, 1, 2, ..."""
    vectors = torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return at_layers(vectors, tuple(index % N_LAYERS for index in range(count)))


def every_row(problem: Problem, given: Candidates) -> list[Row]:
    """Every prompt under ablation and steering by every candidate."""
    return [
        Row(prompt, kind, candidate)
        for candidate in range(len(given.layers))
        for kind in (Intervention.ABLATION, Intervention.STEERING)
        for prompt in range(len(problem.inputs))
    ]


class Logits(dict[Row, Tensor]):
    """Collects what an engine hands out; each row must come once."""

    def __call__(self, rows: Sequence[Row], logits: Tensor) -> None:
        for row, its_logits in zip(rows, logits, strict=True):
            assert row not in self, f"{row} came twice"
            self[row] = its_logits.clone()


def intervened(engine: Engine | LayerMajor | Hooked, rows: Sequence[Row], given: Candidates) -> Logits:
    logits = Logits()
    if isinstance(engine, Engine):
        engine.intervene(rows, given, logits)
    else:
        engine.run(rows, consume=logits, candidates=given)
    assert set(logits) == set(rows)
    return logits


def baseline_of(engine: Engine) -> Logits:
    logits = Logits()
    engine.baseline(logits, lambda layer, rows, hidden: None)
    return logits


def farthest(some: dict[Row, Tensor], others: dict[Row, Tensor]) -> float:
    """Largest difference, over the rows that both have, relative to the largest logit of the row."""
    common = some.keys() & others.keys()
    assert common
    return max(float((some[row] - others[row]).abs().max() / others[row].abs().max()) for row in common)
