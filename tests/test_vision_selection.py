"""The vision-language rules to the letter: finalists by KL, the relative steering threshold, the filter's minimum."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refusal_direction.candidates import CandidateLabel
from refusal_direction.config import VISION, VISION_CONFIG, Config, Thresholds
from refusal_direction.prompts.sets import Kind, PromptSet, Split
from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions, Rejection
from refusal_direction.selection.decision import Decision, decide, explain_no_candidate, finalists, relax_layer_and_kl
from refusal_direction.selection.filter import filter_prompts

NAN = float("nan")
N_LAYERS = 10
LIMIT = 8
"""Layers from here on are cut off, by the default threshold."""
DEFAULT = VISION_CONFIG.thresholds
HARMFUL_TRAIN, HARMFUL_VALIDATION = (Kind.HARMFUL, Split.TRAIN), (Kind.HARMFUL, Split.VALIDATION)
HARMLESS_TRAIN, HARMLESS_VALIDATION = (Kind.HARMLESS, Split.TRAIN), (Kind.HARMLESS, Split.VALIDATION)

with_caplog = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
some_nan = st.one_of(st.floats(-20, 20), st.just(NAN))
few_values = st.sampled_from([-3.0, -1.0, 0.0, 1.0, 2.5])  # so that there are ties


def scored(kl: Sequence[float], ablation: Sequence[float] = (), steering: Sequence[float] = ()) -> list[CandidateScore]:
    """Candidates in (position, layer) order."""
    ablation, steering = ablation or [0.0] * len(kl), steering or [0.0] * len(kl)
    return [
        CandidateScore(CandidateLabel("test", index % N_LAYERS, index // N_LAYERS - 3), a, s, k)
        for index, (k, a, s) in enumerate(zip(kl, ablation, steering, strict=True))
    ]


@st.composite
def candidates(draw: st.DrawFn, kl: st.SearchStrategy[float], ablation: st.SearchStrategy[float] = few_values):
    size = draw(st.integers(1, 3 * N_LAYERS))

    def column(values: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(values, min_size=size, max_size=size))

    return scored(column(kl), column(ablation), column(few_values))


def survivors(
    scores: Sequence[CandidateScore], top_k: int, *, thresholds: Thresholds = DEFAULT, zero: Container[int] = ()
) -> list[int]:
    """The finalists by the package, after it has dropped the conditions that none of the candidates meets."""
    config = Config(rules=VISION, thresholds=replace(thresholds, top_k_candidates=top_k))
    conditions, is_zero = Conditions.of(config, N_LAYERS, 0.0), [index in zero for index in range(len(scores))]
    return finalists(scores, relax_layer_and_kl(scores, conditions, is_zero), is_zero)


def select(
    scores: Sequence[CandidateScore], considered: Sequence[int], *, induce_threshold: float = 0.0, baseline: float
) -> Decision:
    """The package's decision where these candidates are the finalists: the KL of the others is higher, at any layer."""
    scores = [score if index in considered else replace(score, kl_div=0.09) for index, score in enumerate(scores)]
    thresholds = Thresholds(induce_threshold=induce_threshold, prune_layers=0.0, top_k_candidates=len(considered))
    conditions = Conditions.of(Config(rules=VISION, thresholds=thresholds), N_LAYERS, baseline)
    return decide(scores, conditions, [False] * len(scores))


def reasons(decision: Decision, n_layers: int = N_LAYERS) -> tuple[str | None, ...]:
    return tuple(
        None if rejection is None else decision.conditions.reason(rejection, n_layers)
        for rejection in decision.rejections
    )


def plain_survivors(scores: Sequence[CandidateScore], top_k: int) -> set[int]:
    """The candidates that fewer than `top_k` others go before: one of lower KL, or of equal KL and standing first."""
    pool = [i for i, score in enumerate(scores) if score.layer < LIMIT and score.kl_div <= 0.1]
    pool = pool or [i for i, score in enumerate(scores) if score.kl_div == score.kl_div]
    found = set()
    for i in pool:
        before = [j for j in pool if (scores[j].kl_div, j) < (scores[i].kl_div, i)]
        if len(before) < top_k:
            found.add(i)
    return found


# survivors of the KL


@given(candidates(st.one_of(st.floats(0, 0.3), st.sampled_from([0.02, 0.1]), st.just(NAN))), st.integers(1, 40))
def test_survivors_equal_a_plain_search(scores: list[CandidateScore], top_k: int) -> None:
    found = survivors(scores, top_k)
    assert found == sorted(plain_survivors(scores, top_k))


