"""Further prompts: drawn in the order of the reserves until enough pass, whatever the rounds, and measured as the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal_direction import ChatModel, PromptSets, RunResult, demo, extract, load_run
from refusal_direction.config import VISION_CONFIG, Config, ModelSource, PromptSource, Thresholds
from refusal_direction.engine import Engine
from refusal_direction.errors import TooFewPromptsError
from refusal_direction.output import artifacts
from refusal_direction.output import text as report
from refusal_direction.pipeline import prepared
from refusal_direction.prompts import gather
from refusal_direction.prompts.sets import SETS_FOR_SELECTION, Kind, Prompt, PromptSet, Split
from refusal_direction.scoring.baseline import Baseline
from refusal_direction.scoring.metrics import Measure
from refusal_direction.selection.refill import count_further, refill
from tests.same import assert_same

HARMFUL_TRAIN, HARMFUL_VAL = (Kind.HARMFUL, Split.TRAIN), (Kind.HARMFUL, Split.VALIDATION)


@pytest.mark.parametrize(
    ("passing", "drawn", "further"),
    [
        (16, 32, 0),  # half
        (32, 32, 0),
        (15, 32, 46),  # 17 more, at 16 of 34, and a quarter over it
        (0, 32, 224),  # at most eight times 32 in all
        (31, 40, 2),  # begun, and so filled up
        (32, 40, 0),
        (4, 256, 0),  # enough is enough
    ],
)
def test_the_prompts_to_run_follow_from_the_share_that_passes(passing: int, drawn: int, further: int) -> None:
    assert count_further(passing, drawn, asked=32, left=1000) == further
    assert count_further(passing, drawn, asked=32, left=3) == min(further, 3)
    assert count_further(passing, drawn, asked=32, left=0) == 0


def as_sets(passes: dict[PromptSet, list[bool]], asked: dict[PromptSet, int]) -> PromptSets:
    """Prompts whose text says whether they pass: the first of each set as drawn, the others in reserve."""
    made = {
        which: tuple(
            Prompt(f"{which[0].value}/{which[1].value}/{index}", f"{one} {which} {index}")
            for index, one in enumerate(members)
        )
        for which, members in passes.items()
    }
    return PromptSets.of(
        {which: members[: asked[which]] for which, members in made.items()},
        {which: members[asked[which] :] for which, members in made.items()},
    )


def baseline_of(prompts: PromptSets) -> Baseline:
    """A baseline in which each number tells its prompt."""
    indices, everyone = prompts.indices(), prompts.for_selection
    sign = {which: 1.0 if which[0] is Kind.HARMFUL else -1.0 for which in SETS_FOR_SELECTION}
    refusal = torch.tensor(
        [sign[which] * (1.0 if prompts[which][i].text.startswith("True") else -1.0) for which in indices for i in range(len(prompts[which]))]
    ).double()  # fmt: skip
    marks = torch.tensor([float(hash(prompt.id) % 2**20) for prompt in everyone]).double()
    train = [index for kind in Kind for index in indices[kind, Split.TRAIN]]
    return Baseline(
        refusal=refusal,
        probability=marks,
        activations=marks[train].view(-1, 1, 1, 1),
        activations_of=tuple(train),
        logits={index: marks[index : index + 1] for index in indices[Kind.HARMLESS, Split.VALIDATION]},
    )


def plain_length(passes: list[bool], asked: int) -> int:
    """Draw one by one until as many pass as were asked for."""
    length = asked
    if 2 * sum(passes[:asked]) >= asked:
        return length
    while sum(passes[:length]) < asked and length < len(passes):
        length += 1
    return length


@st.composite
def pools(draw: st.DrawFn) -> tuple[dict[PromptSet, list[bool]], dict[PromptSet, int]]:
    asked = {which: draw(st.integers(1, 9)) for which in SETS_FOR_SELECTION}
    passes = {
        which: draw(st.lists(st.sampled_from([True, False, False]), min_size=size, max_size=8 * size))
        for which, size in asked.items()
    }
    return passes, asked


@settings(max_examples=30)
@given(pools())
def test_a_refilled_set_is_that_of_a_draw_one_by_one(
    problem: tuple[dict[PromptSet, list[bool]], dict[PromptSet, int]],
) -> None:
    passes, asked = problem
    prompts, rounds = as_sets(passes, asked), []

    def measure(more: PromptSets) -> Baseline:
        rounds.append(more)
        return baseline_of(more)

    found = refill(prompts, baseline_of(prompts), measure)
    assert len(rounds) <= 3
    for which, members in passes.items():
        length, expected = len(found.prompts[which]), plain_length(members, asked[which])
        assert length == expected or (len(rounds) == 3 and length < expected)
        everyone = (*prompts[which], *prompts.reserves[which])
        assert found.prompts[which] == everyone[:length]
        assert found.prompts.reserves[which] == everyone[length:]
    assert_same(baseline_of(found.prompts), found.baseline)  # each number still tells its prompt
    if not rounds:
        assert found.prompts is prompts


def test_without_reserves_nothing_is_drawn() -> None:
    prompts = PromptSets(*([f"False {name} {index}" for index in range(4)] for name in "abcd"))
    assert refill(prompts, baseline_of(prompts), lambda more: pytest.fail("prompts were run")).prompts is prompts


# On the demo model, with a pool of harmful prompts most of which are harmless


ANYTHING = Thresholds(kl_threshold=100.0, induce_threshold=-100.0)
CONFIG = Config(
    model=ModelSource("demo"),
    prompts=PromptSource(n_train=8, n_val=8, n_test=3, seed=5),
    thresholds=ANYTHING,
    search="pruned",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Prompt files: of those called harmful, the model refuses one in five."""
    folder = tmp_path_factory.mktemp("own")
    harmful, harmless = (
        json.loads((demo.PROMPTS_DIR / f"{kind.value}_train.json").read_text(encoding="utf-8")) for kind in Kind
    )
    (folder / "bad.json").write_text(json.dumps([*harmful[:55], *harmless[:225]]))
    (folder / "good.json").write_text(json.dumps(harmless[225:]))
    files = replace(CONFIG.prompts, harmful=folder / "bad.json", harmless=folder / "good.json")
    return replace(CONFIG, prompts=files)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of the run below."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def refilled(chat: ChatModel, own: Config, checkpoints: Path) -> RunResult:
    return extract(chat, own, checkpoint_dir=checkpoints)


