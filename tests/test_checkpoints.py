"""Checkpoints of a run that has not ended: what they hold is used again, and nothing else is taken for it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refusal_direction import ChatModel, PromptSets, RunResult, extract, load_chat_model, load_run
from refusal_direction.config import Config, ModelSource, PromptSource, Thresholds
from refusal_direction.engine import Engine
from refusal_direction.engine.skeleton import Skeleton
from refusal_direction.fingerprint import fingerprint
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.prompts.sets import Kind, Prompt, PromptSet, Split
from refusal_direction.runtime import log as runtime_log
from refusal_direction.runtime.checkpoints import Checkpoints
from refusal_direction.runtime.store import Part
from tests import forked
from tests.conftest import SMALL
from tests.families import FAMILIES, build
from tests.killed import Killed, kill_after
from tests.problems import engine_of, make_problem, solve

PART = Part({"a": torch.arange(6.0).view(2, 3)}, seconds=1.5, leak=1e-7, warnings=("A warning.", "Another."))


def test_a_part_is_found_again_by_its_key(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "same", resume=False).save("one", PART)
    again = Checkpoints(tmp_path, "same", resume=True)
    found = again.load("one")
    assert found is not None
    assert torch.equal(found.tensors["a"], PART.tensors["a"])
    assert (found.seconds, found.leak, found.warnings) == (PART.seconds, PART.leak, PART.warnings)
    assert again.load("two") is None


def test_another_fingerprint_finds_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checkpoints(tmp_path, "one", resume=False).save("part", PART)
    assert Checkpoints(tmp_path, "other", resume=True).load("part") is None
    assert "nothing to resume" in caplog.text
    assert "another setting" in caplog.text


def test_a_run_that_does_not_resume_forgets_the_earlier_one(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "same", resume=False).save("part", PART)
    Checkpoints(tmp_path, "same", resume=False)
    assert Checkpoints(tmp_path, "same", resume=True).load("part") is None


def test_a_crash_while_writing_leaves_the_part_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path, "same", resume=False)
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        kept.save("part", PART)
    assert kept.load("part") is None


def test_a_broken_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Checkpoints(tmp_path, "same", resume=False)
    kept.save("part", PART)
    (path,) = tmp_path.rglob("part.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    assert kept.load("part") is None
    assert "computed again" in caplog.text


@pytest.mark.parametrize("damage", ["another part's", "another number", "another record"])
def test_a_part_that_was_changed_is_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoints(tmp_path, "same", resume=False)
    for key in ("one", "two"):
        kept.save(key, PART)
    assert kept.load("one") is not None  # control
    one, two = sorted(tmp_path.rglob("*.safetensors"))
    content = one.read_bytes()
    damaged = {
        "another part's": two.read_bytes(),
        "another number": content[:-1] + b"\0",
        "another record": content.replace(b"1.5", b"2.5"),
    }[damage]
    assert damaged != content
    one.write_bytes(damaged)
    assert kept.load("one") is None
    assert "it is computed again" in caplog.text


def test_the_fingerprint_is_of_all_that_matters(chat: ChatModel) -> None:
    tokens = RefusalTokens((7,), ("I",), "a test")
    config = Config(model=ModelSource("demo"))
    prompts = [chat.inputs(Prompt("", text)) for text in ("Name a colour.", "Is it 7?")]

    def of(config: Config = config, prompts: list[dict[str, Tensor]] = prompts, tokens: RefusalTokens = tokens) -> str:
        return fingerprint(config, chat, prompts, tokens)

    assert of() == of()
    others = [
        of(config=replace(config, model=replace(config.model, dtype="bfloat16"))),
        of(prompts=prompts[::-1]),
        of(prompts=[chat.inputs(Prompt("", "Name a color.")), prompts[1]]),
        of(tokens=replace(tokens, ids=(8,))),
    ]
    assert len({of(), *others}) == 5


def test_weights_that_were_trained_further_are_others() -> None:
    chat, config, tokens = (
        load_chat_model("demo"),
        Config(model=ModelSource("demo")),
        RefusalTokens((7,), ("I",), "a test"),
    )
    before = fingerprint(config, chat, [], tokens, hash_weights=True)
    assert fingerprint(config, chat, [], tokens, hash_weights=True) == before
    with torch.no_grad():
        chat.model.model.layers[3].mlp.down_proj.weight *= 0.8
    assert fingerprint(config, chat, [], tokens, hash_weights=True) != before


@pytest.mark.parametrize("change", ["other columns", "a buffer"])
def test_a_given_model_is_known_by_all_its_parts(change: str) -> None:
    chat, config, tokens = (
        load_chat_model("demo"),
        Config(model=ModelSource("demo")),
        RefusalTokens((7,), ("I",), "a test"),
    )
    wide = torch.nn.Linear(512, 512)
    chat.model.register_module("wide", wide)
    before = fingerprint(config, chat, [], tokens, hash_weights=True)
    with torch.no_grad():
        if change == "a buffer":
            chat.model.model.rotary_emb.inv_freq *= 3
        else:
            wide.weight[:, 1:] *= 0.5
    assert fingerprint(config, chat, [], tokens, hash_weights=True) != before


def test_prompts_in_another_set_are_another_run(chat: ChatModel) -> None:
    config, tokens = Config(model=ModelSource("demo")), RefusalTokens((7,), ("I",), "a test")
    harmful, harmless = ((kind, Split.VALIDATION) for kind in Kind)
    one: dict[PromptSet, list[int]] = {harmful: [0, 1], harmless: [2]}
    other: dict[PromptSet, list[int]] = {harmful: [0], harmless: [1, 2]}
    assert fingerprint(config, chat, [], tokens, sets=one) != fingerprint(config, chat, [], tokens, sets=other)


def test_where_a_model_that_was_just_loaded_lies_does_not_matter(chat: ChatModel) -> None:
    """With less free memory more of it is on disk."""
    config, tokens = Config(model=ModelSource("demo")), RefusalTokens((7,), ("I",), "a test")
    apart = replace(chat, model=deepcopy(chat.model))
    apart.model.model.layers[3].mlp.to("meta")
    assert fingerprint(config, apart, [], tokens) == fingerprint(config, chat, [], tokens)


def test_an_adapter_in_a_folder_is_known_by_its_files(chat: ChatModel, tmp_path: Path) -> None:
    tokens, config = RefusalTokens((7,), ("I",), "a test"), Config(model=ModelSource("demo", adapter=str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    before = fingerprint(config, chat, [], tokens)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"another")
    assert fingerprint(config, chat, [], tokens) != before


def test_where_nothing_can_be_kept_the_run_goes_on_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, "same", resume=False)
    kept.save("one", PART)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        kept.save("two", PART)
    kept.save("three", PART)
    assert caplog.text.count("for --resume cannot be written") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["one.safetensors"]


def test_not_even_what_is_half_written_need_be_removable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".unfinished").touch()  # a file where the folder would be
    kept = Checkpoints(tmp_path / "elsewhere", "same", resume=False)
    kept._folder = tmp_path / ".unfinished" / "same"
    kept.save("one", PART)
    assert "for --resume cannot be written" in caplog.text


def test_thresholds_and_places_do_not_matter(chat: ChatModel, tmp_path: Path) -> None:
    tokens, config = RefusalTokens((7,), ("I",), "a test"), Config(model=ModelSource("demo"))
    elsewhere = replace(
        config, output_dir=tmp_path, thresholds=replace(config.thresholds, kl_threshold=5.0), batch_size=3
    )
    assert fingerprint(config, chat, [], tokens) == fingerprint(elsewhere, chat, [], tokens)


# A run that is cut off


class Cut(Checkpoints):
    """Dies when `left` parts have been kept."""

    left = 0

    def save(self, key: str, part: Part) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        super().save(key, part)


def small_parts(name: str = "llama") -> Engine:
    engine = engine_of(build(FAMILIES[name]), make_problem())
    engine.budget.hidden_bytes = 12_000
    return engine


@pytest.mark.parametrize(
    "kept", [0, pytest.param(1, marks=pytest.mark.extended), 2, pytest.param(4, marks=pytest.mark.extended)]
)
def test_resumed_scores_are_those_of_an_uninterrupted_run(tmp_path: Path, kept: int) -> None:
    problem = make_problem()
    expected = solve(small_parts(), problem, Checkpoints(tmp_path / "whole", "run", resume=False)).scores
    cut = Cut(tmp_path, "run", resume=False)
    cut.left = kept
    with pytest.raises(Killed):
        solve(small_parts(), problem, cut)
    found = solve(small_parts(), problem, Checkpoints(tmp_path, "run", resume=True)).scores
    for ours, theirs in (
        (found.ablation, expected.ablation),
        (found.steering, expected.steering),
        (found.kl, expected.kl),
    ):
        assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))


def test_finished_parts_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem()
    first = solve(small_parts(), problem, Checkpoints(tmp_path, "run", resume=False)).scores
    monkeypatch.setattr(Engine, "baseline", lambda *_, **__: pytest.fail("pass 1 was run again"))
    monkeypatch.setattr(Engine, "intervene", lambda *_, **__: pytest.fail("pass 2 was run again"))
    again = solve(small_parts(), problem, Checkpoints(tmp_path, "run", resume=True)).scores
    assert torch.equal(again.ablation.nan_to_num(9.0), first.ablation.nan_to_num(9.0))
    assert torch.equal(again.kl.nan_to_num(9.0), first.kl.nan_to_num(9.0))


@pytest.mark.parametrize("bytes_now", [9_000, 20_000, 1_000_000])
def test_with_other_free_memory_rows_that_are_finished_are_not_run_again(
    bytes_now: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes are then cut elsewhere."""
    problem, ran, own = make_problem(), [], Engine.intervene
    monkeypatch.setattr(
        Engine, "intervene", lambda self, rows, *args, **named: (ran.extend(rows), own(self, rows, *args, **named))[1]
    )
    expected = solve(small_parts(), problem).scores
    everything, ran[:] = set(ran), []
    cut = Cut(tmp_path, "run", resume=False)
    cut.left = 3  # pass 1, and two parts of pass 2
    with pytest.raises(Killed):
        solve(small_parts(), problem, cut)
    finished = len(ran)
    engine = small_parts()
    engine.budget.hidden_bytes = bytes_now
    found = solve(engine, problem, Checkpoints(tmp_path, "run", resume=True)).scores
    assert set(ran) == everything
    assert len(everything) <= len(ran) < len(everything) + finished  # the part that was cut off is run again
    torch.testing.assert_close(found.ablation, expected.ablation, atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(found.kl, expected.kl, atol=1e-5, rtol=0, equal_nan=True)


def test_a_run_that_fell_back_resumes_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, engine = make_problem(), small_parts()
    engine._fall_back("A test.")
    cut = Cut(tmp_path, "run", resume=False)
    cut.left = 1
    with pytest.raises(Killed):
        solve(engine, problem, cut)
    again = small_parts()
    solve(again, problem, Checkpoints(tmp_path, "run", resume=True))
    assert again.name == "hooked"


# Their record


@dataclass
class Clock:
    """A clock that jumps: by 1000 s for the baseline, by 100 s for each other pass through the engine."""

    ahead: float = 0.0

    def perf_counter(self) -> float:
        return time.perf_counter() + self.ahead

    def run_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime_log, "time", self)
        for name, seconds in (("baseline", 1000.0), ("intervene", 100.0)):
            monkeypatch.setattr(Engine, name, self._delayed(getattr(Engine, name), seconds))

    def _delayed(self, own: Callable[..., None], seconds: float) -> Callable[..., None]:
        def delayed(*args: Any, **named: Any) -> None:
            own(*args, **named)
            self.ahead += seconds

        return delayed


