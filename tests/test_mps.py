"""On MPS there is no float64, and tensors of two devices do not mix: nothing the engine or the scores do there needs either.

A pretended device (tests/pretended.py) stands for the real one, and is as strict.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from refusal_direction.engine import Engine
from refusal_direction.engine.interventions import ResidualStream, ablated, steered
from refusal_direction.scoring import metrics
from tests.families import D_MODEL, TEXT_FAMILIES, build
from tests.pretended import MPS, Pretended, pretended_mps
from tests.problems import N_POSITIONS, Answer, Problem, engine_of, make_problem, solve

families = pytest.mark.parametrize(
    ("name", "runner"),
    [
        ("llama", "layer-major"),
        pytest.param("gemma2", "layer-major", marks=pytest.mark.extended),
        pytest.param("mixtral", "layer-major", marks=pytest.mark.extended),
        pytest.param("gemma4_text", "hooked", marks=pytest.mark.extended),
    ],
)


def solve_there(model: PreTrainedModel, problem: Problem) -> Answer:
    """Both passes, with the model and its inputs on the pretended device."""
    with pretended_mps(model):
        inputs = [{name: tensor.to(MPS) for name, tensor in one.items()} for one in problem.inputs]
        assert all(isinstance(tensor, Pretended) for one in inputs for tensor in one.values())
        return solve(Engine(ResidualStream(model), inputs, batch_size=6, observed_tokens=N_POSITIONS), problem)


@families
def test_engine_and_scores_need_no_float64_on_the_device(name: str, runner: str) -> None:
    problem = make_problem(n_train=2, n_val=2)
    expected = solve(engine_of(build(TEXT_FAMILIES[name]), problem, 6), problem)
    found = solve_there(build(TEXT_FAMILIES[name]), problem)
    assert found.engine.name == runner
    for ours, theirs in (
        (found.candidates, expected.candidates),
        (found.baseline.refusal, expected.baseline.refusal),
        (found.scores.ablation, expected.scores.ablation),
        (found.scores.steering, expected.scores.steering),
        (found.scores.kl, expected.scores.kl),
    ):
        assert not isinstance(ours, Pretended)
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)  # the softmax is in float32


@pytest.mark.extended
def test_half_precision_needs_no_float64_on_the_device() -> None:
    found = solve_there(build(TEXT_FAMILIES["llama"], dtype=torch.bfloat16), make_problem(n_train=2, n_val=2))
    assert found.scores.kl.isfinite().all()


def test_directions_on_the_cpu_serve_a_model_on_the_device() -> None:
    model, r = build(TEXT_FAMILIES["llama"]), torch.randn(D_MODEL, dtype=torch.float64)
    ids = torch.arange(20, 30).unsqueeze(0)
    with torch.no_grad():
        with ablated(model, r), steered(model, r, layer=1):
            expected = model(input_ids=ids, use_cache=False).logits
        del model._refusal_direction_stream
        with pretended_mps(model), ablated(model, r), steered(model, r, layer=1):
            found = model(input_ids=ids.to(MPS), use_cache=False).logits
    assert isinstance(found, Pretended)
    assert torch.allclose(found.cpu(), expected, atol=1e-5, rtol=1e-5)


# Controls: the test above can fail


def test_a_softmax_in_float64_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "widest_dtype", lambda device: torch.float64)
    with pytest.raises(TypeError, match="float64"):
        solve_there(build(TEXT_FAMILIES["llama"]), make_problem(n_train=2, n_val=2))


def test_the_pretended_device_is_as_strict_as_the_real_one() -> None:
    with pretended_mps(torch.nn.Linear(2, 2)):
        x = torch.ones(2, 3, device=MPS)
        assert (x.device, x.T.device, (x + 1).device, x[0].device) == (MPS, MPS, MPS, MPS)
        assert not isinstance(x.cpu(), Pretended)
        assert x.cpu().double().sum() == 6
        for wrong in (
            x.double,
            lambda: x.sum(0, dtype=torch.float64),
            lambda: torch.ones(2, dtype=torch.float64).to(MPS),
            lambda: torch.ones(2, dtype=torch.float64, device=MPS),
        ):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2, 3)
        x[0] = 0
        x.add_(1)
        assert x.cpu().tolist() == [[1, 1, 1], [2, 2, 2]]
