"""A result is data: what `load_run` reads is what `extract` returned, and neither needs the model again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from refusal_direction import (
    ChatModel,
    PromptSets,
    RefusalDirectionError,
    RunResult,
    extract,
    load_chat_model,
    load_run,
    load_vision_model,
)
from refusal_direction.config import TEXT, VISION_CONFIG, Config, PromptSource, Thresholds
from refusal_direction.errors import NoCandidateError, OutputError
from refusal_direction.methods import METHODS, difference_of_means
from refusal_direction.models import loading
from refusal_direction.output import artifacts
from refusal_direction.output.artifacts import file_names
from refusal_direction.prompts import Kind, Split
from tests.conftest import SMALL
from tests.killed import Killed, kill_after
from tests.same import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.*")

FEW = replace(SMALL, prompts=PromptSource(n_train=8, n_val=6, n_test=3))
FEW_IMAGES = replace(VISION_CONFIG, prompts=PromptSource(n_train=8, n_val=8, n_test=3))

kls = st.sampled_from([math.inf, 10.0, 3, -1])
steerings = st.sampled_from([-math.inf, -100.0])


@pytest.fixture(scope="module", autouse=True)
def _second_method() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "reversed", lambda harmful, harmless: difference_of_means(harmless, harmful))
        yield


@cache
def demo(*, images: bool) -> ChatModel:
    """A demo model; no fixture, since hypothesis would show it whole."""
    return load_vision_model("demo") if images else load_chat_model("demo")


@pytest.fixture(scope="module")
def kept(chat: ChatModel, prompts: PromptSets) -> RunResult:
    """The small run with its activations."""
    return extract(chat, replace(SMALL, keep_activations=True), prompts=prompts)


def assert_read_back_alike(run: RunResult) -> None:
    """Assert that a run is the same after a detour through files."""
    with TemporaryDirectory() as folder:
        artifacts.write(run, folder)
        loaded = load_run(folder)
        assert_same(run, loaded)
        assert str(loaded) == str(run)
        if run.selection.index is None:
            with pytest.raises(NoCandidateError) as ours:
                run.direction.vector.norm()
            with pytest.raises(NoCandidateError) as theirs:
                loaded.direction.vector.norm()
            assert str(ours.value) == str(theirs.value)
            return
        assert loaded.label == run.label
        assert_same(loaded.direction, run.direction)


def thresholds_of(draw: Any) -> Thresholds:
    return Thresholds(draw(kls), draw(steerings), draw(st.sampled_from([0.0, 0.2, 0.5])))


@st.composite
def text_configs(draw: Any) -> Config:
    return replace(
        FEW,
        thresholds=thresholds_of(draw),
        methods=draw(st.sampled_from([("difference_of_means",), ("reversed",), ("difference_of_means", "reversed")])),
        search=draw(st.sampled_from([None, "exhaustive", "pruned"])),
        select=draw(st.sampled_from(["best", "nearest"])),
        skip_filter=draw(st.booleans()),
        keep_activations=draw(st.booleans()),
        refusal_tokens=draw(st.sampled_from([(), ("I",), ("I", 47)])),
        batch_size=draw(st.sampled_from([None, 64])),
    )


@st.composite
def vision_configs(draw: Any) -> Config:
    thresholds = replace(thresholds_of(draw), top_k_candidates=draw(st.sampled_from([None, 1, 15])))
    return replace(
        FEW_IMAGES,
        thresholds=replace(thresholds, kl_threshold=draw(st.sampled_from([math.inf, 0.1, 0.0]))),
        search=draw(st.sampled_from(["kl_first", "exhaustive", "pruned"])),
        skip_filter=draw(st.booleans()),
        keep_activations=draw(st.booleans()),
    )


@settings(max_examples=6)
@given(config=text_configs())
def test_load_run_gives_back_what_extract_returned(config: Config) -> None:
    assert_read_back_alike(extract(demo(images=False), config))


@settings(max_examples=5)
@given(config=vision_configs())
@pytest.mark.extended
def test_load_run_gives_back_a_run_on_images_with_text(config: Config) -> None:
    assert_read_back_alike(extract(demo(images=True), config))


@pytest.mark.parametrize("select", ["best", "nearest"])
def test_a_run_in_which_no_candidate_passes_is_given_back(chat: ChatModel, select: str) -> None:
    run = extract(chat, replace(FEW, thresholds=Thresholds(kl_threshold=-1.0), select=select))
    assert run.selection.selected_as == (None if select == "best" else "nearest")
    assert run.selection.misses
    assert_read_back_alike(run)


def test_results_that_are_older_than_a_setting_have_its_default(extraction: RunResult, tmp_path: Path) -> None:
    artifacts.write(extraction, tmp_path)
    path = tmp_path / "run.json"
    stored = json.loads(path.read_text())
    del stored["config"]["select"], stored["config"]["no_refill"], stored["prompts"]["harmful_val"]["further"]
    path.write_text(json.dumps(stored))
    assert_same(extraction, load_run(tmp_path))


def test_a_resumed_run_is_given_back_too(chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_after(1, patch)
        with pytest.raises(Killed):
            extract(chat, FEW, checkpoint_dir=tmp_path)
    assert_read_back_alike(extract(chat, replace(FEW, resume=True), checkpoint_dir=tmp_path))


@pytest.mark.parametrize("changed", ["a score", "a rejection", "a type", "a key", "a NaN"])
def test_the_comparison_sees_every_kind_of_difference(extraction: RunResult, changed: str) -> None:
    """Control."""
    selection, scores = extraction.selection, extraction.scores
    assert_same(extraction, replace(extraction, scores=replace(scores, kl=scores.kl.clone())))
    other = {
        "a score": {"scores": replace(scores, kl=scores.kl + 1e-12)},
        "a rejection": {"selection": replace(selection, rejections=selection.rejections[::-1])},
        "a type": {"warnings": list(extraction.warnings)},
        "a key": {"seconds": {**extraction.seconds, "more": 0.0}},
        "a NaN": {"selection": replace(selection, noise=replace(selection.noise, kl_div=math.nan))},
    }[changed]
    with pytest.raises(AssertionError):
        assert_same(extraction, replace(extraction, **other))  # type: ignore[arg-type]


# The table


def test_the_table_needs_no_model(extraction: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts.write(extraction, tmp_path)

    def fail(*args: object, **named: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(torch.nn.Module, "__init__", fail)
    monkeypatch.setattr(torch.nn.Module, "__call__", fail)
    assert str(load_run(tmp_path)) == str(extraction)
    with pytest.raises(RefusalDirectionError, match="a model was made"):  # control
        load_chat_model("demo")


def test_printing_a_loaded_run_shows_the_very_table(
    extraction: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts.write(extraction, tmp_path)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    print(load_run(tmp_path))
    assert capsys.readouterr().out == f"{extraction}\n"


# Activations


def test_candidates_are_the_difference_of_the_means_of_the_activations_kept(kept: RunResult, tmp_path: Path) -> None:
    artifacts.write(kept, tmp_path)
    stored = load_file(tmp_path / "activations.safetensors")
    assert set(stored) == {"harmful", "harmless"}
    means = []
    for kind in Kind:
        record, activations = kept.prompts[kind, Split.TRAIN], stored[kind.value]
        assert activations.shape == (24, kept.model.n_positions, kept.model.n_layers, kept.model.d_model)
        means.append(activations[list(record.kept)].double().mean(0))
    candidates = torch.load(tmp_path / "candidate_directions.pt", weights_only=True)
    torch.testing.assert_close((means[0] - means[1]).float(), candidates, atol=1e-6, rtol=1e-5)
    assert candidates.norm() > 1


def test_stored_activations_are_read_one_kind_at_a_time(
    kept: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts.write(kept, tmp_path)
    loaded = load_run(tmp_path)
    artifacts.write(replace(kept, activations={kind: 2 * kept.activations[kind] for kind in Kind}), tmp_path)
    assert loaded.activations is not None  # and its file stays open: another run in the folder does not change it
    assert list(loaded.activations) == list(Kind)
    assert_same(kept.activations, loaded.activations)


def test_a_run_without_activations_removes_those_of_an_earlier_one(
    kept: RunResult, extraction: RunResult, tmp_path: Path
) -> None:
    artifacts.write(kept, tmp_path)
    artifacts.write(extraction, tmp_path)
    assert not (tmp_path / "activations.safetensors").exists()
    save_file({"harmful": torch.zeros(1)}, tmp_path / "activations.safetensors")
    assert load_run(tmp_path).activations is None


# Files that are not as they were written


@pytest.mark.parametrize("name", [name for name in file_names(TEXT) if name != "refusal_direction.pt"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_explained(extraction: RunResult, tmp_path: Path, name: str, content: bytes) -> None:
    artifacts.write(extraction, tmp_path)
    (tmp_path / name).write_bytes(content)
    if name == "direction_metadata.json":  # made for readers; load_run takes nothing from it
        assert_same(extraction, load_run(tmp_path))
        return
    with pytest.raises(OutputError, match="cannot be read"):
        load_run(tmp_path)


def test_results_of_another_schema_are_explained(extraction: RunResult, tmp_path: Path) -> None:
    artifacts.write(extraction, tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 1}))
    with pytest.raises(OutputError, match=r"schema version 1, not 2\)\. Run it again"):
        load_run(tmp_path)