@given(candidates(st.floats(0.11, 5)), st.integers(1, 40))
def test_where_none_is_admitted_the_survivors_are_those_of_lowest_kl_of_all_layers(
    scores: list[CandidateScore], top_k: int
) -> None:
    found = survivors(scores, top_k)
    assert len(found) == min(top_k, len(scores))
    worst = max(scores[index].kl_div for index in found)
    assert all(score.kl_div >= worst for index, score in enumerate(scores) if index not in found)


@given(candidates(st.floats(0, 0.3)), st.integers(1, 40))
def test_fewer_survivors_are_among_more_survivors(scores: list[CandidateScore], top_k: int) -> None:
    few, more = (survivors(scores, top_k=size) for size in (top_k, top_k + 1))
    assert set(few) <= set(more)
    assert len(more) - len(few) <= 1


def test_at_most_fifteen_survive_by_default() -> None:
    assert DEFAULT.top_k_candidates == 15
    kl = [0.001 * index for index in range(30)]
    assert survivors(scored(kl), top_k=15) == [*range(8), *range(10, 17)]


def test_the_kl_threshold_is_included_and_the_last_layers_are_not(caplog: pytest.LogCaptureFixture) -> None:
    kl = [0.1] + [0.1000001] * 7 + [0.0, 0.0]
    assert survivors(scored(kl), top_k=15) == [0]
    assert caplog.records == []


def test_of_equal_kl_the_first_survive() -> None:
    assert survivors(scored([0.05, 0.01, 0.05, 0.05]), top_k=2) == [0, 1]


def test_survivors_stand_in_position_layer_order_whatever_their_kl() -> None:
    assert survivors(scored([0.09, 0.01, 0.08, 0.02]), top_k=3) == [1, 2, 3]


@given(candidates(st.floats(0, 0.3)), st.sets(st.integers(0, 29)))
def test_a_candidate_of_length_zero_never_survives(scores: list[CandidateScore], zero: set[int]) -> None:
    """Whatever its KL; the others survive as if it were not there."""
    found = survivors(scores, top_k=15, zero=zero)
    assert not set(found) & zero
    others = [replace(score, kl_div=NAN) if index in zero else score for index, score in enumerate(scores)]
    assert found == survivors(others, top_k=15)


def test_a_nan_kl_never_survives() -> None:
    assert survivors(scored([NAN, 0.01, NAN, 0.02]), top_k=15) == [1, 3]
    assert survivors(scored([NAN, 0.5, NAN]), top_k=15) == [1]
    assert survivors(scored([NAN, NAN]), top_k=15) == []


@with_caplog
@given(candidates(st.one_of(st.floats(0, 0.3), st.just(NAN))))
def test_the_kl_is_relaxed_with_a_warning_and_only_then(
    caplog: pytest.LogCaptureFixture, scores: list[CandidateScore]
) -> None:
    caplog.clear()
    survivors(scores, top_k=15)
    admitted = [score for score in scores if score.layer < LIMIT and score.kl_div <= 0.1]
    assert bool(caplog.records) != bool(admitted)


def test_the_warning_of_a_relaxed_kl_says_what_was_relaxed(caplog: pytest.LogCaptureFixture) -> None:
    survivors(scored([0.2, 0.3]), thresholds=Thresholds(kl_threshold=0.05, prune_layers=0.5), top_k=15)
    assert [(record.levelno, record.name) for record in caplog.records] == [
        (logging.WARNING, "refusal_direction.selection.decision")
    ]
    assert caplog.messages == ["No candidate has a KL of 0.05 or less below layer 5; those of lowest KL are used."]


# the selection among them


def plain_choice(scores: Sequence[CandidateScore], finalists: Sequence[int], floor: float) -> int | None:
    """The finalist that no other betters: by reaching the floor, by its ablation score, by standing first."""
    ranked = [
        (not scores[i].steering_refusal >= floor, scores[i].ablation_refusal, i)
        for i in finalists
        if not math.isnan(scores[i].ablation_refusal)
    ]
    return min(ranked)[2] if ranked else None


@given(
    candidates(st.just(0.01), st.one_of(few_values, st.just(NAN))),
    st.data(),
    few_values,
    st.sampled_from([0.0, 0.5, -1.0]),
)
def test_the_selection_equals_a_plain_search(
    scores: list[CandidateScore], data: st.DataObject, baseline: float, induce: float
) -> None:
    considered = sorted(data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1)))
    decision = select(scores, considered, induce_threshold=induce, baseline=baseline)
    assert decision.selected == plain_choice(scores, considered, baseline + induce)


