"""Theorems about the engine: what must not matter does not, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.engine.hooked import Hooked
from refusal_direction.engine.layer_major import LayerMajor
from tests.candidates import at_layers
from tests.families import D_MODEL, FAMILIES, N_LAYERS, SHARING_FAMILY, build, each_family
from tests.passes import TOLERANCE, Logits, baseline_of, candidates, every_row, farthest, intervened
from tests.problems import N_POSITIONS, Problem, engine_of, make_problem, solve

some_families = pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mixtral"])


@pytest.fixture
def problem() -> Problem:
    return make_problem()


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
    given = at_layers(torch.zeros(N_LAYERS, D_MODEL), tuple(range(N_LAYERS)))
    rows = [
        Row(prompt, Intervention.STEERING, layer) for prompt in range(len(problem.inputs)) for layer in range(N_LAYERS)
    ]
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


@each_family()
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
    whole, split = engine_of(model, problem), engine_of(model, problem)
    split.budget.hidden_bytes = 5 * 12 * D_MODEL * 4  # some five rows
    expected = solve(whole, problem)
    calls = _count_calls(split.stream.skeleton, "tail")
    found = solve(split, problem)
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
    engine.intervene(rows, given, Logits(), tick=ticks.append)
    assert sum(ticks) == engine.work(rows, given)


def test_baseline_reports_one_bit_of_work_for_each_prompt_and_layer(problem: Problem) -> None:
    ticks: list[int] = []
    engine_of(build(FAMILIES["llama"]), problem).baseline(Logits(), lambda *seen: None, ticks.append)
    assert sum(ticks) == len(problem.inputs) * N_LAYERS


# Nothing is left behind


def _traces(model: PreTrainedModel) -> list[str]:
    """Whatever an intervention could leave on a model."""
    return [
        f"{name}: {attribute}"
        for name, module in model.named_modules()
        for attribute in ("_forward_hooks", "_forward_pre_hooks", "forward")
        if module.__dict__.get(attribute)
    ]


def _run_both_passes(engine: Engine, problem: Problem, consume: Callable[..., None]) -> None:
    given = candidates(2)
    engine.baseline(consume, lambda *seen: None)
    engine.intervene(every_row(problem, given), given, consume)


@pytest.mark.parametrize("family", [FAMILIES["gemma2"], SHARING_FAMILY], ids=["layer-major", "hooked"])
def test_model_is_as_it_was_after_a_run(family: Any, problem: Problem) -> None:
    model = build(family)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    _run_both_passes(engine_of(model, problem), problem, lambda rows, logits: None)
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
        _run_both_passes(engine_of(model, problem), problem, consume)
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
        _run_both_passes(engine, problem, lambda rows, logits: None)
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


def test_a_baseline_of_no_prompts_runs_nothing(problem: Problem) -> None:
    engine = engine_of(build(FAMILIES["llama"]), problem)
    seen = Logits()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerMajor, "run", lambda *_, **__: pytest.fail("the model was run"))
        engine.baseline(seen, lambda *_: None, lambda done: pytest.fail("work was reported"), prompts=[])
    assert not seen
    assert engine.name == "layer-major"
