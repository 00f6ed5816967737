"""The filter and the selection rule, to the letter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refusal_direction.candidates import CandidateLabel
from refusal_direction.config import Config, Thresholds
from refusal_direction.errors import TooFewPromptsError
from refusal_direction.prompts.sets import Kind, Split
from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions, Rejection, layer_limit
from refusal_direction.selection.decision import Decision, decide, explain_no_candidate, nearest_misses
from refusal_direction.selection.filter import filter_prompts, warn_few

NAN = float("nan")
GOOD = {"ablation_refusal": -5.0, "steering_refusal": 1.0, "kl_div": 0.05}


def candidate(position: int, layer: int, **scores: float) -> CandidateScore:
    return CandidateScore(CandidateLabel("test", layer, position), **{**GOOD, **scores})


def select(scores: Sequence[CandidateScore], n_layers: int, thresholds: Thresholds = Thresholds()) -> Decision:
    """The decision by the rules for text, with no candidate of length zero."""
    conditions = Conditions.of(Config(thresholds=thresholds), n_layers, harmless_baseline=-3.0)
    return decide(scores, conditions, [False] * len(scores))


def reasons(decision: Decision, n_layers: int) -> list[str | None]:
    return [
        None if rejection is None else decision.conditions.reason(rejection, n_layers)
        for rejection in decision.rejections
    ]


def test_the_lowest_ablation_score_is_selected():
    scores = [candidate(-2, 0), candidate(-2, 1, ablation_refusal=-7.0), candidate(-1, 0, ablation_refusal=-6.0)]
    decision = select(scores, 10)
    assert decision.selected == 1
    assert decision.rejections == (Rejection.NOT_BEST, None, Rejection.NOT_BEST)
    beaten = "another's ablation score is lower"
    assert reasons(decision, 10) == [beaten, None, beaten]


def test_a_tie_goes_to_the_first():
    assert select([candidate(-2, 3), candidate(-2, 4), candidate(-1, 0)], 10).selected == 0


@pytest.mark.parametrize("name", ["ablation_refusal", "steering_refusal", "kl_div"])
def test_a_candidate_with_a_nan_is_discarded(name: str):
    decision = select([candidate(-1, 0, **{name: NAN}), candidate(-1, 1)], 10)
    assert decision.rejections == (Rejection.NAN, None)
    assert reasons(decision, 10)[0] == "a score is NaN"


def test_a_candidate_of_length_zero_is_discarded_whatever_its_scores():
    scores = [candidate(-1, 9, ablation_refusal=NAN), candidate(-1, 0, ablation_refusal=-9.0), candidate(-1, 1)]
    conditions = Conditions.of(Config(), 10, harmless_baseline=0.0)
    zero = Rejection.ZERO_LENGTH
    assert decide(scores, conditions, [True, True, False]).rejections == (zero, zero, None)


@pytest.mark.parametrize(
    ("better", "reason"),
    [
        (candidate(-1, 8, ablation_refusal=-9.0), "layer >= 8 (--prune_layers 0.2)"),
        (candidate(-1, 0, ablation_refusal=-9.0, kl_div=0.1000001), "KL > 0.1 (--kl_threshold)"),
        (candidate(-1, 0, ablation_refusal=-9.0, steering_refusal=-1e-9), "steering score < 0 (--induce_threshold)"),
    ],
)
def test_a_better_candidate_that_breaks_a_condition_is_discarded(better: CandidateScore, reason: str):
    decision = select([better, candidate(-1, 1)], 10)
    assert decision.selected == 1
    assert reasons(decision, 10) == [reason, None]


def test_of_several_conditions_that_a_candidate_breaks_the_first_is_the_reason():
    every = candidate(-1, 9, ablation_refusal=NAN, kl_div=0.2, steering_refusal=-1.0)
    conditions = Conditions.of(Config(), 10, harmless_baseline=0.0)
    order = [Rejection.ZERO_LENGTH, Rejection.NAN, Rejection.LAYER, Rejection.KL, Rejection.STEERING]
    assert list(conditions.violations(every, zero=True)) == order
    assert conditions.rejection(every) is Rejection.NAN
    assert conditions.rejection(candidate(-1, 1)) is None


def test_the_conditions_include_their_thresholds():
    edge = candidate(-1, 7, kl_div=0.1, steering_refusal=0.0)
    assert select([edge], 10).selected == 0


def test_the_cut_is_rounded_down():
    assert select([candidate(-1, 13)], 18).selected == 0
    assert select([candidate(-1, 14)], 18).rejections == (Rejection.LAYER,)


@pytest.mark.parametrize(("n_layers", "share", "limit"), [(10, 0.9, 1), (80, 0.8, 16), (28, 0.2, 22), (18, 0.2, 14)])
def test_the_cut_is_that_of_decimal_numbers(n_layers: int, share: float, limit: int):
    """In binary 10 * (1 - 0.9) is less than 1."""
    assert layer_limit(n_layers, Thresholds(prune_layers=share)) == limit


def explained(scores: Sequence[CandidateScore], decision: Decision, n_layers: int) -> str:
    return explain_no_candidate(scores, decision, [False] * len(scores), n_layers)


def test_where_none_is_admissible_the_message_counts_and_shows_the_nearest_misses():
    scores = [candidate(-1, 0, kl_div=0.13), candidate(-1, 1, steering_refusal=-0.2), candidate(-1, 9)]
    decision = select(scores, 10)
    assert decision.selected is None
    message = explained(scores, decision, 10)
    assert "1 by KL > 0.1" in message
    assert "1 by steering score < 0" in message
    assert "1 by layer >= 8" in message
    assert "position -1, layer 0 (ablation score -5.00) needs --kl_threshold 0.13" in message
    assert "position -1, layer 1 (ablation score -5.00) needs --induce_threshold -0.2" in message


def test_a_candidate_without_all_scores_or_of_length_zero_or_in_the_last_layers_is_no_near_miss():
    scores = [
        candidate(-1, 0, kl_div=NAN),
        candidate(-1, 1, steering_refusal=NAN),
        candidate(-1, 2, kl_div=0.5),
        candidate(-1, 3, kl_div=9.0, steering_refusal=-0.25),
        candidate(-1, 8, kl_div=0.11),
    ]
    conditions = Conditions.of(Config(), 10, harmless_baseline=0.0)
    (miss,) = nearest_misses(scores, conditions, [index == 2 for index in range(5)], 10)
    assert (miss.index, miss.violated) == (3, (Rejection.KL, Rejection.STEERING))
    assert miss.needs == {"kl_threshold": 9.0, "induce_threshold": -0.25}
    assert str(miss).endswith("needs --kl_threshold 9.0 --induce_threshold -0.25")


def test_of_equal_misses_the_first_is_the_nearest():
    scores = [candidate(-1, layer, kl_div=kl) for layer, kl in enumerate([0.4, 0.2, 0.3, 0.2, 0.9])]
    conditions = Conditions.of(Config(), 10, harmless_baseline=0.0)
    assert [miss.index for miss in nearest_misses(scores, conditions, [False] * 5, 10)] == [1, 3, 2]


numbers = st.floats(-20, 20, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 20)), min_size=1, max_size=8))
def test_the_thresholds_shown_for_the_nearest_miss_suffice(rows: list[tuple[float, float, float]]):
    scores = [CandidateScore(CandidateLabel("test", layer, -1), *row) for layer, row in enumerate(rows)]
    decision = select(scores, 100)
    if decision.selected is None:
        words = explained(scores, decision, 100).split("misses:\n")[1].splitlines()[0].split()
        asked = {name: float(words[words.index(name) + 1]) for name in words if name.startswith("--")}
        relaxed = Thresholds(asked.get("--kl_threshold", 0.1), asked.get("--induce_threshold", 0.0))
        assert select(scores, 100, relaxed).selected is not None


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 0.2), st.booleans()), min_size=1, max_size=30))
def test_the_selection_equals_a_plain_search(rows: list[tuple[float, float, float, bool]]):
    scores = [
        CandidateScore(CandidateLabel("test", index, -1), NAN if bad else a, s, kl)
        for index, (a, s, kl, bad) in enumerate(rows)
    ]
    allowed = [x for x in scores if not math.isnan(x.ablation_refusal) and x.kl_div <= 0.1 and x.steering_refusal >= 0]
    selected = select(scores, 100).selected
    if allowed:
        assert selected is not None
        assert scores[selected] == sorted(allowed, key=lambda x: x.ablation_refusal)[0]
    else:
        assert selected is None


HARMFUL, HARMLESS = (Kind.HARMFUL, Split.TRAIN), (Kind.HARMLESS, Split.TRAIN)
SETS = {HARMFUL: [0, 1, 2, 3, 4], HARMLESS: [5, 6, 7, 8, 9]}


def test_the_filter_keeps_refused_harmful_and_answered_harmless_prompts():
    refusal = torch.tensor([1.0, 2, -1, 3, 4, -1, -2, 0, -3, -4])
    assert filter_prompts(refusal, SETS) == {HARMFUL: [0, 1, 3, 4], HARMLESS: [5, 6, 8, 9]}


def test_too_few_prompts_left_say_how_many_of_each_and_what_to_try():
    refusal = torch.tensor([1.0, 2, -1, -3, 4, -1, -2, -1, -3, -4])
    with pytest.raises(TooFewPromptsError) as caught:
        filter_prompts(refusal, SETS)
    for part in ("3 of 5 harmful_train", "5 of 5 harmless_train", "--calibrate_refusal", "--skip_filter"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("refusal", "said", "unsaid"),
    [
        ([1.0, 2, -1, -3, 4, -1, -2, -1, -3, -4], "does refuse harmful prompts", "does answer harmless prompts"),
        ([1.0, 2, 1, 3, 4, -1, 2, -1, 3, -4], "does answer harmless prompts", "does refuse harmful prompts"),
        ([-1.0, -2, -1, -3, -4, 1, 2, 1, 3, 4], "--harmful and --harmless are swapped", "only"),
    ],
)
def test_too_few_prompts_are_explained_by_the_side_that_lacks_them(refusal: list[float], said: str, unsaid: str):
    with pytest.raises(TooFewPromptsError, match="each needs 4, or all that were asked for") as caught:
        filter_prompts(torch.tensor(refusal), SETS)
    assert said in str(caught.value)
    assert unsaid not in str(caught.value)


def test_skipping_the_filter_keeps_everything():
    assert filter_prompts(torch.full((10,), NAN), SETS, skip=True) == SETS


def test_the_minimum_counts_what_was_asked_for_and_not_what_was_drawn_in_the_end():
    refusal = torch.tensor([1.0, -1, -1, -1, 2, -1, -2, -1, -3, -4])
    with pytest.raises(TooFewPromptsError):
        filter_prompts(refusal, SETS)
    kept = filter_prompts(refusal, SETS, asked={HARMFUL: 2, HARMLESS: 5})
    assert kept == {HARMFUL: [0, 4], HARMLESS: [5, 6, 7, 8, 9]}


@pytest.mark.parametrize(
    ("kept", "asked", "warned"), [(15, 32, True), (16, 32, False), (11, 12, False), (6, 12, False), (5, 12, True)]
)
def test_a_standard_error_over_few_validation_prompts_is_warned_of(
    kept: int, asked: int, warned: bool, caplog: pytest.LogCaptureFixture
):
    few, many = (Kind.HARMFUL, Split.VALIDATION), (Kind.HARMLESS, Split.VALIDATION)
    members = {few: list(range(kept)), many: list(range(40)), HARMFUL: [0]}
    warn_few(members, {which: list(range(40)) for which in members}, {few: asked, many: 40, HARMFUL: 40})
    assert [f"only {kept} of the 40 validation prompts" in message for message in caplog.messages] == [True] * warned
    assert all("standard error" in message and "--harmful" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "refusal",
    [[-1.0] * 5 + [-1.0] * 5, [1.0] * 5 + [1.0] * 5, [-1.0] * 5 + [1.0] * 5],
    ids=["answers", "refuses", "both"],
)
def test_what_is_advised_depends_on_what_was_asked_for(refusal: list[float]):
    for calibrated in (False, True):
        with pytest.raises(TooFewPromptsError) as caught:
            filter_prompts(torch.tensor(refusal), SETS, calibrated=calibrated)
        assert ("--calibrate_refusal" in str(caught.value)) != calibrated
        assert "--refusal_tokens" in str(caught.value)
