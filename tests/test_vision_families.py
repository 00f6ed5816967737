"""On every vision-language family the package agrees with a slow reference, and the vision tower runs once a prompt."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from refusal_direction.engine import Intervention, Row
from refusal_direction.engine.interventions import ablated
from refusal_direction.engine.layer_major import LayerMajor
from refusal_direction.errors import UnsupportedModelError
from tests.candidates import at_layers
from tests.families import D_MODEL, N_LAYERS, layers_of
from tests.families.tables import VISION_FAMILIES as EVERY_FAMILY
from tests.families.vision import IMAGE, SIDE, build_vision, counted_images
from tests.oracles import one_by_one, reference, stream
from tests.problems import N_POSITIONS, Answer, differences, engine_of, solve
from tests.vision_problems import VisionProblem, known_vision, make_vision_problem, solve_vision_slowly

SCORE_TOLERANCE = 1e-4
LEAK_TOLERANCE = 1e-5
MORE_IMAGES = 11
"""How many images more than there are prompts the tower may see, whatever the number of candidates."""

VISION_FAMILIES = {name: family for name, family in EVERY_FAMILY.items() if family.writes}
"""Those whose writes and towers are known."""

_ALWAYS = ("paligemma2", "gemma3", "qwen2_5_vl", "llava")
every_family = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in _ALWAYS else pytest.mark.extended) for name in VISION_FAMILIES],
)
post_norm_family = pytest.mark.parametrize("name", ["paligemma2", "gemma3"])


def random_direction(seed: int) -> Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def largest_difference(answer: Answer, expected: reference.Report, problem: VisionProblem) -> float:
    return max(differences(answer, expected, problem).values())


@cache
def reference_case(name: str) -> tuple[PreTrainedModel, VisionProblem, reference.Report]:
    """A model, a problem, and the slow reference's answer, which several tests look at."""
    family = VISION_FAMILIES[name]
    model, problem = build_vision(family), make_vision_problem(family)
    return model, problem, solve_vision_slowly(model, family, problem)


@every_family
def test_candidates_and_scores_agree_with_the_slow_reference(name: str) -> None:
    model, problem, expected = reference_case(name)
    answer = solve(engine_of(model, problem, 4), problem)
    assert answer.engine.name == "layer-major"
    assert answer.candidates.shape == (N_POSITIONS, N_LAYERS, D_MODEL)
    assert largest_difference(answer, expected, problem) < SCORE_TOLERANCE


@every_family
def test_activations_agree_with_the_slow_reference(name: str) -> None:
    family = VISION_FAMILIES[name]
    model, problem = build_vision(family), make_vision_problem(family)
    answer = solve(engine_of(model, problem, 4), problem)
    expected = one_by_one.activations(
        known_vision(model, family), [*problem.harmful_train, *problem.harmless_train], N_POSITIONS
    )
    assert torch.allclose(answer.baseline.activations, expected, atol=1e-5, rtol=1e-5)


@every_family
def test_reference_scores_move_under_the_interventions(name: str) -> None:
    """Control of the agreement: the scores compared there are not all the same."""
    _, _, expected = reference_case(name)
    for scores, baseline in (
        (expected.ablation, expected.baseline_harmful),
        (expected.steering, expected.baseline_harmless),
        (expected.kl, torch.zeros_like(expected.baseline_harmless)),
    ):
        moved = (scores - baseline).abs().amax(dim=-1)
        assert (moved[:, 1:] > 50 * SCORE_TOLERANCE).all()
        assert moved[0, 0] > 50 * SCORE_TOLERANCE  # the other positions hold the same token in every prompt


@every_family
def test_reference_activations_depend_on_the_image(name: str) -> None:
    """Control of the agreement: an image lost or given to another prompt would show."""
    family = VISION_FAMILIES[name]
    model, problem = build_vision(family), make_vision_problem(family)
    one, other = problem.harmful_train[:2]
    swapped = {**one, "pixel_values": other["pixel_values"]}
    before, after = (
        one_by_one.activations(known_vision(model, family), [prompt], N_POSITIONS) for prompt in (one, swapped)
    )
    above_two = (before - after)[:, :, 2:]  # a sliding window may keep the image out of the first layer's reach
    assert (above_two.abs().amax(-1) > 50 * SCORE_TOLERANCE).all()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("qwen2_5_vl", [(1, 16, 16), (1, 16, 32), (1, 24, 16)]),
        ("qwen3_vl", [(1, 16, 16), (1, 16, 32), (1, 24, 16)]),
        ("smolvlm", [(1, SIDE, SIDE), (3, SIDE, SIDE)]),
        ("internvl", [(1, SIDE, SIDE), (3, SIDE, SIDE)]),
    ],
)
def test_images_of_several_sizes_agree_with_the_slow_reference(name: str, shapes: list[tuple[int, int, int]]) -> None:
    family = VISION_FAMILIES[name]
    model, problem = build_vision(family), make_vision_problem(family, shapes=shapes)
    assert len({prompt["pixel_values"].shape for prompt in problem.inputs}) == len(shapes)
    answer = solve(engine_of(model, problem, 4), problem)
    assert answer.engine.name == "layer-major"
    assert largest_difference(answer, solve_vision_slowly(model, family, problem), problem) < SCORE_TOLERANCE


