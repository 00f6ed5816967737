"""The command line, as its user meets it."""

import json
import os
import subprocess
import sys
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from refusal_direction import ChatModel, RunResult, ablated, cli, flags, pipeline, steered
from refusal_direction.config import (
    CHECKPOINTS,
    TEXT,
    VISION_CONFIG,
    Config,
    ModelSource,
    PromptSource,
    Thresholds,
)
from refusal_direction.engine import Engine
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.errors import UnsupportedModelError
from refusal_direction.flags import parse
from refusal_direction.output import text as report
from refusal_direction.output.artifacts import file_names
from refusal_direction.prompts import gather
from refusal_direction.scoring import passes
from tests import forked

ROOT = Path(__file__).parent.parent
FEW = ["--model_id", "demo", "--n_train", "24", "--n_val", "12"]


def run(*arguments: str, output: Path) -> int:
    return cli.main([*FEW, "--output_dir", str(output), *arguments])


def test_help_fits_two_screens_and_names_the_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 90
    assert "--model_id demo" in shown


PARTS = {"model": ModelSource, "prompts": PromptSource, "thresholds": Thresholds, None: Config}
"""The parts of a configuration, by their field in it."""
OWN_VALUES = {
    "search": "pruned",
    "select": "nearest",
    "harmful": Path("bad.txt"),
    "harmless": Path("good.txt"),
    "refusal_tokens": ("I", "As"),
    "memory_budget": 512 << 20,
    "prune_layers": 0.35,
}
"""Values of fields that not every number or name is a value of."""
SPELLED = {"refusal_tokens": ["I", "As"], "memory_budget": ["512MiB"]}
NOT_FLAGS = {"rules", "methods", "model", "prompts", "thresholds"}


def settings(defaults: Config) -> list[tuple[str | None, Field[Any]]]:
    """Each setting of a pipeline, with the part of the configuration that it is in."""
    found = [(part, field) for part, kind in PARTS.items() for field in fields(kind) if field.name not in NOT_FLAGS]
    return [(part, field) for part, field in found if defaults.rules.images or not field.metadata.get("vision_only")]


def changed(name: str, default: Any) -> Any:
    """A value of a setting that is not its default."""
    if name in OWN_VALUES:
        return OWN_VALUES[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 3
    return Path("elsewhere") if isinstance(default, Path) else {"batch_size": 3}.get(name, "another")


def with_value(config: Config, part: str | None, name: str, value: Any) -> Config:
    if part is None:
        return replace(config, **{name: value})
    return replace(config, **{part: replace(getattr(config, part), **{name: value})})


both_pipelines = pytest.mark.parametrize("defaults", [Config(), VISION_CONFIG], ids=["text", "images"])


@both_pipelines
def test_every_flag_has_the_name_of_its_field_and_every_field_a_flag(defaults: Config):
    given = vars(flags.parser(defaults).parse_args([]))
    assert set(given) == {field.name for _, field in settings(defaults)}


@both_pipelines
def test_every_setting_makes_the_round_trip_through_its_flag(defaults: Config):
    for part, field in settings(defaults):
        default = getattr(defaults if part is None else getattr(defaults, part), field.name)
        value = changed(field.name, default)
        words = [] if isinstance(default, bool) else SPELLED.get(field.name, [str(value)])
        expected = with_value(defaults, part, field.name, value)
        assert expected != defaults
        assert flags.parse([f"--{field.name}", *words], defaults) == expected


@both_pipelines
def test_the_defaults_are_those_of_the_configuration(defaults: Config, monkeypatch: pytest.MonkeyPatch):
    for variable in ("VLM_N_TRAIN", "VLM_N_VAL"):
        monkeypatch.delenv(variable, raising=False)
    assert flags.parse([], defaults) == defaults


def test_text_has_no_flag_for_a_condition_of_images_alone(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        flags.parse(["--top_k_candidates", "3"], Config())
    assert "unrecognized arguments: --top_k_candidates" in capsys.readouterr().err


def test_both_spellings_of_a_flag_mean_the_same():
    spelled = [flags.parse([flag, "8"], Config()).batch_size for flag in ("--batch_size", "--batch-size")]
    assert spelled == [8, 8]


def test_a_run_writes_its_files_and_prints_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run("--sanity", output=tmp_path) == 0
    shown = capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))
    for part in (
        "| Metric",
        "Ablation refusal score",
        "Steering refusal score",
        "KL divergence",
        "Refusal tokens: 'I' (46), published for the gemma family. They hold 9",
        "baseline:",
        "ablated:",
    ):
        assert part in shown.out
    assert shown.err == ""


