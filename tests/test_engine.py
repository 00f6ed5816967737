"""Theorems about the engine: what must not matter does not, and what goes wrong is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from refusal_direction.engine import Candidates, Engine, Kind, Row
from refusal_direction.engine.arguments import batch_axes
from refusal_direction.engine.hooked import Hooked
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.layer_major import LayerMajor
from refusal_direction.engine.rows import Lane
from refusal_direction.engine.skeleton import Skeleton
from refusal_direction.errors import OutOfMemoryError, UnsupportedModelError
from tests.families import D_MODEL, FAMILIES, N_LAYERS, SHARING_FAMILY, build
from tests.problems import (
    N_POSITIONS,
    Problem,
    differences,
    engine_of,
    make_problem,
    solve,
    solve_slowly,
)

TOLERANCE = 2e-5
"""On logits of a few units, in float32; rows in other company round differently."""

some_families = pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mixtral"])


@pytest.fixture
def problem() -> Problem:
    return make_problem()


def candidates(count: int = 5, seed: int = 1) -> Candidates:
    """Random directions of layers 0, 1, 2, ..."""
    vectors = torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return Candidates(vectors, tuple(index % N_LAYERS for index in range(count)))


def every_row(problem: Problem, given: Candidates) -> list[Row]:
    """Every prompt under ablation and steering by every candidate."""
    return [
        Row(prompt, kind, candidate)
        for candidate in range(len(given.layers))
        for kind in (Kind.ABLATION, Kind.STEERING)
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


# What must not matter


@some_families
def test_baseline_is_the_models_own_forward(name: str, problem: Problem) -> None:
    model = build(FAMILIES[name])
    logits = baseline_of(engine_of(model, problem))
    with torch.no_grad():
        own = {Row(i): model(**inputs, use_cache=False).logits[0, -1] for i, inputs in enumerate(problem.inputs)}
    assert len(logits) == len(own)
    assert farthest(logits, own) < TOLERANCE


@some_families
def test_steering_by_nothing_is_the_baseline(name: str, problem: Problem) -> None:
    engine = engine_of(build(FAMILIES[name]), problem)
    given = Candidates(torch.zeros(N_LAYERS, D_MODEL), tuple(range(N_LAYERS)))
    rows = [Row(prompt, Kind.STEERING, layer) for prompt in range(len(problem.inputs)) for layer in range(N_LAYERS)]
    steered, plain = intervened(engine, rows, given), baseline_of(engine)
    assert farthest({row: plain[Row(row.prompt)] for row in rows}, steered) < TOLERANCE


@some_families
def test_interventions_change_the_logits(name: str, problem: Problem) -> None:
    """Control of the theorems above and below: rows differ where they should."""
    engine, given = engine_of(build(FAMILIES[name]), problem), candidates()
    rows = every_row(problem, given)
    changed, plain = intervened(engine, rows, given), baseline_of(engine)
    assert min(float((changed[row] - plain[Row(row.prompt)]).abs().max()) for row in rows) > 0.01


@some_families
@pytest.mark.parametrize("batch_size", [1, 3, 7, None])
def test_results_do_not_depend_on_batch_size(name: str, batch_size: int | None, problem: Problem) -> None:
    model, given = build(FAMILIES[name]), candidates()
    rows = every_row(problem, given)
    usual = intervened(engine_of(model, problem, 5), rows, given)
    assert farthest(intervened(engine_of(model, problem, batch_size), rows, given), usual) < TOLERANCE


@some_families
def test_results_do_not_depend_on_row_order(name: str, problem: Problem) -> None:
    engine, given = engine_of(build(FAMILIES[name]), problem, 4), candidates()
    rows = every_row(problem, given)
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()]
    assert farthest(intervened(engine, shuffled, given), intervened(engine, rows, given)) < TOLERANCE


@some_families
def test_results_do_not_depend_on_which_rows_run_together(name: str, problem: Problem) -> None:
    engine, given = engine_of(build(FAMILIES[name]), problem), candidates()
    rows = every_row(problem, given)
    together = intervened(engine, [*rows, *(Row(prompt) for prompt in range(len(problem.inputs)))], given)
    for row in rows[::7]:
        assert farthest(intervened(engine, [row], given), together) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_major_is_the_hooked_forward(name: str, problem: Problem) -> None:
    engine, given = engine_of(build(FAMILIES[name]), problem, 5), candidates()
    rows = [*every_row(problem, given), *(Row(prompt) for prompt in range(len(problem.inputs)))]
    hooked = Hooked(engine.stream, problem.inputs, engine.budget)
    assert isinstance(engine._runner, LayerMajor)
    assert farthest(intervened(engine._runner, rows, given), intervened(hooked, rows, given)) < TOLERANCE


@some_families
@pytest.mark.parametrize("last", [None, N_POSITIONS])
def test_layer_major_observes_what_the_hooked_forward_observes(name: str, last: int | None, problem: Problem) -> None:
    engine = engine_of(build(FAMILIES[name]), problem, 4, observed_tokens=last)
    observed: list[dict[tuple[int, Row], Tensor]] = []
    for runner in (engine._runner, Hooked(engine.stream, problem.inputs, engine.budget)):
        seen: dict[tuple[int, Row], Tensor] = {}

        def observe(layer: int, rows: list[Row], hidden: Tensor, seen: dict[tuple[int, Row], Tensor] = seen) -> None:
            seen.update({(layer, row): x[-(last or 0) :].clone() for row, x in zip(rows, hidden, strict=True)})

        runner.run([Row(prompt) for prompt in range(len(problem.inputs))], consume=Logits(), observe=observe)
        observed.append(seen)
    first, second = observed
    assert first.keys() == second.keys()
    assert len(first) == N_LAYERS * len(problem.inputs)
    largest = max(float(hidden.abs().max()) for hidden in second.values())
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < TOLERANCE * max(1.0, largest)


Change = Callable[[int, Tensor, Tensor], Tensor]
Places = Callable[[Tensor], Tensor]


def _unusual_llama(*, change: Change | None = None, places: Places | None = None) -> PreTrainedModel:
    """A Llama that changes the stream before a layer (index, stream, embedding), or places its tokens in its own way."""
    model = build(FAMILIES["llama"])
    decoder = model.get_decoder()

    def forward(input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        embedded = hidden = decoder.embed_tokens(input_ids)
        where = places(input_ids) if places else torch.arange(input_ids.shape[1]).unsqueeze(0)
        rotary = decoder.rotary_emb(hidden, where)
        for index, layer in enumerate(decoder.layers):
            hidden = change(index, hidden, embedded) if change else hidden
            hidden = layer(hidden, attention_mask=None, position_ids=where, position_embeddings=rotary)
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))

    decoder.forward = forward
    return model


def _adds_to_layer_2(index: int, hidden: Tensor, embedded: Tensor) -> Tensor:
    """As Qwen3-VL does with visual features: something of each prompt's own."""
    return hidden + 3 * embedded.roll(1, -1) if index == 2 else hidden