IN_PARTS = replace(SMALL, memory_budget=6 << 20)


@pytest.fixture(scope="module")
def uninterrupted(chat: ChatModel, prompts: PromptSets, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run in several passes, on a clock that jumps, with checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        Clock().run_on(patch)
        return extract(chat, IN_PARTS, prompts=prompts, checkpoint_dir=tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(1, id="after the baseline", marks=pytest.mark.extended),
        pytest.param(3, id="midway"),
        pytest.param(None, id="at the very end", marks=pytest.mark.extended),
    ],
)
def test_a_resumed_runs_record_is_that_of_an_uninterrupted_one(
    uninterrupted: RunResult,
    parts: int | None,
    chat: ChatModel,
    prompts: PromptSets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        Clock().run_on(patch)
        kill_after(parts, patch)
        with nullcontext() if parts is None else pytest.raises(Killed):
            extract(chat, IN_PARTS, prompts=prompts, checkpoint_dir=tmp_path)
    with monkeypatch.context() as patch:
        clock = Clock()
        clock.run_on(patch)
        found = extract(chat, replace(IN_PARTS, resume=True), prompts=prompts, checkpoint_dir=tmp_path)
    whole = uninterrupted
    assert clock.ahead < sum(whole.seconds.values()) - 1000  # control: the interrupted leg was not run again
    assert whole.seconds["interventions"] > 300  # control: there are several passes
    assert set(found.seconds) == set(whole.seconds)
    for stage, seconds in whole.seconds.items():
        assert found.seconds[stage] == pytest.approx(seconds, abs=60), stage
    assert found.engine.largest_leak == pytest.approx(whole.engine.largest_leak, rel=1e-6)
    assert found.engine.largest_leak > 0
    assert found.warnings == whole.warnings
    assert found.selection.rejections == whole.selection.rejections
    for which, record in whole.prompts.items():
        assert torch.equal(found.prompts[which].refusal.nan_to_num(9.0), record.refusal.nan_to_num(9.0))


@pytest.mark.extended
def test_the_reason_for_a_fallback_is_in_a_resumed_runs_record_too(
    chat: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        IN_PARTS,
        prompts=PromptSource(n_train=4, n_val=4),
        thresholds=Thresholds(kl_threshold=10.0, induce_threshold=-100.0),
        memory_budget=None,
    )
    own = Skeleton.tail
    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "tail", lambda self, hidden, token: 1.01 * own(self, hidden, token))
        whole = extract(chat, config, checkpoint_dir=tmp_path / "whole")
        kill_after(1, patch)
        with pytest.raises(Killed):
            extract(chat, config, checkpoint_dir=tmp_path)
    found = extract(chat, replace(config, resume=True), checkpoint_dir=tmp_path)
    assert found.engine.name == whole.engine.name == "hooked"
    assert "Plain hooked forwards are used" in "".join(whole.warnings)  # control
    assert found.warnings == whole.warnings