def test_a_log_file_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Within the first minute none: the test above sees no line at all."""
    monkeypatch.setattr(cli, "_LINE_INTERVAL", 0.0)
    assert run(output=tmp_path) == 0
    lines = capsys.readouterr().err.split("\n")
    assert all(line.startswith(("Pass 1: baseline:", "Pass 2: interventions:")) for line in lines if line)
    assert len({line.partition(":")[0] for line in lines if line}) == 2
    assert not any("\r" in line for line in lines)


@pytest.mark.extended
def test_the_batch_size_does_not_change_the_scores(tmp_path: Path):
    assert run(output=tmp_path / "free") == 0
    assert run("--batch_size", "3", output=tmp_path / "small") == 0
    rows = [json.loads((tmp_path / name / "all_direction_scores.json").read_text()) for name in ("free", "small")]
    for free, small in zip(*rows, strict=True):
        for name in ("ablation_refusal", "steering_refusal", "kl_div"):
            assert small[name] == pytest.approx(free[name], abs=1e-4)


def test_own_prompts_in_any_format(tmp_path: Path):
    harmful = json.loads((ROOT / "refusal_direction/demo/prompts/harmful_train.json").read_text())
    harmless = json.loads((ROOT / "refusal_direction/demo/prompts/harmless_train.json").read_text())
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, harmful)))
    (tmp_path / "good.txt").write_text("\n".join(row["instruction"] for row in harmless))
    own = ["--harmful", str(tmp_path / "bad.jsonl"), "--harmless", str(tmp_path / "good.txt")]
    assert run(*own, output=tmp_path / "out") == 0
    run_json = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run_json["prompts"]["harmful_train"]["ids"][0].startswith("bad/")


def test_what_prompts_are_rendered_with_is_recorded(tmp_path: Path):
    anything = ("--kl_threshold", "100", "--induce_threshold", "-100")
    assert run("--system_prompt", "Be brief.", *anything, output=tmp_path) == 0
    recorded = json.loads((tmp_path / "run.json").read_text())
    assert recorded["template"] == {
        "date": None,
        "thinking": False,
        "thinking_switches": [],
        "thinking_closed_with": "",
        "system_prompt": "Be brief.",
    }
    assert recorded["model"]["quantization"] is None


def test_refusal_tokens_are_recorded_with_the_probability_that_they_hold(tmp_path: Path):
    assert run(output=tmp_path) == 0
    recorded = json.loads((tmp_path / "run.json").read_text())["refusal_tokens"]
    assert (recorded["ids"], recorded["source"]) == ([46], "published for the gemma family")
    assert recorded["mass_quartiles"]["harmful"]["lower"] > 0.9 > 0.1 > recorded["mass_quartiles"]["harmless"]["upper"]


def test_wrong_refusal_tokens_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--refusal_tokens", "a", output=tmp_path) == 2
    shown = capsys.readouterr().err
    assert "Warning: The refusal tokens 'a' hold 0.0% of the probability on harmful prompts" in shown
    assert "--calibrate_refusal finds" in shown


def test_calibration_is_recorded(tmp_path: Path):
    assert run("--calibrate_refusal", output=tmp_path) == 0
    assert "calibrated on" in json.loads((tmp_path / "run.json").read_text())["refusal_tokens"]["source"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--prune_layers", "1.5"], "--prune_layers 1.5: must be"),
        (["--prune_layers", "0.99"], "--prune_layers 0.99 leaves none of 8 layers to select from"),
        (["--n_train", "100000"], "were asked for"),
        (["--harmful", "none.txt", "--harmless", "none.txt"], "none.txt: no such file"),
        (["--refusal_tokens", "zyxwvut"], "is not one token of demo"),
        (["--refusal_tokens", ""], "--refusal_tokens: it is empty"),
        (["--chat_template", "{{ bos_token }}<start_of_turn>model"], "leaves out the request"),
        (["--refusal_tokens", "I", "--calibrate_refusal"], "exclude each other"),
        (["--refusal_tokens", "a"], "The filter left too few prompts"),
        (["--chat_template", "{{ messages }"], "chat template"),
        (["--dtype", "int3"], "--dtype int3 is not known"),
        (["--revision", "main"], "only models on the Hub have revisions"),
        (["--system_prompt", "Hi", "--chat_template", "{{ messages[-1].content }}x"], "drops the system message"),
    ],
)
def test_an_error_is_one_message_without_traceback_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert run(*arguments, output=tmp_path / "out") == 2
    shown = capsys.readouterr()
    assert said in shown.err
    errors = [line for line in shown.err.splitlines() if not line.startswith("Warning: ")]
    assert errors[0].startswith("Error: ")
    assert "Traceback" not in shown.err
    assert shown.out == ""
    left = {path.name for path in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else set()
    assert left <= {CHECKPOINTS}
    assert ("--resume" in shown.err) == bool(left)


@pytest.mark.parametrize("flag", ["--system_prompt", "--refusal_tokens", "--model_id", "--chat_template", "--harmful"])
@pytest.mark.parametrize(("text", "said"), [("caf\udce9", "not UTF-8"), ("a\0", "a NUL character")])
def test_text_that_cannot_be_encoded_is_found_before_the_work(
    flag: str,
    text: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(pipeline, "prepared", lambda *args, **kwargs: pytest.fail("the work had begun"))
    assert run(flag, text, output=tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"Error: {flag} ")
    assert said in shown
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_is_missing_is_found_before_the_weights_are_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "load", lambda config: pytest.fail("the weights were loaded"))
    assert run("--chat_template", "~/none.jinja", output=tmp_path) == 2
    assert f"--chat_template {os.path.expanduser('~/none.jinja')}: neither" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a working folder cannot be removed there")
def test_a_working_folder_that_is_gone_is_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(output=tmp_path / "out") == 2
    assert "Error: The working folder is gone" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_said_again_after_another_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for more in ((), ("--resume",), ("--resume",)):
        assert run("--kl_threshold", "-1", *more, output=tmp_path) == 3
        assert "The scores measured so far are kept: --resume continues" in capsys.readouterr().err


WITHOUT_DIRECTION = set(file_names(TEXT)) - {"refusal_direction.pt"}


@pytest.mark.parametrize("search", ["exhaustive", "pruned"])
def test_where_no_candidate_passes_every_score_is_written_and_the_nearest_misses_are_shown(
    search: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("--search", search, output=tmp_path) == 0  # its direction must not survive
    capsys.readouterr()
    assert run("--search", search, "--kl_threshold", "-1", "--sanity", output=tmp_path) == 3
    shown = capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINTS, *WITHOUT_DIRECTION}
    assert "No refusal direction of demo was selected (from 40 candidates in 8 layers)" in shown.out
    assert "| Nearest miss" in shown.out
    assert "refusal_direction.pt" not in shown.out
    assert "baseline:" not in shown.out  # there is nothing to complete with
    error = shown.err.partition("Error: ")[2]
    assert error.startswith("None of 40 candidates passes every condition: 5 by length zero; 25 by KL > -1")
    for part in ("needs --kl_threshold 0.028", "--select nearest takes the first", f"All scores are in {tmp_path}/."):
        assert part in error
    rows = json.loads((tmp_path / "all_direction_scores.json").read_text())
    assert all(row["dropped"] for row in rows)
    assert all(row["kl_div"] is not None for row in rows)


def test_other_thresholds_after_it_cost_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert run("--kl_threshold", "-1", output=tmp_path) == 3
    with monkeypatch.context() as patch:
        for name in ("baseline", "intervene"):
            patch.setattr(Engine, name, lambda *args, **named: pytest.fail("a pass was run again"))
        assert run("--resume", "--kl_threshold", "0.2", output=tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))  # and no checkpoints
    assert run("--resume", "--kl_threshold", "-1", output=tmp_path) == 3  # control: they are gone


def test_the_nearest_miss_is_written_on_request_and_marked_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("--kl_threshold", "-1", "--select", "nearest", output=tmp_path) == 0
    shown = capsys.readouterr()
    assert "This one, the nearest miss, may not carry refusal at all: its KL is above -1." in shown.out
    assert "Warning: No candidate meets every condition; the nearest miss, position -1, layer 5, is used" in shown.err
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))
    metadata, scores, record = (
        json.loads((tmp_path / name).read_text())
        for name in ("direction_metadata.json", "all_direction_scores.json", "run.json")
    )
    assert (metadata["selected"], metadata["position"], metadata["layer"]) == ("nearest", -1, 5)
    assert metadata["nearest_misses"][0]["violated"] == ["kl"]
    assert (record["selection"]["selected"], record["selection"]["index"]) == ("nearest", 37)
    assert [row["layer"] for row in scores if row.get("selected") == "nearest"] == [5]
    assert "Pruned" not in shown.out


def test_an_output_folder_that_cannot_be_written_is_found_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "prepared", lambda *args, **kwargs: pytest.fail("the work had begun"))
    (tmp_path / "file").write_text("")
    for folder in ("file/out", "x" * 300):
        assert run(output=tmp_path / folder) == 2
        assert "Choose another --output_dir" in capsys.readouterr().err


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After `--output_dir=` some shells leave it as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert parse(["--output_dir=~/results"], Config()).output_dir == tmp_path / "results"


def test_a_tilde_that_is_nobodys_home_is_a_name():
    assert parse(["--output_dir", "~nobody-here"], Config()).output_dir == Path("~nobody-here")


@pytest.mark.parametrize("flag", ["--output_dir", "--data_dir", "--harmful"])
def test_an_empty_name_is_no_path(
    flag: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As of a variable that is not set: the working directory was hardly meant."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([*FEW, flag, ""]) == 2
    assert f"Error: {flag}: it is empty." in capsys.readouterr().err


def test_a_run_that_ends_in_an_error_leaves_no_empty_folder(tmp_path: Path):
    assert run("--refusal_tokens", "no such token", output=tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert run("--refusal_tokens", "no such token", output=tmp_path / "old") == 2
    assert (tmp_path / "old").exists()
    assert run("--refusal_tokens", "a", output=tmp_path / "measured") == 2
    assert [path.name for path in (tmp_path / "measured").iterdir()] == [CHECKPOINTS]


@pytest.mark.parametrize("size", ["infGB", "nanMB", "many", "5TB"])
def test_what_is_no_size_is_named_with_the_units(capsys: pytest.CaptureFixture[str], tmp_path: Path, size: str):
    with pytest.raises(SystemExit):
        run("--memory_budget", size, output=tmp_path)
    assert f"{size!r} is not a size: give a number and a unit" in capsys.readouterr().err


def test_an_interrupted_run_leaves_no_results_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prepared", interrupted)
        assert run(output=tmp_path) == 130
    assert "--resume" not in capsys.readouterr().err  # there is nothing yet
    monkeypatch.setattr(passes, "measure", interrupted)
    assert run(output=tmp_path) == 130
    said = capsys.readouterr().err
    assert "Interrupted" in said
    assert "--resume continues from there" in said
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINTS]


def test_an_unsupported_model_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def unsupported(self: object, model: object) -> None:
        raise UnsupportedModelError("The residual writes of this model were not found.")

    monkeypatch.setattr(ResidualStream, "__init__", unsupported)
    assert run(output=tmp_path) == 2
    assert "were not found" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def buggy(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", buggy)
    with pytest.raises(ZeroDivisionError):
        run(output=tmp_path)


SCRIPT = "extract_refusal_direction.py"


def test_a_terminal_that_knows_few_characters_gets_the_table_all_the_same(tmp_path: Path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = forked.run([SCRIPT, *FEW, "--output_dir", str(tmp_path)], env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Ablation refusal score" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_table_that_cannot_be_written_is_an_error_and_results_stay(tmp_path: Path):
    with Path("/dev/full").open("wb") as full:
        done = forked.run([SCRIPT, *FEW, "--output_dir", str(tmp_path)], stdout=full)
    assert done.returncode == 2
    assert "Error: The output could not be printed" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such pipe")
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path):
    reader, writer = os.pipe()
    os.close(reader)
    done = forked.run([SCRIPT, *FEW, "--output_dir", str(tmp_path)], stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))


# Really fresh processes


@pytest.mark.parametrize(
    "command",
    [["extract_refusal_direction.py"], pytest.param(["-m", "refusal_direction"], marks=pytest.mark.extended)],
)
def test_every_way_of_starting_it_works_and_is_quiet(command: list[str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, *command, *FEW, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Refusal direction of demo" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))


@pytest.mark.extended
@pytest.mark.skipif(sys.platform == "win32", reason="there is no shell to close it")
def test_a_closed_output_is_no_error(tmp_path: Path):
    command = [sys.executable, SCRIPT, *FEW, "--output_dir", str(tmp_path)]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.extended
@pytest.mark.skipif(sys.platform == "win32", reason="there is no shell to close it")
def test_closed_messages_are_no_error(tmp_path: Path):
    command = [sys.executable, SCRIPT, *FEW, "--output_dir", str(tmp_path)]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], cwd=ROOT, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert b"Ablation refusal score" in done.stdout


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_shown_completions_are_those_of_each_prompt_alone(
    batch_size: int | None, extraction: RunResult, chat: ChatModel
):
    direction, prompts = extraction.direction, gather(extraction.config)
    rows: list[int] = []
    handle = chat.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    limited = replace(extraction, config=replace(extraction.config, batch_size=batch_size))
    shown = report.completions(limited, chat, prompts)
    handle.remove()
    assert max(rows) == batch_size or (batch_size is None and max(rows) <= 6)
    triples = [part.splitlines() for part in shown.strip().split("\n\n")]
    assert len(triples) == 6
    for request, plain, changed in triples:
        kind, _, text = request.partition(": ")
        assert plain == f"  baseline: {chat.complete(text, 48)[0].strip()}"
        ablating = ablated(chat.model, direction.vector)
        steering = steered(chat.model, direction.vector, layer=direction.layer)
        with ablating if kind == "Harmful" else steering:
            reply = chat.complete(text, 48)[0].strip()
        assert changed == f"  {'ablated' if kind == 'Harmful' else 'steered'}:  {reply}"