def _strides(ids: Tensor) -> Tensor:
    """Each prompt's tokens 1, 2 or 3 places apart."""
    return torch.arange(ids.shape[1]).unsqueeze(0) * (1 + ids[:, :1] % 3)


@pytest.mark.parametrize(
    "unusual", [{"change": _adds_to_layer_2}, {"places": _strides}], ids=["added between layers", "arguments"]
)
def test_what_differs_from_prompt_to_prompt_follows_its_rows(unusual: dict[str, Any], problem: Problem) -> None:
    engine, given = engine_of(_unusual_llama(**unusual), problem, 5), candidates()
    plain = baseline_of(engine)
    assert engine.name == "layer-major"
    assert farthest(plain, baseline_of(engine_of(build(FAMILIES["llama"]), problem))) > 0.1  # control: it matters
    rows = every_row(problem, given)
    hooked = Hooked(engine.stream, problem.inputs, engine.budget)
    assert farthest(intervened(engine, rows, given), intervened(hooked, rows, given)) < TOLERANCE


@some_families
def test_little_memory_for_hidden_states_means_more_passes_and_the_same_scores(name: str, problem: Problem) -> None:
    model = build(FAMILIES[name])
    whole, chunked = engine_of(model, problem), engine_of(model, problem)
    chunked.budget.hidden_bytes = 5 * 12 * D_MODEL * 4  # some five rows
    expected = solve(whole, problem)
    calls = _count_calls(chunked.stream.skeleton, "tail")
    found = solve(chunked, problem)
    assert len(calls) > 10
    for ours, theirs in (
        (found.candidates, expected.candidates),
        (found.baseline.refusal, expected.baseline.refusal),
        (found.scores.ablation, expected.scores.ablation),
        (found.scores.steering, expected.scores.steering),
        (found.scores.kl, expected.scores.kl),
    ):
        assert torch.allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def _count_calls(owner: Any, name: str) -> list[None]:
    calls: list[None] = []
    own = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return own(*args, **kwargs)

    setattr(owner, name, counting)
    return calls