# Real runs, really killed


def arguments(output: Path, *flags: str) -> list[str]:
    few = ["--model_id", "demo", "--n_train", "24", "--n_val", "12", "--memory_budget", "6MiB"]
    return ["extract_refusal_direction.py", *few, "--output_dir", str(output), *flags]


def finished_parts(output: Path) -> set[Path]:
    return set(output.glob(".unfinished/*/*.safetensors"))


def kill_after_one_more_part(output: Path, *flags: str, delay: float) -> None:
    before = len(finished_parts(output))
    run = forked.start(arguments(output, *flags))
    while run.poll() is None and len(finished_parts(output)) == before:
        time.sleep(0.005)
    time.sleep(delay)
    run.kill()
    run.wait()


@pytest.mark.extended  # as the tests of a run that a part ends, but by a signal and through the command line
def test_a_killed_run_goes_on_where_it_was_and_ends_alike(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forked.run(arguments(whole)).returncode == 0
    rng = random.Random(0)
    for flags in ((), ("--resume",), ("--resume",)):
        kill_after_one_more_part(killed, *flags, delay=rng.uniform(0, 0.1))
    assert finished_parts(killed)  # control: it was killed in the middle
    assert not (killed / "run.json").exists()
    done = forked.run(arguments(killed, "--resume"))
    assert done.returncode == 0, done.stderr
    assert "nothing to resume" not in done.stderr
    assert not finished_parts(killed)
    for name, expected in load_file(whole / "per_prompt_scores.safetensors").items():
        found = load_file(killed / "per_prompt_scores.safetensors")[name]
        assert torch.allclose(found, expected, atol=1e-5, equal_nan=True), name
    ours, theirs = load_run(killed), load_run(whole)
    assert ours.selection.rejections == theirs.selection.rejections
    assert ours.warnings == theirs.warnings
    assert ours.engine.largest_leak == pytest.approx(theirs.engine.largest_leak, rel=0.5)
    assert ours.engine.largest_leak > 0
