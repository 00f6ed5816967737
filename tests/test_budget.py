"""A memory budget: what it changes, what it does not, and where it is too little."""

from __future__ import annotations

import pytest
import torch

from refusal_direction import cli, flags
from refusal_direction.config import Config
from refusal_direction.engine import Engine, Row, budget
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.errors import ConfigurationError
from tests.families import FAMILIES, build
from tests.problems import N_POSITIONS, Problem, make_problem, solve


def engine_with(memory: int | None, problem: Problem, reserved: int = 0) -> Engine:
    stream = ResidualStream(build(FAMILIES["llama"]))
    return Engine(stream, problem.inputs, memory=memory, reserved_bytes=reserved, observed_tokens=N_POSITIONS)


def test_a_tight_budget_takes_more_passes_and_gives_the_same_scores() -> None:
    problem = make_problem()
    tight, loose = engine_with(1 << 20, problem), engine_with(None, problem)
    tight.budget.hidden_bytes //= 64  # the least budget still holds all of these few rows
    rows = [Row(prompt) for prompt in range(len(problem.inputs))]
    assert len(list(tight.passes(rows))) > len(list(loose.passes(rows))) == 1
    found, expected = solve(tight, problem), solve(loose, problem)
    assert torch.allclose(found.scores.ablation, expected.scores.ablation, atol=1e-5)
    assert torch.allclose(found.scores.kl, expected.scores.kl, atol=1e-6)


def test_a_long_pass_is_cut_so_that_little_is_lost_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem()
    rows = [Row(prompt) for prompt in range(len(problem.inputs))]
    whole = engine_with(None, problem)
    weights = sum(weight.numel() for weight in whole.stream.layers.parameters())
    a_row = 2 * weights * max(inputs["input_ids"].shape[1] for inputs in problem.inputs)
    monkeypatch.setattr(budget, "_OPERATIONS", {"cpu": 3 * a_row})
    cut = engine_with(None, problem)
    passes = list(cut.passes(rows))
    assert [row for one in passes for row in one] == rows
    assert len(list(whole.passes(rows))) == 1 < len(passes)
    assert all(len(one) >= 3 for one in passes[:-1])
    found, expected = solve(cut, problem), solve(whole, problem)
    assert torch.allclose(found.scores.ablation, expected.scores.ablation, atol=1e-5)
    assert torch.allclose(found.scores.steering, expected.scores.steering, atol=1e-5)


def test_hidden_states_microbatch_and_logits_fit_into_the_budget_together() -> None:
    problem = make_problem()
    for memory in (1 << 20, 4 << 20, 16 << 20):
        limits = engine_with(memory, problem).budget
        widest, vocab = 64, limits._model.config.vocab_size
        microbatch = limits._tokens * 8 * widest * 4
        assert limits.hidden_bytes + microbatch + limits._logit_rows * 40 * vocab <= memory


def test_what_the_caller_keeps_is_taken_off() -> None:
    problem = make_problem()
    whole, part = engine_with(16 << 20, problem).budget, engine_with(16 << 20, problem, reserved=8 << 20).budget
    assert part.hidden_bytes <= whole.hidden_bytes - (4 << 20)


def test_too_little_is_an_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(ConfigurationError, match=r"--memory_budget 0.000953674MiB is too little.*need at least \d+MiB"):
        engine_with(1000, make_problem())


@pytest.mark.parametrize(("text", "expected"), [("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("2GiB", 2 << 30)])
def test_sizes_are_read_with_their_units(text: str, expected: int) -> None:
    assert flags.parse(["--memory_budget", text], Config()).memory_budget == expected


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--memory_budget", "much"])
    assert "'much' is not a size: give a number and a unit, as 512MiB or 4GB" in capsys.readouterr().err