def test_the_steering_threshold_counts_from_the_baseline(caplog: pytest.LogCaptureFixture) -> None:
    scores = scored([0.0] * 3, ablation=[-9, -8, -7], steering=[-6.1, -6.0, 3.0])
    found = [select(scores, [0, 1, 2], induce_threshold=induce, baseline=-6.0).selected for induce in (0.0, 0.5, -0.5)]
    assert found == [1, 2, 0]  # the threshold itself is enough
    assert caplog.records == []


def test_only_finalists_are_selected() -> None:
    scores = scored([0.0] * 3, ablation=[-9, -8, -7], steering=[1.0] * 3)
    assert select(scores, [1, 2], baseline=0.0).selected == 1


def test_of_equal_ablation_scores_the_first_is_selected() -> None:
    scores = scored([0.0] * 4, ablation=[-1, -5, -5, -5], steering=[1.0, -1.0, 1.0, 1.0])
    assert select(scores, [0, 1, 2, 3], baseline=0.0).selected == 2


def test_the_steering_condition_is_dropped_with_a_warning_that_says_so(caplog: pytest.LogCaptureFixture) -> None:
    scores = scored([0.0] * 3, ablation=[-1, -5, -3], steering=[-2.0] * 3)
    decision = select(scores, [0, 1, 2], induce_threshold=0.25, baseline=-1.5)
    assert decision.selected == 1
    assert decision.conditions.induce_threshold == -math.inf
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == ["No candidate reaches a steering score of -1.25 when added; the condition is dropped."]
    assert decision.rejections == (Rejection.NOT_BEST, None, Rejection.NOT_BEST)


def test_every_rejection_has_its_reason() -> None:
    scores = scored([0.0] * 5, ablation=[-1, -5, -3, -4, -9], steering=[1.0, -2.0, 1.0, -2.0, 1.0])
    decision = select(scores, [0, 1, 2, 3], baseline=0.0)
    below, beaten = "steering score below the baseline", "another's ablation score is lower"
    assert reasons(decision) == (beaten, below, None, below, "not among those of lowest KL")


def test_the_reason_is_the_condition_that_was_broken() -> None:
    """Not that its KL was too high where it was none of that."""
    scores = [
        replace(score, label=CandidateLabel("test", layer))
        for layer, score in enumerate(
            scored(
                [0.01, 0.02, 0.03, 0.0, NAN, 0.2, 0.001],
                ablation=[-1.0, -2.0, *[NAN] * 5],
                steering=[1.0, -2.0, *[NAN] * 5],
            )
        )
    ]
    thresholds = Thresholds(top_k_candidates=2)
    conditions = Conditions.of(Config(rules=VISION, thresholds=thresholds), 8, 0.0)
    decision = decide(scores, conditions, [index == 3 for index in range(7)])
    assert reasons(decision, 8) == (
        None,
        "steering score below the baseline",
        "not among those of lowest KL",
        "length zero",
        "a score is NaN",
        "KL > 0.1 (--kl_threshold)",
        "layer >= 6 (--prune_layers 0.2)",
    )


def test_candidates_that_were_not_scored_are_never_selected(caplog: pytest.LogCaptureFixture) -> None:
    scores = scored([0.0] * 3, ablation=[NAN, -1, -2], steering=[5.0, 1.0, NAN])
    assert select(scores, [0, 1, 2], baseline=0.0).selected == 1
    alone = select(scores, [0], baseline=0.0)
    assert alone.selected is None
    assert "No candidate has all of its scores" in explain_no_candidate(scores, alone, [False] * 3, N_LAYERS)
    assert caplog.records == []


def test_where_every_kl_is_nan_none_is_selected_and_one_warning_given(caplog: pytest.LogCaptureFixture) -> None:
    scores = scored([NAN] * 3, ablation=[-1] * 3, steering=[1.0] * 3)
    conditions = relax_layer_and_kl(scores, Conditions.of(VISION_CONFIG, N_LAYERS, 0.0), [False] * 3)
    assert decide(scores, conditions, [False] * 3).rejections == (Rejection.NAN,) * 3
    assert len(caplog.messages) == 1


def test_a_candidate_whose_steering_score_is_nan_is_not_selected_when_the_condition_is_dropped() -> None:
    scores = scored([0.0] * 2, ablation=[-9, -1], steering=[NAN, -4.0])
    assert select(scores, [0, 1], baseline=0.0).selected == 1


# the filter's minimum