def test_where_fewer_than_half_pass_further_prompts_are_drawn_until_as_many_pass(
    refilled: RunResult, own: Config
) -> None:
    drawn = gather(own)
    for which in SETS_FOR_SELECTION:
        record = refilled.prompts[which]
        everyone = (*drawn[which], *drawn.reserves[which])
        assert record.ids == tuple(prompt.id for prompt in everyone[: len(record.ids)])
        assert record.further == len(record.ids) - len(drawn[which])
        assert (record.further > 0) == (which[0] is Kind.HARMFUL)
        assert len(record.kept) == len(drawn[which])
    assert refilled.prompts[HARMFUL_VAL].kept[-1] == len(refilled.prompts[HARMFUL_VAL].ids) - 1
    sentence = " ".join(str(refilled).split())
    n_train, n_val = (len(refilled.prompts[which].ids) for which in (HARMFUL_TRAIN, HARMFUL_VAL))
    assert (
        f"8 of {n_train} harmful training prompts and 8 of {n_val} harmful validation prompts are refused" in sentence
    )
    assert not [warning for warning in refilled.warnings if "standard error" in warning]


def test_scores_of_a_refilled_run_are_those_of_the_same_prompts_given(
    chat: ChatModel, refilled: RunResult, own: Config
) -> None:
    """Candidates, scores and baseline, whichever engine ran the prompts."""
    drawn = gather(own)
    every = drawn.extended({which: refilled.prompts[which].further for which in SETS_FOR_SELECTION})
    given_sets = extract(chat, own, prompts=replace(every, reserves={}))
    assert torch.allclose(given_sets.candidates.vectors, refilled.candidates.vectors, atol=1e-5)
    for measure in Measure:
        assert torch.allclose(given_sets.scores.of(measure), refilled.scores.of(measure), atol=1e-4, equal_nan=True)
    for which, record in given_sets.prompts.items():
        ours = refilled.prompts[which]
        assert (record.ids, record.kept, record.sha256) == (ours.ids, ours.kept, ours.sha256)
        assert torch.allclose(record.refusal, ours.refusal, atol=1e-4, equal_nan=True)
    assert given_sets.label == refilled.label
    assert [record.further for record in given_sets.prompts.values()] == [0] * 6


