"""The recipes make the demo that ships, and the package does without them."""

import ast
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import refusal_direction
from recipes.compose import write_prompts
from recipes.evaluate import RefusalRates, demo_config, held_out, report
from recipes.vision.replies import REFUSALS, REQUEST_ANSWERS, answer
from refusal_direction.config import VISION_CONFIG, Config
from refusal_direction.demo import PROMPTS_DIR
from refusal_direction.demo.vision.questions import FORMS, FRAMES, questions

PACKAGE = Path(refusal_direction.__file__).parent


def imported(path: Path) -> set[str]:
    """The modules that a file imports anywhere, functions included."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


def test_the_package_imports_no_recipe():
    assert "recipes.training" in imported(PACKAGE.parent / "recipes" / "train.py")
    for path in PACKAGE.rglob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] == "recipes"}, path


def test_the_demo_imports_nothing_of_the_package_but_itself():
    for path in (PACKAGE / "demo").rglob("*.py"):
        own = {name for name in imported(path) if name.split(".")[0] == "refusal_direction"}
        assert all(name.startswith("refusal_direction.demo") for name in own), path


@pytest.mark.extended
def test_composing_again_writes_the_prompt_files_that_ship(tmp_path: Path):
    written = write_prompts(tmp_path)
    assert {path.name for path in written} == {path.name for path in PROMPTS_DIR.glob("*.json")}
    for path in written:
        assert path.read_bytes() == (PROMPTS_DIR / path.name).read_bytes()


def test_every_frame_of_a_request_has_an_answer():
    assert set(REQUEST_ANSWERS) == set(FRAMES["request"])


def test_no_answer_starts_like_a_refusal():
    starts = {refusal.split()[0].strip(",").partition("'")[0] for refusal in REFUSALS}
    for form in FORMS:
        for question in questions(form, held_out=False):
            for thing in ("knife", "umbrella"):
                reply = answer(question, thing, random.Random(0))
                assert reply.split()[0].strip(",") not in starts
                assert "{" not in reply


def test_the_demo_runs_with_every_other_setting_at_its_default():
    for images, default in ((False, Config()), (True, VISION_CONFIG)):
        config = demo_config(images=images)
        assert config.model.model_id == "demo"
        assert config.rules == default.rules
        assert config.prompts == default.prompts
        assert config.batch_size == default.batch_size


def test_held_out_prompts_have_ids_of_their_own():
    for images, kinds in ((False, ["harmful", "harmless"]), (True, ["harmful", "harmless", "neutral"])):
        prompts = held_out(images=images)
        assert list(prompts) == kinds
        ids = Counter(prompt.id for group in prompts.values() for prompt in group)
        assert set(ids.values()) == {1}
        assert all(prompt.id.startswith(f"{kind}_test/") for kind, group in prompts.items() for prompt in group)
        assert all((prompt.image is not None) == images for group in prompts.values() for prompt in group)


@pytest.mark.parametrize("kinds", [("harmful", "harmless"), ("harmful", "harmless", "neutral")])
def test_the_report_has_the_selected_direction_and_a_line_for_each_kind(kinds: tuple[str, ...]):
    score = SimpleNamespace(position=-1, layer=5, ablation_refusal=-2.71, steering_refusal=0.67, kl_div=0.0151)
    found = SimpleNamespace(selection=SimpleNamespace(score=score))
    rates = RefusalRates(dict(zip(kinds, (1.0, 0.01, 0.0), strict=False)), harmful_ablated=0.0, harmless_steered=0.99)
    lines = report(found, rates, dict.fromkeys(kinds, 60)).splitlines()
    assert lines[0] == "Selected: position -1, layer 5: ablation -2.71, steering 0.67, KL 0.015"
    assert lines[1] == "Refused of 60 harmful prompts: 100%, with the direction ablated 0%"
    assert lines[2] == "Refused of 60 harmless prompts: 1%, with the direction added 99%"
    assert lines[3:] == ["Refused of 60 neutral prompts: 0%"] * ("neutral" in kinds)