def refuse(*arguments: object, **settings: object) -> None:
    """In place of LayerMajor.__init__: the engine falls back to hooked forwards."""
    raise UnsupportedModelError("Not layer by layer.")


@pytest.mark.parametrize("name", ["paligemma2", "qwen3_vl"])
def test_plain_hooked_forwards_agree_with_the_slow_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerMajor, "__init__", refuse)
    model, problem, expected = reference_case(name)
    answer = solve(engine_of(model, problem, 4), problem)
    assert answer.engine.name == "hooked"
    assert largest_difference(answer, expected, problem) < SCORE_TOLERANCE


@every_family
def test_a_text_token_may_have_any_id_and_so_may_the_image_token(name: str) -> None:
    """The residual stream is looked for on a few text tokens of low ids; here one of them stands for images."""
    low, family = 5, VISION_FAMILIES[name]
    moved = {key: low for key, token in family.config.items() if token == IMAGE}
    low_family = replace(family, config={**family.config, **moved})
    model, problem = build_vision(low_family), make_vision_problem(low_family, n_train=2, n_val=1)
    for prompt in problem.inputs:
        prompt["input_ids"][prompt["input_ids"] == IMAGE] = low
    answer = solve(engine_of(model, problem, 4), problem)
    assert largest_difference(answer, solve_vision_slowly(model, low_family, problem), problem) < SCORE_TOLERANCE


@every_family
def test_ablated_stream_is_orthogonal_at_every_addition(name: str) -> None:
    family = VISION_FAMILIES[name]
    model, u, prompt = build_vision(family), random_direction(1), make_vision_problem(family).inputs[0]
    with ablated(model, u), stream.followed(layers_of(model, family), u) as leaks, torch.no_grad():
        model(**prompt, use_cache=False)
    assert len(leaks.additions) >= 2 * N_LAYERS
    assert leaks.worst < LEAK_TOLERANCE


@every_family
def test_stream_in_the_engine_is_orthogonal_at_every_addition(name: str) -> None:
    family = VISION_FAMILIES[name]
    model, u, problem = build_vision(family), random_direction(2), make_vision_problem(family)
    engine = engine_of(model, problem, 4)
    rows = [Row(prompt, Intervention.ABLATION, 0) for prompt in range(len(problem.inputs))]
    one = at_layers(u.unsqueeze(0), (1,))
    engine.intervene(rows, one, lambda rows, logits: None)  # tries a shortcut on made-up outputs, which are no stream
    with stream.followed(layers_of(model, family), u) as leaks:
        engine.intervene(rows, one, lambda rows, logits: None)
    assert len(leaks.additions) >= 2 * N_LAYERS
    assert leaks.worst < LEAK_TOLERANCE
    assert engine.leak < LEAK_TOLERANCE


@every_family
def test_plain_stream_is_not_orthogonal(name: str) -> None:
    """Control: the oracle sees what ablation takes away."""
    family = VISION_FAMILIES[name]
    model, u, prompt = build_vision(family), random_direction(1), make_vision_problem(family).inputs[0]
    with stream.followed(layers_of(model, family), u) as leaks, torch.no_grad():
        model(**prompt, use_cache=False)
    assert min(leaks.additions) > 100 * LEAK_TOLERANCE