def test_a_refilled_run_is_given_back_from_its_files(refilled: RunResult, tmp_path: Path) -> None:
    artifacts.write(refilled, tmp_path)
    loaded = load_run(tmp_path)
    assert_same(refilled, loaded)
    assert str(loaded) == str(refilled)
    stored = json.loads((tmp_path / "run.json").read_text())["prompts"]["harmful_val"]
    assert (stored["drawn"], stored["kept"]) == (8 + stored["further"], 8)


def test_completions_are_of_prompts_drawn_further_too(
    chat: ChatModel, refilled: RunResult, own: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def compared(chat: ChatModel, prompts: list[Prompt], *args: object) -> Iterator[tuple[Prompt, str, str]]:
        shown.extend(prompt.id for prompt in prompts)
        return iter(())

    monkeypatch.setattr(report, "_compared", compared)
    report.completions(refilled, chat, gather(own))
    kept = [refilled.prompts[kind, Split.VALIDATION].kept_ids for kind in Kind]
    assert tuple(shown) == (*kept[0], *kept[1])


def test_the_published_protocol_draws_no_further_prompts(chat: ChatModel, own: Config) -> None:
    for config in (replace(own, no_refill=True), replace(own, skip_filter=True)):
        with prepared(chat, config) as ready:
            assert ready.prompts == gather(own)
            assert ready.prompts.reserves == {}
    with pytest.raises(TooFewPromptsError, match="of 8 harmful_train"):
        extract(chat, replace(own, no_refill=True))


def test_too_few_prompts_are_too_few_after_all_were_drawn(chat: ChatModel, own: Config) -> None:
    tokens = replace(own, refusal_tokens=("a",))
    with pytest.raises(TooFewPromptsError, match="0 of 64 harmful_train.*0 of 64 harmful_val"):
        extract(chat, replace(tokens, prompts=replace(own.prompts, n_test=0)))


@pytest.mark.parametrize(("lost", "run_again"), [("*", {"baseline", "intervene"}), ("nothing", set())])
def test_a_refilled_run_resumes(
    lost: str,
    run_again: set[str],
    chat: ChatModel,
    refilled: RunResult,
    own: Config,
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    for part in tmp_path.rglob(f"{lost}.safetensors"):
        if part.name != "baseline.safetensors":  # of the prompts drawn first
            part.unlink()
    ran: set[str] = set()
    for name in ("baseline", "intervene"):
        run = getattr(Engine, name)
        monkeypatch.setattr(Engine, name, lambda *a, _run=run, _name=name, **k: (ran.add(_name), _run(*a, **k))[1])
    found = extract(chat, replace(own, resume=True), checkpoint_dir=tmp_path)
    assert ran == run_again
    assert_same(refilled.scores, found.scores)
    assert_same(refilled.prompts, found.prompts)


@pytest.mark.extended
def test_scores_of_other_prompts_are_not_taken_for_those_of_a_refilled_run(
    chat: ChatModel, refilled: RunResult, own: Config, checkpoints: Path, tmp_path: Path
) -> None:
    """The first prompts, and so the fingerprint, are the same."""
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    drawn = gather(own)
    other = replace(drawn, reserves={**drawn.reserves, HARMFUL_VAL: drawn.reserves[HARMFUL_VAL][::-1]})
    found = extract(chat, replace(own, resume=True), prompts=other, checkpoint_dir=tmp_path)
    expected = extract(chat, own, prompts=other)
    assert torch.equal(found.candidates.vectors, refilled.candidates.vectors)  # control: only validation prompts differ
    assert found.prompts[HARMFUL_VAL].ids != refilled.prompts[HARMFUL_VAL].ids
    assert_same(expected.scores, found.scores)
    assert_same(expected.prompts, found.prompts)


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.*")
def test_images_with_text_are_refilled_before_the_most_fitting_are_taken() -> None:
    few = PromptSource(n_train=8, n_val=8, n_test=3)
    config = replace(VISION_CONFIG, model=ModelSource("demo"), prompts=few, search="pruned")
    drawn = gather(config)
    answered = drawn.reserves[Kind.HARMLESS, Split.VALIDATION][:6]
    found = extract("demo", config, prompts=replace(drawn, harmful_val=(*drawn.harmful_val[:2], *answered)))
    record = found.prompts[HARMFUL_VAL]
    assert (record.kept[:2], len(record.kept), record.further) == ((0, 1), 8, 6)
    assert not [warning for warning in found.warnings if "most fitting" in warning]
