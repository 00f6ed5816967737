"""The tokens that open every prompt go through the layers once for each intervention, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, JambaConfig, JambaForCausalLM

from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.layer_major import LayerMajor
from refusal_direction.engine.shortcuts.prefix import Prefix, common_length, find_prefix
from tests.candidates import at_layers
from tests.families import D_MODEL, FAMILIES, N_LAYERS, TEXT_FAMILIES, VOCAB, build, each_family
from tests.problems import N_POSITIONS, as_inputs, engine_of, make_problem, solve

some_families = pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt2", "mixtral"])


def prefix_of(engine: Engine) -> Prefix | None:
    assert isinstance(engine._runner, LayerMajor)
    return engine._runner._prefix


# What is common


@settings(max_examples=200, deadline=None)
@given(
    opening=st.lists(st.integers(0, 3), max_size=5),
    rests=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=4),
    spared=st.integers(1, 2),
)
def test_common_length_is_the_longest_that_spares_the_end(
    opening: list[int], rests: list[list[int]], spared: int
) -> None:
    prompts = [opening + rest for rest in rests]
    found = common_length([as_inputs(prompt) for prompt in prompts], spared)
    possible = [
        length
        for length in range(min(map(len, prompts)) - spared + 1)
        if all(prompt[:length] == prompts[0][:length] for prompt in prompts)
    ]
    assert found == max(possible) >= min(len(opening), min(map(len, prompts)) - spared)


def test_prompts_shorter_than_what_is_spared_share_nothing() -> None:
    assert common_length([as_inputs([5, 6])], 3) == 0


# What must not matter


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "falcon", "opt", "gpt_neo", "llama4_text", "bert"])
def test_a_prefix_of_one_token_changes_nothing(name: str) -> None:
    """As a beginning-of-text token that a template puts before whatever the user says."""
    problem, model = make_problem(opening=[2]), build(TEXT_FAMILIES[name])
    engine, plain = engine_of(model, problem), engine_of(model, problem)
    found = solve(engine, problem).scores
    assert engine.name == "layer-major"
    assert engine.shared in (0, 1)
    plain._fall_back("A test.")
    expected = solve(plain, problem).scores
    for measure in ("ablation", "steering", "kl"):
        torch.testing.assert_close(getattr(found, measure), getattr(expected, measure), atol=1e-5, rtol=0)


@each_family()
def test_every_family_shares_the_opening(name: str) -> None:
    prefix = prefix_of(engine_of(build(FAMILIES[name]), make_problem()))
    assert prefix is not None
    assert prefix.ids.tolist() == [make_problem().harmful_val[0][:3]]


@some_families
@pytest.mark.parametrize("batch_size", [2, None])
def test_scores_are_those_without_sharing(name: str, batch_size: int | None) -> None:
    model, problem = build(FAMILIES[name]), make_problem()
    shared, apart = (
        solve(engine_of(model, problem, batch_size, observed_tokens=observed), problem)
        for observed in (N_POSITIONS, None)
    )
    assert prefix_of(shared.engine) is not None
    assert prefix_of(apart.engine) is None
    for ours, theirs in (
        (shared.candidates, apart.candidates),
        (shared.baseline.refusal, apart.baseline.refusal),
        (shared.scores.ablation, apart.scores.ablation),
        (shared.scores.steering, apart.scores.steering),
        (shared.scores.kl, apart.scores.kl),
    ):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_each_pass_has_its_own_prefix_rows() -> None:
    model, problem = build(FAMILIES["llama"]), make_problem()
    whole, split = engine_of(model, problem), engine_of(model, problem)
    split.budget.hidden_bytes = 40 * D_MODEL * 4
    found, expected = solve(split, problem), solve(whole, problem)
    assert torch.allclose(found.scores.ablation, expected.scores.ablation, atol=1e-5)
    assert torch.allclose(found.scores.steering, expected.scores.steering, atol=1e-5)


def test_out_of_memory_in_the_prefix_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, problem = build(FAMILIES["llama"]), make_problem()
    expected = solve(engine_of(model, problem), problem)
    engine = engine_of(model, problem)
    engine.baseline(lambda *_: None, lambda *_: None)
    own, failed = model.model.layers[1].mlp.forward, []

    def fails_once(x: torch.Tensor) -> torch.Tensor:  # after attention has left its keys and values
        if len(x) > 4 and x.shape[1] == 3 and not failed:
            failed.append(len(x))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return own(x)

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fails_once)
    found = solve(engine, problem)
    assert failed
    assert torch.allclose(found.scores.ablation, expected.scores.ablation, atol=1e-5)


# What it saves


@contextmanager
def tokens_through(module: nn.Module) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("observed", "each", "once"), [(None, 3, 0), (N_POSITIONS, 0, 3)])
def test_the_opening_goes_through_once_for_each_intervention(observed: int | None, each: int, once: int) -> None:
    model, problem = build(FAMILIES["llama"]), make_problem()
    engine = engine_of(model, problem, observed_tokens=observed)
    given = at_layers(torch.randn(4, D_MODEL), (0, 1, 2, 1))
    rows = [
        Row(prompt, Intervention.ABLATION, candidate) for prompt in range(len(problem.inputs)) for candidate in range(4)
    ]
    with tokens_through(model.model.layers[0].mlp) as seen:
        engine.intervene(rows, given, lambda *_: None)
    rest = sum(inputs["input_ids"].shape[1] - 3 for inputs in problem.inputs)
    assert sum(seen) == 4 * (rest + each * len(problem.inputs) + once)


# Where it cannot be


def test_layers_that_look_ahead_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The opening's tokens would see what follows them."""
    model, problem = build(FAMILIES["llama"]), make_problem()
    for layer in model.model.layers:
        own = layer.mlp.forward
        monkeypatch.setattr(layer.mlp, "forward", lambda x, own=own: own(x + x.mean(1, keepdim=True)))
    assert prefix_of(engine_of(model, problem)) is None


def test_attention_that_looks_ahead_shares_nothing() -> None:
    """As an encoder BERT attends both ways; what follows the opening is right with the opening apart, the opening is not."""
    decoder = TEXT_FAMILIES["bert"]
    assert prefix_of(engine_of(build(decoder), make_problem())) is not None
    assert prefix_of(engine_of(build(replace(decoder, config={})), make_problem())) is None


def test_layers_with_another_kind_of_cache_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, problem = build(FAMILIES["llama"]), make_problem()
    expected = solve(engine_of(model, problem, observed_tokens=None), problem)
    own = type(model.model.layers[0]).forward

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        for value in kwargs.values():
            if isinstance(value, DynamicCache):
                value.conv_states  # noqa: B018  an AttributeError
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
    found = solve(engine_of(model, problem), problem)
    assert prefix_of(found.engine) is None
    assert torch.allclose(found.scores.ablation, expected.scores.ablation, atol=1e-5)


def test_recurrent_layers_share_nothing() -> None:
    torch.manual_seed(0)
    config = JambaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
    )
    assert prefix_of(engine_of(JambaForCausalLM(config).eval(), make_problem())) is None


def test_prompts_of_more_than_tokens_share_nothing() -> None:
    model, problem = build(FAMILIES["llama"]), make_problem()
    inputs = [{**one, "token_type_ids": torch.zeros_like(one["input_ids"])} for one in problem.inputs]
    assert find_prefix(ResidualStream(model).skeleton, problem.inputs, 1) is not None
    assert find_prefix(ResidualStream(model).skeleton, inputs, 1) is None
