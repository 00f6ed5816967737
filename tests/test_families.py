"""On every family the package agrees with the slow reference, and ablation leaves nothing in the stream."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from refusal_direction.engine import Intervention, Row
from refusal_direction.engine.interventions import ablated
from tests.candidates import at_layers
from tests.families import D_MODEL, FAMILIES, N_LAYERS, SHARING_FAMILY, Family, build, each_family, layers_of
from tests.oracles import reference, stream
from tests.problems import differences, engine_of, known, make_problem, solve, solve_slowly

SCORE_TOLERANCE = 1e-4
LEAK_TOLERANCE = 1e-5

every_family = each_family()
every_family_and_sharing = pytest.mark.parametrize(
    "family", [*FAMILIES.values(), SHARING_FAMILY], ids=[*FAMILIES, "gemma4"]
)
post_norm_family = pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2", "glm4"])


def random_direction(seed: int, rows: int | None = None) -> Tensor:
    shape = (D_MODEL,) if rows is None else (rows, D_MODEL)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 3, tokens: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(12, 160, (rows, tokens), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@every_family
def test_candidates_and_scores_agree_with_the_slow_reference(name: str) -> None:
    family, problem = FAMILIES[name], make_problem()
    model = build(family)
    answer = solve(engine_of(model, problem, batch_size=6), problem)
    expected = solve_slowly(model, family, problem)
    assert answer.engine.name == "layer-major"
    assert max(differences(answer, expected, problem).values()) < SCORE_TOLERANCE


@every_family
def test_reference_scores_move_under_the_interventions(name: str) -> None:
    """Control of the agreement: the scores compared there are not all the same."""
    family, problem = FAMILIES[name], make_problem()
    expected = solve_slowly(build(family), family, problem)
    above_embedding = slice(1, None)  # every prompt has the same embeddings at the positions looked at
    for scores, baseline in (
        (expected.ablation, expected.baseline_harmful),
        (expected.steering, expected.baseline_harmless),
        (expected.kl, torch.zeros_like(expected.baseline_harmless)),
    ):
        moved = (scores[:, above_embedding] - baseline).abs().amax(dim=-1)
        assert (moved > 100 * SCORE_TOLERANCE).all()


@every_family_and_sharing
def test_ablated_stream_is_orthogonal_at_every_addition(family: Family) -> None:
    model, u = build(family), random_direction(1)
    layers = layers_of(model, family)
    with ablated(model, u), stream.followed(layers, u) as leaks, torch.no_grad():
        model(**batch(), use_cache=False)
    assert len(leaks.additions) >= N_LAYERS
    assert leaks.worst < LEAK_TOLERANCE


@every_family_and_sharing
def test_every_row_is_orthogonal_to_its_own_direction_at_every_addition(family: Family) -> None:
    model, u = build(family), random_direction(2, rows=3)
    with ablated(model, u), stream.followed(layers_of(model, family), u) as leaks, torch.no_grad():
        model(**batch(rows=3), use_cache=False)
    assert leaks.worst < LEAK_TOLERANCE
    with ablated(model, u), stream.followed(layers_of(model, family), u.roll(1, 0)) as others, torch.no_grad():
        model(**batch(rows=3), use_cache=False)
    assert min(others.additions) > 100 * LEAK_TOLERANCE  # control: no row lost another row's direction


@every_family
def test_stream_in_the_engine_is_orthogonal_at_every_addition(name: str) -> None:
    family, problem = FAMILIES[name], make_problem()
    model, u = build(family), random_direction(3)
    engine = engine_of(model, problem, batch_size=4)
    rows = [Row(prompt, Intervention.ABLATION, 0) for prompt in range(len(problem.inputs))]
    one = at_layers(u.unsqueeze(0), (1,))
    engine.intervene(rows, one, lambda rows, logits: None)  # tries a shortcut on made-up outputs, which are no stream
    with stream.followed(layers_of(model, family), u) as leaks:
        engine.intervene(rows, one, lambda rows, logits: None)
    assert len(leaks.additions) >= N_LAYERS
    assert leaks.worst < LEAK_TOLERANCE
    assert engine.leak < LEAK_TOLERANCE


@every_family
def test_plain_stream_is_not_orthogonal(name: str) -> None:
    """Control: the oracle sees what ablation takes away."""
    family = FAMILIES[name]
    model, u = build(family), random_direction(1)
    with stream.followed(layers_of(model, family), u) as leaks, torch.no_grad():
        model(**batch(), use_cache=False)
    assert min(leaks.additions) > 100 * LEAK_TOLERANCE


@post_norm_family
def test_hooking_module_outputs_as_published_code_does_leaks_where_a_norm_follows(name: str) -> None:
    """Control: the oracle tells the writes from the modules before them."""
    family = FAMILIES[name]
    model, u = build(family), random_direction(1)
    published = known(model, family, writes=("self_attn", "mlp"))
    with reference.ablated(published, u), stream.followed(published.layers, u) as leaks, torch.no_grad():
        model(**batch(), use_cache=False)
    assert leaks.worst > 0.01
    assert max(leaks.inputs[:1]) < LEAK_TOLERANCE  # the embedding is clean


@post_norm_family
def test_scores_of_module_output_hooks_differ_where_a_norm_follows(name: str) -> None:
    """Control: the agreement with the reference would fail if the wrong modules were hooked."""
    family, problem = FAMILIES[name], make_problem()
    model, u = build(family), random_direction(1)

    def logits(writes: tuple[str, ...]) -> Tensor:
        with reference.ablated(known(model, family, writes), u):
            return reference.logits_of(known(model, family), problem.harmful_val)[:, -1]

    assert (logits(family.writes) - logits(("self_attn", "mlp"))).abs().max() > 0.01


@every_family
def test_reference_does_not_depend_on_padding(name: str) -> None:
    """The oracle's padded batches give what single prompts give."""
    family, problem = FAMILIES[name], make_problem()
    model: PreTrainedModel = build(family)
    together = reference.logits_of(known(model, family), problem.harmful_val)[:, -1]
    apart = [reference.logits_of(known(model, family), [prompt])[0, -1] for prompt in problem.harmful_val]
    assert torch.allclose(together, torch.stack(apart), atol=1e-5, rtol=1e-5)


def test_oracles_and_families_import_nothing_of_the_package() -> None:
    oracles = Path(reference.__file__).parent
    paths = [*oracles.glob("*.py"), *(oracles.parent / "families" / "tables").glob("*.py")]
    paths += [oracles.parent / "families" / f"{name}.py" for name in ("building", "sizes", "vision")]
    assert len(paths) > 10
    for path in paths:
        imported = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in imported if (node.module or "").startswith("refusal_direction")]
        assert "import refusal_direction" not in path.read_text("utf-8")
