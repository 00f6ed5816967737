"""Prefix rows and branch points are kept from one pass for the next, and no score depends on it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from refusal_direction.candidates import Candidates
from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.engine.kept import KeptRows
from refusal_direction.engine.layer_major import LayerMajor
from tests.candidates import at_layers
from tests.families import D_MODEL, N_LAYERS, TEXT_FAMILIES, build
from tests.problems import engine_of, make_problem

N_CANDIDATES = 6


def candidates_of_all_layers() -> Candidates:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(N_CANDIDATES, D_MODEL, generator=generator)
    return at_layers(vectors, [index % N_LAYERS for index in range(N_CANDIDATES)])


def rounds(n_prompts: int) -> list[list[Row]]:
    """Every row under both interventions, in rounds that return to the same interventions and prompts."""
    rows = [
        Row(prompt, intervention, candidate)
        for prompt in range(n_prompts)
        for intervention in (Intervention.ABLATION, Intervention.STEERING)
        for candidate in range(N_CANDIDATES)
    ]
    random.Random(1).shuffle(rows)
    return [rows[begin : begin + 17] for begin in range(0, len(rows), 17)]


def logits_of(engine: Engine, rows: list[Row], candidates: Candidates) -> dict[Row, Tensor]:
    found: dict[Row, Tensor] = {}
    engine.intervene(rows, candidates, lambda some, logits: found.update(zip(some, logits.clone(), strict=True)))
    return found


def tokens_through(layer: nn.Module, engine: Engine, rows: list[Row], candidates: Candidates) -> int:
    """Number of tokens that a layer is run on, before the last tokens alone go to the head."""
    seen: list[int] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    logits_of(engine, rows, candidates)
    hook.remove()
    return sum(seen) - len(rows)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt2", "mixtral", "bert"])
@pytest.mark.parametrize("kept_bytes", [1 << 30, 20_000, 0])
def test_rounds_that_keep_rows_give_the_logits_of_one_pass(
    name: str, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, model, candidates = make_problem(), build(TEXT_FAMILIES[name]), candidates_of_all_layers()
    keeping, plain = engine_of(model, problem, keep=True), engine_of(model, problem)
    monkeypatch.setattr(keeping.budget, "kept_bytes", kept_bytes)
    expected: dict[Row, Tensor] = {}
    found: dict[Row, Tensor] = {}
    for rows in rounds(len(problem.inputs)):
        expected.update(logits_of(plain, rows, candidates))
        found.update(logits_of(keeping, rows, candidates))
    assert found.keys() == expected.keys()
    for row in found:
        torch.testing.assert_close(found[row], expected[row], atol=1e-5, rtol=0)


def test_what_is_kept_is_not_run_again() -> None:
    problem, model, candidates = (
        make_problem(),
        build(TEXT_FAMILIES["llama"]),
        at_layers(torch.eye(N_CANDIDATES, D_MODEL), [1] * N_CANDIDATES),
    )
    engine, layer = engine_of(model, problem, keep=True), model.model.layers[2]
    steered, ablated = (
        [Row(prompt, intervention, candidate) for candidate in range(N_CANDIDATES)]
        for prompt, intervention in ((1, Intervention.STEERING), (2, Intervention.ABLATION))
    )
    own = {prompt: problem.inputs[prompt]["input_ids"].shape[1] - engine.shared for prompt in (1, 2)}
    alone = N_CANDIDATES * (own[1] + own[2])
    openings, branch_points = (2 * N_CANDIDATES + 1) * engine.shared, own[1]
    assert engine.shared > 0
    first, again = (tokens_through(layer, engine, steered + ablated, candidates) for _ in range(2))
    assert (first, again) == (alone + openings + branch_points, alone)


def test_another_set_of_candidates_finds_nothing_kept() -> None:
    problem, model = make_problem(), build(TEXT_FAMILIES["llama"])
    engine, plain = engine_of(model, problem, keep=True), engine_of(model, problem)
    rows = [Row(1, Intervention.STEERING, 2), Row(2, Intervention.ABLATION, 2)]
    for candidates in (candidates_of_all_layers(), at_layers(torch.ones(N_CANDIDATES, D_MODEL), [1] * N_CANDIDATES)):
        found, expected = (logits_of(one, rows, candidates) for one in (engine, plain))
        for row in rows:
            torch.testing.assert_close(found[row], expected[row], atol=1e-6, rtol=0)


def test_a_pass_that_is_interrupted_keeps_nothing() -> None:
    problem, model, candidates = make_problem(), build(TEXT_FAMILIES["llama"]), candidates_of_all_layers()
    engine, plain = engine_of(model, problem, keep=True), engine_of(model, problem)
    rows = [Row(1, Intervention.STEERING, 2), Row(2, Intervention.ABLATION, 2)]

    def stop(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits_of(engine, rows, candidates)
    hook.remove()
    assert isinstance(engine._runner, LayerMajor)
    assert all(not kept.places for kept in engine._runner._all_kept())
    found, expected = (logits_of(one, rows, candidates) for one in (engine, plain))
    for row in rows:
        torch.testing.assert_close(found[row], expected[row], atol=1e-6, rtol=0)


def test_kept_rows_come_first_and_do_not_share_memory() -> None:
    kept: KeptRows[str] = KeptRows()
    own = torch.tensor([[1.0], [2.0]])
    kept.begin(["a"])
    assert kept.joined(0, (own,))[0].tolist() == [[1.0], [2.0]]
    own.zero_()
    kept.commit()
    assert (kept.places, kept.count, kept.nbytes) == ({"a": 0}, 1, 4)
    kept.begin(["b"])
    assert kept.joined(0, (torch.tensor([[3.0], [4.0]]),))[0].tolist() == [[1.0], [3.0], [4.0]]
    kept.commit()
    assert (kept.places, kept.joined(0, ())[0].tolist()) == ({"a": 0, "b": 1}, [[1.0], [3.0]])