# Progress


def test_interventions_report_exactly_the_work_announced(problem: Problem) -> None:
    given = candidates()
    rows = every_row(problem, given)
    engine = engine_of(build(FAMILIES["llama"]), problem)
    ticks: list[int] = []
    engine.intervene(rows, given, Logits(), ticks.append)
    assert sum(ticks) == engine.work(rows, given)


def test_baseline_reports_one_bit_of_work_for_each_prompt_and_layer(problem: Problem) -> None:
    ticks: list[int] = []
    engine_of(build(FAMILIES["llama"]), problem).baseline(Logits(), lambda *seen: None, ticks.append)
    assert sum(ticks) == len(problem.inputs) * N_LAYERS


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

    def skipping(self: LayerMajor, lane: Lane, index: int, tick: Any) -> None:
        if index != 1:
            own(self, lane, index, tick)

    monkeypatch.setattr(LayerMajor, "_advance", skipping)


def _branches_from_a_wrong_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that enter above layer 0 start from something else; baseline rows are right."""
    own = Lane.enter

    def entering(self: Lane, layer: int, embedded: Tensor, at_once: int) -> None:
        own(self, layer, embedded, at_once)
        if layer > 0:
            self.hidden[self.entered(layer - 1) : self.entered(layer)] *= 1.1

    monkeypatch.setattr(Lane, "enter", entering)


def _branches_from_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that enter above layer 0 are not a number; baseline rows are right."""
    own = Lane.enter

    def entering(self: Lane, layer: int, embedded: Tensor, at_once: int) -> None:
        own(self, layer, embedded, at_once)
        if layer > 0:
            self.hidden[self.entered(layer - 1) : self.entered(layer)] = float("nan")

    monkeypatch.setattr(Lane, "enter", entering)


