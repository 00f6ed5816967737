"""The steps and the cost of a run, told before it is started."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refusal_direction import RunResult, cli, estimate, extract
from refusal_direction.candidates import Candidates
from refusal_direction.config import PromptSource, Thresholds
from refusal_direction.engine import Intervention, Row
from refusal_direction.engine.skeleton import Skeleton
from refusal_direction.estimate import Inspection, inspect, token_layers
from refusal_direction.methods import METHODS, difference_of_means
from refusal_direction.pipeline import Prepared, prepared
from refusal_direction.prompts.sets import Kind
from tests.candidates import at_layers
from tests.conftest import SMALL
from tests.families import D_MODEL, FAMILIES, N_LAYERS, build
from tests.problems import engine_of, make_problem

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.*")


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspect(SMALL)


def test_it_says_what_the_run_then_does(found: Inspection, extraction: RunResult) -> None:
    assert found.n_candidates == len(extraction.means)
    assert found.tokens == extraction.refusal_tokens
    assert found.engine == extraction.engine.name
    assert (found.n_layers, found.d_model) == (extraction.model.n_layers, extraction.model.d_model)
    assert found.rows == {"baseline": 72, "interventions, at most": 3 * 12 * found.n_candidates}
    assert sum(count for _, count in found.writes) == found.n_layers


def test_it_says_so_where_the_run_falls_back_in_its_first_pass(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = Skeleton.tail
    monkeypatch.setattr(Skeleton, "tail", lambda self, hidden, token: 1.01 * own(self, hidden, token))
    few = replace(
        SMALL,
        prompts=PromptSource(n_train=4, n_val=4),
        thresholds=Thresholds(kl_threshold=10.0, induce_threshold=-100.0),
    )
    assert inspect(few).engine == extract("demo", few).engine.name == "hooked"
    assert "Plain hooked forwards are used" in caplog.text


def test_a_pruned_search_costs_at_most_what_an_exhaustive_one_does(found: Inspection) -> None:
    pruned = inspect(replace(SMALL, search="pruned"))
    assert pruned.rows == found.rows


def test_the_estimate_is_positive_and_finite(found: Inspection) -> None:
    assert 0 < found.cost.seconds.low <= found.cost.seconds.high < 3600
    assert found.cost.pass_seconds.keys() == found.rows.keys()
    weights = sum(weight.nbytes for weight in found.chat.model.parameters())
    assert weights < found.cost.memory < 64 << 30


def test_the_command_prints_it_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "demo", "--n_train", "4", "--n_val", "4"]) == 0
    shown = capsys.readouterr()
    for part in ("residual stream", "written by", "refusal tokens", "'I'", "candidates", "rows", "time", "memory"):
        assert part in shown.out
    assert shown.err == "Loading the model, then timing a few rows for about 15 s ...\n"
    assert not list(tmp_path.iterdir())


def test_the_model_may_be_named_by_its_flag_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--model_id", "demo", "--n_train", "4", "--n_val", "4"]) == 0
    assert "candidates" in capsys.readouterr().out


def test_the_vision_language_command_has_three_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main_vlm(["inspect", "demo", "--n_train", "8", "--n_val", "8"]) == 0
    shown = capsys.readouterr().out
    assert "KL divergence" in shown
    assert "ablation and steering" in shown
    assert "the last 3 of the prompt" in shown


def test_every_method_adds_rows(monkeypatch: pytest.MonkeyPatch, found: Inspection) -> None:
    monkeypatch.setitem(METHODS, "reversed", lambda harmful, harmless: difference_of_means(harmless, harmful))
    both = inspect(replace(SMALL, methods=("difference_of_means", "reversed")))
    assert both.n_candidates == 2 * found.n_candidates
    assert both.rows["interventions, at most"] == 2 * found.rows["interventions, at most"]


def test_an_unknown_model_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("bad", "good"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"Is {number} {name}?" for number in range(8)))
    own = ["--harmful", str(tmp_path / "bad.txt"), "--harmless", str(tmp_path / "good.txt")]
    assert cli.main(["inspect", str(tmp_path / "nothing"), *own, "--n_train", "4", "--n_val", "4"]) == 2
    assert "\nError: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
@pytest.mark.parametrize(
    "kinds", [(Intervention.BASELINE,), (Intervention.ABLATION,), (Intervention.STEERING,), tuple(Intervention)]
)
def test_token_layers_are_what_goes_through_the_layers(name: str, kinds: tuple[Intervention, ...]) -> None:
    engine = engine_of(build(FAMILIES[name]), make_problem())
    engine.baseline(lambda *_: None, lambda *_: None)
    given = at_layers(torch.randn(5, D_MODEL), tuple(index % N_LAYERS for index in range(5)))
    rows = [
        Row(prompt, kind, -1 if kind is Intervention.BASELINE else candidate)
        for kind in kinds
        for prompt in range(len(engine.prompts))
        for candidate in range(1 if kind is Intervention.BASELINE else 5)
    ]
    seen: list[int] = []
    stream = engine.stream

    def count(layer: object, args: tuple[torch.Tensor, ...]) -> None:
        n_rows, n_tokens = args[0].shape[:2]
        if n_tokens > 1:  # the tail sends one token a row past the layers
            seen.append(n_rows * n_tokens)

    handles = [layer.register_forward_pre_hook(count) for layer in stream.layers]
    engine._runner._looked = True  # type: ignore[union-attr]  # the trial on the last layer is not of the run
    engine.intervene(rows, given, lambda *_: None)
    for handle in handles:
        handle.remove()
    assert sum(seen) == token_layers(engine, rows, given) > 0


def test_time_is_read_off_as_once_a_pass_and_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs 2 s a pass and 1 ms a token and layer is found out exactly."""

    def timed(ready: Prepared, rows: list[Row], candidates: Candidates) -> float:
        return 2.0 + 1e-3 * token_layers(ready.engine, rows, candidates)

    monkeypatch.setattr(estimate, "_timed", timed)
    with prepared("demo", SMALL) as ready:
        fewest, most = (estimate._passes(ready, dict.fromkeys(Kind, count)) for count in (6, 12))
        cost = estimate._cost(ready, fewest, most, load_seconds=7.0)
        candidates = estimate._stand_ins(ready)

        def expected(passes: dict[str, list[Row]]) -> list[float]:
            return [2.0 + 1e-3 * token_layers(ready.engine, rows, candidates) for rows in passes.values()]

        assert [each.low for each in cost.pass_seconds.values()] == pytest.approx(expected(fewest))
        assert [each.high for each in cost.pass_seconds.values()] == pytest.approx(expected(most))
    assert cost.seconds.high == pytest.approx(7.0 + sum(expected(most)))