def plain_filter(refusal: Sequence[float], members: Sequence[int], sign: int, least: int) -> list[int]:
    """Those on the right side of zero, or, if these are too few, those that fewest others fit better than."""
    kept = [i for i in members if sign * refusal[i] > 0]
    if len(kept) >= min(least, len(members)):
        return kept
    order = {i: place for place, i in enumerate(members)}
    better = {i: sum((-sign * refusal[j], order[j]) < (-sign * refusal[i], order[i]) for j in members) for i in members}
    return [i for i in members if better[i] < min(least, len(members))]


@given(st.lists(st.one_of(st.floats(-20, 20), few_values), min_size=2, max_size=60), st.data())
def test_the_filter_equals_a_plain_search(refusal: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(refusal) - 1))
    sets = {HARMFUL_TRAIN: list(range(cut)), HARMLESS_VALIDATION: list(range(cut, len(refusal)))}
    kept = filter_prompts(torch.tensor(refusal, dtype=torch.float64), sets, rules=VISION)
    assert kept == {
        HARMFUL_TRAIN: plain_filter(refusal, sets[HARMFUL_TRAIN], 1, 8),
        HARMLESS_VALIDATION: plain_filter(refusal, sets[HARMLESS_VALIDATION], -1, 8),
    }


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=40), st.sampled_from([HARMFUL_VALIDATION, HARMLESS_TRAIN]))
def test_at_least_eight_are_left_or_all_there_are(refusal: list[float], which: PromptSet) -> None:
    kept = filter_prompts(torch.tensor(refusal), {which: list(range(len(refusal)))}, rules=VISION)[which]
    assert len(kept) >= min(8, len(refusal))
    assert kept == sorted(set(kept))


def test_a_set_filled_up_is_warned_of_and_the_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    harmful = [1.0] * 7 + [-0.1, -0.3, -0.2]
    harmless = [-1.0] * 8 + [1.0, 2.0]
    sets = {HARMFUL_VALIDATION: list(range(10)), HARMLESS_VALIDATION: list(range(10, 20))}
    kept = filter_prompts(torch.tensor(harmful + harmless), sets, rules=VISION)
    assert kept == {HARMFUL_VALIDATION: list(range(8)), HARMLESS_VALIDATION: list(range(10, 18))}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == ["The filter left 7 of 10 harmful_val prompts; the 8 most fitting are used."]


def test_what_fills_up_keeps_those_that_fitted() -> None:
    refusal = torch.tensor([-5.0, 2.0, -4.0, 1.0, -3.0, 3.0, -2.0, -1.0, -9.0, -8.0])
    kept = filter_prompts(refusal, {HARMFUL_TRAIN: list(range(10))}, rules=VISION)[HARMFUL_TRAIN]
    assert kept == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {1, 3, 5} <= set(kept)


def test_a_small_set_is_kept_whole(caplog: pytest.LogCaptureFixture) -> None:
    kept = filter_prompts(torch.tensor([-1.0, -2.0, 3.0]), {HARMFUL_VALIDATION: [0, 1, 2]}, rules=VISION)
    assert kept == {HARMFUL_VALIDATION: [0, 1, 2]}
    assert caplog.messages == ["The filter left 1 of 3 harmful_val prompts; the 3 most fitting are used."]


@pytest.mark.parametrize(("which", "sign"), [(HARMFUL_VALIDATION, 1), (HARMLESS_VALIDATION, -1)])
def test_a_prompt_whose_score_is_nan_is_the_least_fitting(which: PromptSet, sign: int) -> None:
    refusal = sign * torch.tensor([NAN, -1.0, NAN, *[-2.0] * 7])
    assert filter_prompts(refusal, {which: list(range(10))}, rules=VISION)[which] == [1, *range(3, 10)]


def test_a_score_of_zero_fits_neither_kind() -> None:
    refusal = torch.tensor([0.0, *[1.0] * 9, 0.0, *[-1.0] * 9])
    sets = {HARMFUL_TRAIN: list(range(10)), HARMLESS_TRAIN: list(range(10, 20))}
    assert filter_prompts(refusal, sets, rules=VISION) == {
        HARMFUL_TRAIN: list(range(1, 10)),
        HARMLESS_TRAIN: list(range(11, 20)),
    }


def test_the_filter_can_be_skipped_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sets = {HARMFUL_TRAIN: [0, 1], HARMLESS_TRAIN: [2, 3]}
    assert filter_prompts(torch.full((4,), NAN), sets, skip=True, rules=VISION) == sets
    assert caplog.records == []


def test_the_minimum_is_the_rules() -> None:
    sets = {HARMFUL_TRAIN: list(range(10))}
    few = filter_prompts(-torch.arange(1.0, 11), sets, rules=replace(VISION, minimum_prompts=2))
    assert few == {HARMFUL_TRAIN: [0, 1]}
