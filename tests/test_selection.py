"""The filter and the selection rule, to the letter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusal_direction.selection.rules import CandidateScore, keep_fitting, layer_limit, select

from refusal_direction.config import Thresholds
from refusal_direction.errors import NoCandidateError, TooFewPromptsError

NAN = float("nan")
GOOD = {"ablation_refusal": -5.0, "steering_refusal": 1.0, "kl_div": 0.05}


def candidate(position: int, layer: int, **scores: float) -> CandidateScore:
    return CandidateScore(position, layer, **{**GOOD, **scores})


def test_the_lowest_ablation_score_is_selected():
    scores = [candidate(-2, 0), candidate(-2, 1, ablation_refusal=-7.0), candidate(-1, 0, ablation_refusal=-6.0)]
    chosen = select(scores, 10, thresholds=Thresholds())
    assert (chosen.index, chosen.score, chosen.discarded) == (1, scores[1], {})
    beaten = "another's ablation score is lower"
    assert chosen.dropped == (beaten, None, beaten)


def test_a_tie_goes_to_the_first_in_position_layer_order():
    assert select([candidate(-2, 3), candidate(-2, 4), candidate(-1, 0)], 10, thresholds=Thresholds()).index == 0


@pytest.mark.parametrize("name", ["ablation_refusal", "steering_refusal", "kl_div"])
def test_a_candidate_with_a_nan_is_discarded(name: str):
    chosen = select([candidate(-1, 0, **{name: NAN}), candidate(-1, 1)], 10, thresholds=Thresholds())
    assert chosen.index == 1
    assert chosen.discarded == {"a score is NaN": 1}


@pytest.mark.parametrize(
    ("better", "reason"),
    [
        (candidate(-1, 8, ablation_refusal=-9.0), "layer >= 8"),
        (candidate(-1, 0, ablation_refusal=-9.0, kl_div=0.1000001), "KL > 0.1"),
        (candidate(-1, 0, ablation_refusal=-9.0, steering_refusal=-1e-9), "steering score < 0"),
    ],
)
def test_a_better_candidate_that_breaks_a_condition_is_discarded(better: CandidateScore, reason: str):
    chosen = select([better, candidate(-1, 1)], 10, thresholds=Thresholds())
    assert chosen.index == 1
    assert [said.startswith(reason) for said in chosen.discarded] == [True]


def test_the_conditions_include_their_thresholds():
    edge = candidate(-1, 7, kl_div=0.1, steering_refusal=0.0)
    assert select([edge], 10, thresholds=Thresholds()).index == 0


def test_the_cut_is_rounded_down():
    assert select([candidate(-1, 13)], 18, thresholds=Thresholds()).index == 0
    with pytest.raises(NoCandidateError):
        select([candidate(-1, 14)], 18, thresholds=Thresholds())


@pytest.mark.parametrize(("n_layers", "share", "limit"), [(10, 0.9, 1), (80, 0.8, 16), (28, 0.2, 22), (18, 0.2, 14)])
def test_the_cut_is_that_of_decimal_numbers(n_layers: int, share: float, limit: int):
    """In binary 10 * (1 - 0.9) is less than 1."""
    assert layer_limit(n_layers, Thresholds(prune_layers=share)) == limit


def test_no_admissible_candidate_is_an_error_that_counts_and_shows_the_nearest_misses():
    scores = [candidate(-1, 0, kl_div=0.13), candidate(-1, 1, steering_refusal=-0.2), candidate(-1, 9)]
    with pytest.raises(NoCandidateError) as caught:
        select(scores, 10, thresholds=Thresholds())
    message = str(caught.value)
    assert "1 by KL > 0.1" in message
    assert "1 by steering score < 0" in message
    assert "1 by layer >= 8" in message
    assert "position -1, layer 0 (ablation score -5.00) needs --kl_threshold 0.13" in message
    assert "position -1, layer 1 (ablation score -5.00) needs --induce_threshold -0.2" in message


numbers = st.floats(-20, 20, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 20)), min_size=1, max_size=8))
def test_the_thresholds_shown_for_the_nearest_miss_suffice(rows: list[tuple[float, float, float]]):
    scores = [CandidateScore(-1, layer, *row) for layer, row in enumerate(rows)]
    try:
        select(scores, 100, thresholds=Thresholds())
    except NoCandidateError as error:
        words = str(error).split("misses:\n")[1].splitlines()[0].split()
        asked = {name: float(words[words.index(name) + 1]) for name in words if name.startswith("--")}
        relaxed = Thresholds(kl=asked.get("--kl_threshold", 0.1), induce=asked.get("--induce_threshold", 0.0))
        assert select(scores, 100, thresholds=relaxed)


@given(st.lists(st.tuples(numbers, numbers, st.floats(0, 0.2), st.booleans()), min_size=1, max_size=30))
def test_the_selection_equals_a_plain_search(rows: list[tuple[float, float, float, bool]]):
    scores = [CandidateScore(-1, index, NAN if bad else a, s, kl) for index, (a, s, kl, bad) in enumerate(rows)]
    allowed = [x for x in scores if not math.isnan(x.ablation_refusal) and x.kl_div <= 0.1 and x.steering_refusal >= 0]
    if allowed:
        assert (
            select(scores, 100, thresholds=Thresholds()).score == sorted(allowed, key=lambda x: x.ablation_refusal)[0]
        )
    else:
        with pytest.raises(NoCandidateError):
            select(scores, 100, thresholds=Thresholds())


SETS = {"harmful_train": [0, 1, 2, 3, 4], "harmless_train": [5, 6, 7, 8, 9]}


def test_the_filter_keeps_refused_harmful_and_answered_harmless_prompts():
    refusal = torch.tensor([1.0, 2, -1, 3, 4, -1, -2, 0, -3, -4])
    assert keep_fitting(refusal, SETS) == {"harmful_train": [0, 1, 3, 4], "harmless_train": [5, 6, 8, 9]}


def test_too_few_prompts_left_say_how_many_of_each_and_what_to_try():
    refusal = torch.tensor([1.0, 2, -1, -3, 4, -1, -2, -1, -3, -4])
    with pytest.raises(TooFewPromptsError) as caught:
        keep_fitting(refusal, SETS)
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
        keep_fitting(torch.tensor(refusal), SETS)
    assert said in str(caught.value)
    assert unsaid not in str(caught.value)


def test_skipping_the_filter_keeps_everything():
    assert keep_fitting(torch.full((10,), NAN), SETS, skip=True) == SETS
