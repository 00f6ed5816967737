"""The vision-language rules to the letter: survivors of the KL, the relative steering threshold, the filter's refill."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal_direction.selection.rules import CandidateScore, keep_fitting, select_survivor, survivors

from refusal_direction.config import VISION, Thresholds
from refusal_direction.errors import NoCandidateError

NAN = float("nan")
N_LAYERS = 10
LIMIT = 8
"""Layers from here on are cut off, by the default threshold."""
DEFAULT = Thresholds()

with_caplog = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
some_nan = st.one_of(st.floats(-20, 20), st.just(NAN))
few_values = st.sampled_from([-3.0, -1.0, 0.0, 1.0, 2.5])  # so that there are ties


def scored(kl: Sequence[float], ablation: Sequence[float] = (), steering: Sequence[float] = ()) -> list[CandidateScore]:
    """Candidates in (position, layer) order."""
    ablation, steering = ablation or [0.0] * len(kl), steering or [0.0] * len(kl)
    return [
        CandidateScore(index // N_LAYERS - 3, index % N_LAYERS, a, s, k)
        for index, (k, a, s) in enumerate(zip(kl, ablation, steering, strict=True))
    ]


@st.composite
def candidates(draw: st.DrawFn, kl: st.SearchStrategy[float], ablation: st.SearchStrategy[float] = few_values):
    size = draw(st.integers(1, 3 * N_LAYERS))

    def column(values: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(values, min_size=size, max_size=size))

    return scored(column(kl), column(ablation), column(few_values))


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
    found = survivors(scores, N_LAYERS, thresholds=DEFAULT, top_k=top_k)
    assert found == sorted(plain_survivors(scores, top_k))


@given(candidates(st.floats(0.11, 5)), st.integers(1, 40))
def test_where_none_is_admitted_the_survivors_are_those_of_lowest_kl_of_all_layers(
    scores: list[CandidateScore], top_k: int
) -> None:
    found = survivors(scores, N_LAYERS, thresholds=DEFAULT, top_k=top_k)
    assert len(found) == min(top_k, len(scores))
    worst = max(scores[index].kl_div for index in found)
    assert all(score.kl_div >= worst for index, score in enumerate(scores) if index not in found)


@given(candidates(st.floats(0, 0.3)), st.integers(1, 40))
def test_fewer_survivors_are_among_more_survivors(scores: list[CandidateScore], top_k: int) -> None:
    few, more = (survivors(scores, N_LAYERS, thresholds=DEFAULT, top_k=size) for size in (top_k, top_k + 1))
    assert set(few) <= set(more)
    assert len(more) - len(few) <= 1


def test_at_most_fifteen_survive_by_default() -> None:
    assert VISION.top_k == 15
    kl = [0.001 * index for index in range(30)]
    assert survivors(scored(kl), N_LAYERS, thresholds=DEFAULT, top_k=VISION.top_k) == [*range(8), *range(10, 17)]


def test_the_kl_threshold_is_included_and_the_last_layers_are_not(caplog: pytest.LogCaptureFixture) -> None:
    kl = [0.1] + [0.1000001] * 7 + [0.0, 0.0]
    assert survivors(scored(kl), N_LAYERS, thresholds=DEFAULT, top_k=15) == [0]
    assert caplog.records == []


def test_of_equal_kl_the_first_survive() -> None:
    assert survivors(scored([0.05, 0.01, 0.05, 0.05]), N_LAYERS, thresholds=DEFAULT, top_k=2) == [0, 1]


def test_survivors_stand_in_position_layer_order_whatever_their_kl() -> None:
    assert survivors(scored([0.09, 0.01, 0.08, 0.02]), N_LAYERS, thresholds=DEFAULT, top_k=3) == [1, 2, 3]


@given(candidates(st.floats(0, 0.3)), st.sets(st.integers(0, 29)))
def test_a_candidate_of_length_zero_never_survives(scores: list[CandidateScore], null: set[int]) -> None:
    """Whatever its KL; the others survive as if it were not there."""
    found = survivors(scores, N_LAYERS, thresholds=DEFAULT, top_k=15, null=null)
    assert not set(found) & null
    others = [replace(score, kl_div=NAN) if index in null else score for index, score in enumerate(scores)]
    assert found == survivors(others, N_LAYERS, thresholds=DEFAULT, top_k=15)


def test_a_nan_kl_never_survives() -> None:
    assert survivors(scored([NAN, 0.01, NAN, 0.02]), N_LAYERS, thresholds=DEFAULT, top_k=15) == [1, 3]
    assert survivors(scored([NAN, 0.5, NAN]), N_LAYERS, thresholds=DEFAULT, top_k=15) == [1]
    assert survivors(scored([NAN, NAN]), N_LAYERS, thresholds=DEFAULT, top_k=15) == []


@with_caplog
@given(candidates(st.one_of(st.floats(0, 0.3), st.just(NAN))))
def test_the_kl_is_relaxed_with_a_warning_and_only_then(
    caplog: pytest.LogCaptureFixture, scores: list[CandidateScore]
) -> None:
    caplog.clear()
    survivors(scores, N_LAYERS, thresholds=DEFAULT, top_k=15)
    admitted = [score for score in scores if score.layer < LIMIT and score.kl_div <= 0.1]
    assert bool(caplog.records) != bool(admitted)


def test_the_warning_of_a_relaxed_kl_says_what_was_relaxed(caplog: pytest.LogCaptureFixture) -> None:
    survivors(scored([0.2, 0.3]), N_LAYERS, thresholds=Thresholds(kl=0.05, prune_layers=0.5), top_k=15)
    assert [(record.levelno, record.name) for record in caplog.records] == [
        (logging.WARNING, "refusal_direction.selection.rules")
    ]
    assert caplog.messages == ["No candidate has a KL of 0.05 or less below layer 5; those of lowest KL are used."]


# the choice among them


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
    finalists = sorted(data.draw(st.sets(st.integers(0, len(scores) - 1))))
    thresholds = Thresholds(induce=induce)
    expected = plain_choice(scores, finalists, baseline + induce)
    if expected is None:
        with pytest.raises(NoCandidateError):
            select_survivor(scores, finalists, thresholds=thresholds, baseline=baseline, n_layers=N_LAYERS)
    else:
        chosen = select_survivor(scores, finalists, thresholds=thresholds, baseline=baseline, n_layers=N_LAYERS)
        assert (chosen.index, chosen.score) == (expected, scores[expected])


def test_the_steering_threshold_counts_from_the_baseline(caplog: pytest.LogCaptureFixture) -> None:
    scores = scored([0.0] * 3, ablation=[-9, -8, -7], steering=[-6.1, -6.0, 3.0])
    assert (
        select_survivor(scores, [0, 1, 2], thresholds=DEFAULT, baseline=-6.0, n_layers=N_LAYERS).index == 1
    )  # the threshold itself is enough
    assert (
        select_survivor(scores, [0, 1, 2], thresholds=Thresholds(induce=0.5), baseline=-6.0, n_layers=N_LAYERS).index
        == 2
    )
    assert (
        select_survivor(scores, [0, 1, 2], thresholds=Thresholds(induce=-0.5), baseline=-6.0, n_layers=N_LAYERS).index
        == 0
    )
    assert caplog.records == []


def test_only_finalists_are_chosen() -> None:
    scores = scored([0.0] * 3, ablation=[-9, -8, -7], steering=[1.0] * 3)
    assert select_survivor(scores, [1, 2], thresholds=DEFAULT, baseline=0.0, n_layers=N_LAYERS).index == 1


def test_of_equal_ablation_scores_the_first_is_chosen() -> None:
    scores = scored([0.0] * 4, ablation=[-1, -5, -5, -5], steering=[1.0, -1.0, 1.0, 1.0])
    assert select_survivor(scores, [0, 1, 2, 3], thresholds=DEFAULT, baseline=0.0, n_layers=N_LAYERS).index == 2


def test_the_steering_condition_is_waived_with_a_warning_that_says_so(caplog: pytest.LogCaptureFixture) -> None:
    scores = scored([0.0] * 3, ablation=[-1, -5, -3], steering=[-2.0] * 3)
    chosen = select_survivor(scores, [0, 1, 2], thresholds=Thresholds(induce=0.25), baseline=-1.5, n_layers=N_LAYERS)
    assert chosen.index == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == ["No candidate reaches a steering score of -1.25 when added; the condition is waived."]
    assert chosen.discarded == {}


def test_what_was_discarded_is_counted() -> None:
    scores = scored([0.0] * 5, ablation=[-1, -5, -3, -4, -9], steering=[1.0, -2.0, 1.0, -2.0, 1.0])
    chosen = select_survivor(scores, [0, 1, 2, 3], thresholds=DEFAULT, baseline=0.0, n_layers=N_LAYERS)
    assert chosen.index == 2
    assert chosen.discarded == {"not among those of lowest KL": 1, "steering score below the baseline": 2}


def test_what_was_discarded_says_by_which_condition() -> None:
    """Not that its KL was too high where it was none of that."""
    scores = [
        replace(score, layer=layer)
        for layer, score in enumerate(
            scored(
                [0.01, 0.02, 0.03, 0.0, NAN, 0.2, 0.001],
                ablation=[-1.0, -2.0, *[NAN] * 5],
                steering=[1.0, -2.0, *[NAN] * 5],
            )
        )
    ]
    chosen = select_survivor(scores, [0, 1], thresholds=DEFAULT, baseline=0.0, n_layers=8, null={3})
    assert chosen.dropped == (
        None,
        "steering score below the baseline",
        "not among those of lowest KL",
        "length zero",
        "a score is NaN",
        "KL > 0.1 (--kl_threshold)",
        "layer >= 6 (--prune_layers 0.2)",
    )


def test_candidates_that_were_not_scored_are_never_chosen(caplog: pytest.LogCaptureFixture) -> None:
    scores = scored([0.0] * 3, ablation=[NAN, -1, -2], steering=[5.0, 1.0, NAN])
    assert select_survivor(scores, [0, 1, 2], thresholds=DEFAULT, baseline=0.0, n_layers=N_LAYERS).index == 1
    assert caplog.records == []
    with pytest.raises(NoCandidateError, match="NaN"):
        select_survivor(scores, [0], thresholds=DEFAULT, baseline=0.0, n_layers=N_LAYERS)
    with pytest.raises(NoCandidateError, match="NaN"):
        select_survivor(scores, [], thresholds=DEFAULT, baseline=0.0, n_layers=N_LAYERS)


def test_a_candidate_whose_steering_score_is_nan_is_not_chosen_when_the_condition_is_waived() -> None:
    scores = scored([0.0] * 2, ablation=[-9, -1], steering=[NAN, -4.0])
    assert select_survivor(scores, [0, 1], thresholds=DEFAULT, baseline=0.0, n_layers=N_LAYERS).index == 1


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
    sets = {"harmful_train": list(range(cut)), "harmless_val": list(range(cut, len(refusal)))}
    kept = keep_fitting(torch.tensor(refusal, dtype=torch.float64), sets, rules=VISION)
    assert kept == {
        "harmful_train": plain_filter(refusal, sets["harmful_train"], 1, 8),
        "harmless_val": plain_filter(refusal, sets["harmless_val"], -1, 8),
    }


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=40), st.sampled_from(["harmful_val", "harmless_train"]))
def test_at_least_eight_are_left_or_all_there_are(refusal: list[float], name: str) -> None:
    kept = keep_fitting(torch.tensor(refusal), {name: list(range(len(refusal)))}, rules=VISION)[name]
    assert len(kept) >= min(8, len(refusal))
    assert kept == sorted(set(kept))


def test_a_set_filled_up_is_warned_of_and_the_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    harmful = [1.0] * 7 + [-0.1, -0.3, -0.2]
    harmless = [-1.0] * 8 + [1.0, 2.0]
    sets = {"harmful_val": list(range(10)), "harmless_val": list(range(10, 20))}
    kept = keep_fitting(torch.tensor(harmful + harmless), sets, rules=VISION)
    assert kept == {"harmful_val": list(range(8)), "harmless_val": list(range(10, 18))}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == ["The filter left 7 of 10 harmful_val prompts; the 8 most fitting are used."]


def test_what_fills_up_keeps_those_that_fitted() -> None:
    refusal = torch.tensor([-5.0, 2.0, -4.0, 1.0, -3.0, 3.0, -2.0, -1.0, -9.0, -8.0])
    kept = keep_fitting(refusal, {"harmful_train": list(range(10))}, rules=VISION)["harmful_train"]
    assert kept == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {1, 3, 5} <= set(kept)


def test_a_small_set_is_kept_whole(caplog: pytest.LogCaptureFixture) -> None:
    kept = keep_fitting(torch.tensor([-1.0, -2.0, 3.0]), {"harmful_val": [0, 1, 2]}, rules=VISION)
    assert kept == {"harmful_val": [0, 1, 2]}
    assert caplog.messages == ["The filter left 1 of 3 harmful_val prompts; the 3 most fitting are used."]


@pytest.mark.parametrize(("name", "sign"), [("harmful_val", 1), ("harmless_val", -1)])
def test_a_prompt_whose_score_is_nan_is_the_least_fitting(name: str, sign: int) -> None:
    refusal = sign * torch.tensor([NAN, -1.0, NAN, *[-2.0] * 7])
    assert keep_fitting(refusal, {name: list(range(10))}, rules=VISION)[name] == [1, *range(3, 10)]


def test_a_score_of_zero_fits_neither_kind() -> None:
    refusal = torch.tensor([0.0, *[1.0] * 9, 0.0, *[-1.0] * 9])
    sets = {"harmful_train": list(range(10)), "harmless_train": list(range(10, 20))}
    assert keep_fitting(refusal, sets, rules=VISION) == {
        "harmful_train": list(range(1, 10)),
        "harmless_train": list(range(11, 20)),
    }


def test_the_filter_can_be_skipped_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sets = {"harmful_train": [0, 1], "harmless_train": [2, 3]}
    assert keep_fitting(torch.full((4,), NAN), sets, skip=True, rules=VISION) == sets
    assert caplog.records == []


def test_the_minimum_is_the_rules() -> None:
    sets = {"harmful_train": list(range(10))}
    few = keep_fitting(-torch.arange(1.0, 11), sets, rules=replace(VISION, least_prompts=2))
    assert few == {"harmful_train": [0, 1]}