def test_samples_grow_until_one_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def timed(ready: Prepared, rows: list[Row], candidates: Candidates) -> float:
        sizes.append(len(rows))
        return 0.05 * len(rows)

    monkeypatch.setattr(estimate, "_timed", timed)
    with prepared("demo", SMALL) as ready:
        _, each = estimate._rates(ready, estimate._stand_ins(ready))
    assert sizes == [3, 3, 12, 48]
    assert each > 0


@pytest.mark.parametrize(("successes", "n"), [(0, 16), (6, 16), (16, 16)])
def test_the_interval_of_a_share_is_wilsons(successes: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    found = estimate._wilson(successes, n)
    expected = stats.binomtest(successes, n).proportion_ci(1 - 2 * stats.norm.sf(estimate._Z), method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_filter_makes_a_range(found: Inspection) -> None:
    """The demo refuses and answers as it should, so that nearly all prompts may be kept."""
    for kind in Kind:
        assert 9 < found.kept[kind].low < found.kept[kind].high <= 12
    assert inspect(replace(SMALL, skip_filter=True)).kept[Kind.HARMFUL] == estimate.Range(12, 12)
    assert re.search(r"keeps about \d+ to 1\d of 12 harmful, \d+ to 1\d of 12 harmless validation prompts", str(found))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((720, 1200), "12 to 20 min"),
        ((4, 4), "4.0 s"),
        ((30, 1200), "30.0 s to 20 min"),
        ((720, 725), "12 min"),
        ((3000, 9000), "50 min to 2.5 h"),
    ],
)
def test_durations_are_said_with_one_unit_where_they_share_it(seconds: tuple[float, float], text: str) -> None:
    assert estimate._durations(estimate.Range(*seconds)) == text
