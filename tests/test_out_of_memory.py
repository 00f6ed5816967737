"""Out of memory, the engine goes on with fewer rows, or says what would help."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.engine.hooked import Hooked
from refusal_direction.engine.rows import LengthGroup
from refusal_direction.engine.skeleton import Skeleton
from refusal_direction.errors import OutOfMemoryError
from tests.families import FAMILIES, build
from tests.passes import TOLERANCE, Logits, baseline_of, candidates, every_row, farthest, intervened
from tests.problems import Problem, engine_of, make_problem, solve


@pytest.fixture
def problem() -> Problem:
    return make_problem()


def _refuses_more_rows_than(layer: nn.Module, most: int) -> list[int]:
    """Let a layer run out of memory above so many rows; returns the rows it was called with."""
    own, asked = layer.forward, []

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(hidden.shape[0])
        if hidden.shape[0] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")
        return own(hidden, *args, **kwargs)

    layer.forward = forward  # type: ignore[method-assign]
    return asked


def _scores(model: PreTrainedModel, engine: Engine, problem: Problem) -> Tensor:
    scores = solve(engine, problem).scores
    return torch.cat([scores.ablation, scores.steering, scores.kl], dim=1)


def test_out_of_memory_halves_the_rows_says_so_and_gives_the_same_scores(
    problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(FAMILIES["llama"])
    expected = _scores(model, engine_of(model, problem), problem)
    engine = engine_of(model, problem, batch_size=16)
    asked = _refuses_more_rows_than(engine.stream.layers[1], 5)
    assert torch.allclose(_scores(model, engine, problem), expected, atol=TOLERANCE, rtol=0)
    assert max(asked) > 5
    assert max(rows for rows in asked if rows <= 5) > 1  # not at once the least there is
    assert asked[-1] <= 5
    assert "half" in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_out_of_memory_in_the_head_halves_the_rows_too(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(FAMILIES["llama"])
    expected = _scores(model, engine_of(model, problem), problem)
    own = Skeleton.tail

    def tail(self: Skeleton, hidden: Tensor, token: int) -> Tensor:
        if hidden.shape[0] > 6:
            raise RuntimeError("CUDA out of memory. Tried to allocate 7 bytes.")
        return own(self, hidden, token)

    monkeypatch.setattr(Skeleton, "tail", tail)
    assert torch.allclose(_scores(model, engine_of(model, problem), problem), expected, atol=TOLERANCE, rtol=0)
    assert "half" in caplog.text


def test_out_of_memory_for_the_hidden_states_is_an_error_with_a_remedy(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, given = engine_of(build(FAMILIES["llama"]), problem), candidates(2)

    def enter(self: LengthGroup, layer: int, embedded: Tensor, at_once: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")

    monkeypatch.setattr(LengthGroup, "enter", enter)
    with pytest.raises(OutOfMemoryError, match="the hidden states of all rows together.*Use a smaller model"):
        engine.intervene(every_row(problem, given), given, Logits())


def test_out_of_memory_with_one_row_is_an_error_with_a_remedy(problem: Problem) -> None:
    engine, given = engine_of(build(FAMILIES["llama"]), problem, batch_size=8), candidates(2)
    _refuses_more_rows_than(engine.stream.layers[1], 0)
    with pytest.raises(OutOfMemoryError, match="single row.*--dtype"):
        engine.intervene(every_row(problem, given), given, Logits())


def test_first_pass_out_of_memory_with_one_row_is_an_error_with_a_remedy(problem: Problem) -> None:
    engine = engine_of(build(FAMILIES["llama"]), problem, batch_size=8)
    _refuses_more_rows_than(engine.stream.layers[1], 0)
    with pytest.raises(OutOfMemoryError, match="single row.*--dtype"):
        baseline_of(engine)


def test_out_of_memory_in_the_embedding_halves_the_rows_too(problem: Problem) -> None:
    model = build(FAMILIES["llama"])
    expected = _scores(model, engine_of(model, problem), problem)
    asked = _refuses_more_rows_than(model.get_input_embeddings(), 3)
    assert torch.allclose(_scores(model, engine_of(model, problem), problem), expected, atol=TOLERANCE, rtol=0)
    assert max(asked) > 3  # and so it was halved


def test_out_of_memory_never_tries_the_same_rows_again(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    """Three rows are far fewer than the limit: half of them is one, not half of the limit."""
    engine, given = engine_of(build(FAMILIES["llama"]), problem), candidates(3)
    asked = _refuses_more_rows_than(engine.stream.layers[1], 2)
    intervened(engine, [Row(0, Intervention.ABLATION, candidate) for candidate in range(3)], given)
    assert asked.count(3) == 1
    assert "3 rows" in caplog.text


def test_hooked_engine_halves_the_rows_too(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    engine, given = engine_of(build(FAMILIES["llama"]), problem, batch_size=8), candidates(2)
    rows = every_row(problem, given)
    hooked = Hooked(engine.stream, problem.inputs, engine.budget)
    expected = intervened(hooked, rows, given)
    _refuses_more_rows_than(engine.stream.layers[1], 3)
    assert farthest(intervened(hooked, rows, given), expected) < TOLERANCE
    assert "half" in caplog.text


def test_other_errors_of_a_layer_are_not_taken_for_lack_of_memory(
    problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    engine, given = engine_of(build(FAMILIES["llama"]), problem), candidates(2)

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    engine.stream.layers[1].forward = forward  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        engine.intervene(every_row(problem, given), given, Logits())
    assert not caplog.records


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_no_more_rows_than_batch_size_go_through_a_layer_at_once(batch_size: int, problem: Problem) -> None:
    engine = engine_of(build(FAMILIES["llama"]), problem, batch_size)
    asked = _refuses_more_rows_than(engine.stream.layers[1], 10**6)
    solve(engine, problem)
    assert max(asked) == batch_size