@post_norm_family
def test_hooking_module_outputs_as_published_code_does_leaves_the_direction_in_the_stream(name: str) -> None:
    """PaliGemma 2's text model is Gemma 2: a norm stands between its modules and the stream."""
    family = VISION_FAMILIES[name]
    model, u, prompt = build_vision(family), random_direction(1), make_vision_problem(family).inputs[0]
    published = known_vision(model, family, writes=("self_attn", "mlp"))
    with reference.ablated(published, u), stream.followed(published.layers, u) as leaks, torch.no_grad():
        of_published = model(**prompt, use_cache=False).logits[0, -1]
    assert leaks.inputs[0] < LEAK_TOLERANCE  # the embedding is clean
    assert leaks.worst > 0.01
    with ablated(model, u), stream.followed(published.layers, u) as ours, torch.no_grad():
        of_ours = model(**prompt, use_cache=False).logits[0, -1]
    assert ours.worst < LEAK_TOLERANCE
    assert (of_ours - of_published).abs().max() > 0.01 * of_ours.abs().max()


@pytest.mark.parametrize("name", ["paligemma", "llava", "internvl"])
def test_hooking_module_outputs_is_right_where_nothing_stands_between(name: str) -> None:
    """Control: the leak above is the norms' doing, not the oracle's."""
    family = VISION_FAMILIES[name]
    model, u, prompt = build_vision(family), random_direction(1), make_vision_problem(family).inputs[0]
    published = known_vision(model, family, writes=("self_attn", "mlp"))
    with reference.ablated(published, u), stream.followed(published.layers, u) as leaks, torch.no_grad():
        model(**prompt, use_cache=False)
    assert leaks.worst < LEAK_TOLERANCE


def test_what_qwen3_adds_between_layers_is_a_write_too() -> None:
    """Control: without the oracle's own hooks between the layers the direction comes back with the image's features."""
    family = VISION_FAMILIES["qwen3_vl"]
    model, u, prompt = build_vision(family), random_direction(1), make_vision_problem(family).inputs[0]
    layers = layers_of(model, family)
    layers_only = replace(known_vision(model, family), adds_between_layers=False)
    with reference.ablated(layers_only, u), stream.followed(layers, u) as leaks, torch.no_grad():
        model(**prompt, use_cache=False)
    assert leaks.inputs[0] < LEAK_TOLERANCE
    assert min(leaks.inputs[1:]) > 0.01
    with reference.ablated(known_vision(model, family), u), stream.followed(layers, u) as right, torch.no_grad():
        model(**prompt, use_cache=False)
    assert right.worst < LEAK_TOLERANCE


@every_family
def test_the_vision_tower_runs_once_a_prompt_for_the_whole_run(name: str) -> None:
    family = VISION_FAMILIES[name]
    model, problem = build_vision(family), make_vision_problem(family)
    with counted_images(model, family) as seen:
        engine = engine_of(model, problem, 4)
        rows = [
            Row(prompt, kind, 0)
            for prompt in range(len(problem.inputs))
            for kind in (Intervention.BASELINE, Intervention.STEERING)
        ]
        solve(engine, problem)
    assert len(problem.inputs) <= sum(seen) <= len(problem.inputs) + MORE_IMAGES
    with counted_images(model, family) as more:
        engine.intervene(rows, at_layers(random_direction(0).unsqueeze(0), (1,)), lambda rows, logits: None)
    assert more == []


@pytest.mark.parametrize("name", ["paligemma2", "qwen3_vl"])
def test_the_reference_runs_the_vision_tower_for_every_candidate(name: str) -> None:
    """Control: the count sees what a plain loop over the candidates costs."""
    family = VISION_FAMILIES[name]
    model, problem = build_vision(family), make_vision_problem(family)
    with counted_images(model, family) as seen:
        solve_vision_slowly(model, family, problem)
    of_candidate = len(problem.harmful_val) + 2 * len(problem.harmless_val)
    assert sum(seen) == len(problem.inputs) + N_POSITIONS * N_LAYERS * of_candidate


@pytest.mark.parametrize("fallback", [False, True], ids=["layer-major", "hooked"])
def test_images_that_see_each_other_in_the_tower_are_embedded_one_by_one(
    fallback: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As MiniMax M3's tower does with those of a batch in transformers 5.17; alone, an image is as it was."""
    model, problem, expected = reference_case("paligemma2")

    def mixed(module: Any, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + (hidden.sum(0) - hidden)
        return output

    if fallback:
        monkeypatch.setattr(LayerMajor, "__init__", refuse)
    handle = model.get_submodule(VISION_FAMILIES["paligemma2"].tower).register_forward_hook(mixed)
    try:
        answer = solve(engine_of(model, problem, 4), problem)
    finally:
        handle.remove()
    assert "mixes prompts that are run together" in caplog.text
    assert answer.engine.name == ("hooked" if fallback else "layer-major")
    assert largest_difference(answer, expected, problem) < SCORE_TOLERANCE