@pytest.mark.parametrize(
    "fault",
    [
        _logits_too_large,
        _layer_left_out,
        _branches_from_a_wrong_state,
        _branches_from_no_number,
    ],
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


@pytest.mark.parametrize(
    ("of_two", "of_three"),
    [
        pytest.param(torch.zeros(2, 5), torch.zeros(4, 5), id="not in proportion"),
        pytest.param(torch.zeros(2, 2), torch.zeros(3, 3), id="along two axes"),
        pytest.param(torch.zeros(2, 5), torch.zeros(3, 5, 1), id="another number of axes"),
        pytest.param([torch.zeros(5)] * 2, [torch.zeros(5)] * 3, id="a list with one entry a row"),
        pytest.param(torch.zeros(2, 5), None, id="there for two rows only"),
    ],
)
def test_argument_that_does_not_grow_with_the_batch_is_not_followed(of_two: Any, of_three: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        batch_axes((of_two,), (of_three,))


def test_argument_that_grows_with_the_batch_is_followed() -> None:
    """Control: also with heads folded into the batch, and beside one that does not grow."""
    two = (torch.zeros(8, 5), {"mask": torch.zeros(1, 2, 5)}, torch.zeros(5), None)
    three = (torch.zeros(12, 5), {"mask": torch.zeros(1, 3, 5)}, torch.zeros(5), None)
    assert batch_axes(two, three) == (0, {"mask": 1}, None, None)


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
            engine.intervene([Row(0, Kind.ABLATION, 0)], Candidates(vectors.to(dtype), (1,)), Logits())


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
    row, seen = Row(0, Kind.ABLATION, 0), Logits()
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
    given = Candidates(length * r / r.norm(), (1,))
    engine = engine_of(build(FAMILIES["llama"]), problem)
    assert intervened(engine, [Row(0, Kind.ABLATION, 0)], given)


def test_leak_is_rounding_where_no_write_is_missed(problem: Problem) -> None:
    """Control of the missed write."""
    engine, given = engine_of(build(FAMILIES["llama"]), problem), candidates(3)
    engine.intervene(every_row(problem, given), given, Logits())
    assert 0 < engine.leak < 1e-5


# Memory


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

    def enter(self: Lane, layer: int, embedded: Tensor, at_once: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")

    monkeypatch.setattr(Lane, "enter", enter)
    with pytest.raises(OutOfMemoryError, match="what all rows hold together. Use a smaller model"):
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
    intervened(engine, [Row(0, Kind.ABLATION, candidate) for candidate in range(3)], given)
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


# Nothing is left behind


def _traces(model: PreTrainedModel) -> list[str]:
    """Whatever an intervention could leave on a model."""
    return [
        f"{name}: {attribute}"
        for name, module in model.named_modules()
        for attribute in ("_forward_hooks", "_forward_pre_hooks", "forward")
        if module.__dict__.get(attribute)
    ]


def _run_both_sweeps(engine: Engine, problem: Problem, consume: Callable[..., None]) -> None:
    given = candidates(2)
    engine.baseline(consume, lambda *seen: None)
    engine.intervene(every_row(problem, given), given, consume)


@pytest.mark.parametrize("family", [FAMILIES["gemma2"], SHARING_FAMILY], ids=["layer-major", "hooked"])
def test_model_is_as_it_was_after_a_run(family: Any, problem: Problem) -> None:
    model = build(family)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    _run_both_sweeps(engine_of(model, problem), problem, lambda rows, logits: None)
    assert _traces(model) == []
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", [FAMILIES["gemma2"], SHARING_FAMILY], ids=["layer-major", "hooked"])
@pytest.mark.parametrize("failing_call", [1, 2])
def test_model_is_as_it_was_after_a_failure_of_the_caller(family: Any, failing_call: int, problem: Problem) -> None:
    model, calls = build(family), []

    def consume(rows: list[Row], logits: Tensor) -> None:
        calls.append(rows)
        if len(calls) == failing_call:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run_both_sweeps(engine_of(model, problem), problem, consume)
    assert _traces(model) == []


@pytest.mark.parametrize("family", [FAMILIES["gemma2"], SHARING_FAMILY], ids=["layer-major", "hooked"])
@pytest.mark.parametrize("failing_call", [1, 2, 8])
def test_model_is_as_it_was_after_a_failure_inside_a_layer(family: Any, failing_call: int, problem: Problem) -> None:
    model = build(family)
    engine, calls = engine_of(model, problem, batch_size=4), []

    def fail(module: nn.Module, args: Any) -> None:
        calls.append(None)
        if len(calls) == failing_call:
            raise RuntimeError("the layer broke")

    norm = engine.stream.layers[2].get_submodule("input_layernorm")
    handle = norm.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the layer broke"):
        _run_both_sweeps(engine, problem, lambda rows, logits: None)
    handle.remove()
    assert _traces(model) == []


def test_inputs_and_candidates_are_not_changed(problem: Problem) -> None:
    engine, given = engine_of(build(FAMILIES["gemma2"]), problem), candidates(3)
    inputs = [{name: tensor.clone() for name, tensor in one.items()} for one in engine.prompts]
    vectors = given.vectors.clone()
    _ = baseline_of(engine), intervened(engine, every_row(problem, given), given)
    assert torch.equal(given.vectors, vectors)
    assert all(
        torch.equal(one[name], two[name]) for one, two in zip(engine.prompts, inputs, strict=True) for name in two
    )
