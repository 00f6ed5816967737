"""What goes wrong in the engine is noticed: it falls back to hooked forwards, or ends with an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.layer_major import LayerMajor
from refusal_direction.engine.rows import LengthGroup
from refusal_direction.engine.skeleton import Skeleton
from refusal_direction.errors import UnsupportedModelError
from tests.candidates import at_layers
from tests.families import D_MODEL, FAMILIES, N_LAYERS, SHARING_FAMILY, build
from tests.passes import Logits, candidates, every_row, intervened
from tests.problems import Problem, differences, engine_of, make_problem, solve, solve_slowly


@pytest.fixture
def problem() -> Problem:
    return make_problem()


# Falling back


def test_layers_that_share_state_run_hooked_and_agree_with_the_slow_reference(
    problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(SHARING_FAMILY)
    answer = solve(engine_of(model, problem, 4), problem)
    assert answer.engine.name == "hooked"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "state" in caplog.text
    assert max(differences(answer, solve_slowly(model, SHARING_FAMILY, problem), problem).values()) < 1e-4


def _logits_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Skeleton.tail
    monkeypatch.setattr(Skeleton, "tail", lambda self, hidden, token: 1.01 * own(self, hidden, token))


def _layer_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go from layer 0 to layer 2."""
    own = LayerMajor._advance

    def skipping(self: LayerMajor, length_group: LengthGroup, index: int, tick: Any) -> None:
        if index != 1:
            own(self, length_group, index, tick)

    monkeypatch.setattr(LayerMajor, "_advance", skipping)


def _branches_from(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that enter above layer 0 start from so many times what they should; baseline rows are right."""
    own = LengthGroup.enter

    def entering(self: LengthGroup, layer: int, embedded: Tensor, at_once: int) -> None:
        own(self, layer, embedded, at_once)
        if layer > 0:
            self.hidden[self.entered(layer - 1) : self.entered(layer)] *= factor

    monkeypatch.setattr(LengthGroup, "enter", entering)


@pytest.mark.parametrize(
    "fault",
    [
        _logits_too_large,
        _layer_left_out,
        partial(_branches_from, 1.1),
        partial(_branches_from, float("nan")),
    ],
    ids=["logits too large", "layer left out", "branches from a wrong state", "branches from no number"],
)
def test_wrong_layer_major_result_is_noticed_and_replaced(
    fault: Callable[[pytest.MonkeyPatch], None],
    problem: Problem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build(FAMILIES["gemma"])
    expected = solve_slowly(model, FAMILIES["gemma"], problem)
    fault(monkeypatch)
    answer = solve(engine_of(model, problem), problem)
    assert answer.engine.name == "hooked"
    assert "differ" in caplog.text
    assert max(differences(answer, expected, problem).values()) < 1e-4


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -65504.0, -1e9, -torch.inf])
def test_tokens_that_a_model_masks_neither_hide_a_wrong_result_nor_make_one(
    mask: float, problem: Problem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def masking(module: object, args: object, output: Any) -> Any:
        output.logits[..., 3] = mask
        return output

    model = build(FAMILIES["gemma"])
    model.register_forward_hook(masking)
    assert solve(engine_of(model, problem), problem).engine.name == "layer-major"
    assert not caplog.records
    _branches_from(1.1, monkeypatch)
    assert solve(engine_of(model, problem), problem).engine.name == "hooked"


def test_other_tokens_masked_are_a_wrong_result(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Skeleton.tail

    def masking(self: Skeleton, hidden: Tensor, token: int) -> Tensor:
        return own(self, hidden, token).index_fill(-1, torch.tensor([3]), -torch.inf)

    monkeypatch.setattr(Skeleton, "tail", masking)
    engine = engine_of(build(FAMILIES["gemma"]), problem)
    engine.baseline(lambda rows, logits: None, lambda *seen: None)
    assert engine.name == "hooked"


def test_fallback_reports_no_more_work_than_announced(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    _logits_too_large(monkeypatch)
    engine, ticks = engine_of(build(FAMILIES["gemma"]), problem), []
    engine.baseline(lambda rows, logits: None, lambda *seen: None, ticks.append)
    assert engine.name == "hooked"
    assert sum(ticks) == len(problem.inputs) * N_LAYERS


def test_right_layer_major_result_is_kept_without_a_word(problem: Problem, caplog: pytest.LogCaptureFixture) -> None:
    """Control of the fallbacks."""
    answer = solve(engine_of(build(FAMILIES["gemma"]), problem), problem)
    assert answer.engine.name == "layer-major"
    assert not caplog.records


# Leaks


@pytest.mark.parametrize("missed", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_missed_write_is_noticed(name: str, missed: int, problem: Problem) -> None:
    stream = ResidualStream(build(FAMILIES[name]))
    stream.writes[2] = tuple(site for i, site in enumerate(stream.writes[2]) if i != missed)
    engine, given = Engine(stream, problem.inputs), candidates(3)
    with pytest.raises(UnsupportedModelError, match="a write was missed"):
        engine.intervene(every_row(problem, given), given, Logits())


def test_missed_write_is_noticed_whatever_the_directions_dtype(problem: Problem) -> None:
    stream = ResidualStream(build(FAMILIES["llama"]))
    stream.writes[2] = stream.writes[2][:1]
    vectors = torch.full((1, D_MODEL), 1.0).cumsum(-1)
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(stream, problem.inputs)
        with pytest.raises(UnsupportedModelError, match="a write was missed"):
            engine.intervene([Row(0, Intervention.ABLATION, 0)], at_layers(vectors.to(dtype), (1,)), Logits())


def test_missed_write_is_noticed_in_the_hooked_engine_too(problem: Problem) -> None:
    stream = ResidualStream(build(SHARING_FAMILY))
    stream.writes[2] = stream.writes[2][:1]
    engine, given = Engine(stream, problem.inputs), candidates(3)
    with pytest.raises(UnsupportedModelError, match="a write was missed"):
        engine.intervene(every_row(problem, given), given, Logits())


def test_stream_that_is_not_a_number_gives_scores_that_are_none_and_no_leak(problem: Problem) -> None:
    engine, given = engine_of(build(FAMILIES["llama"]), problem), candidates(1)
    own = engine.stream.layers[1].forward
    engine.stream.layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs) * float("nan")
    row, seen = Row(0, Intervention.ABLATION, 0), Logits()
    engine.intervene([row], given, seen)
    assert seen[row].isnan().all()


@pytest.mark.parametrize(
    "length",
    [
        1e-3,
        1e-6,
        1e-8,
        1e-11,
    ],
)
def test_short_candidate_is_not_taken_for_a_missed_write(length: float, problem: Problem) -> None:
    r = torch.randn(1, D_MODEL, dtype=torch.float64)
    given = at_layers(length * r / r.norm(), (1,))
    engine = engine_of(build(FAMILIES["llama"]), problem)
    assert intervened(engine, [Row(0, Intervention.ABLATION, 0)], given)


def test_leak_is_rounding_where_no_write_is_missed(problem: Problem) -> None:
    """Control of the missed write."""
    engine, given = engine_of(build(FAMILIES["llama"]), problem), candidates(3)
    engine.intervene(every_row(problem, given), given, Logits())
    assert 0 < engine.leak < 1e-5
