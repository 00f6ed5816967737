"""The vision-language command line, end to end, on a tiny random PaliGemma 2 and images of one's own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from refusal_direction import cli, extract, load_direction
from refusal_direction.config import VISION, VISION_CONFIG
from refusal_direction.flags import parse
from refusal_direction.models import refusal_tokens
from refusal_direction.models.loading import load_vision_model
from refusal_direction.output.artifacts import file_names
from refusal_direction.prompts import pairs as vision
from refusal_direction.prompts.sampling import SampleSizes, sample_pairs
from tests import forked
from tests.families import D_MODEL, N_LAYERS
from tests.processors import save_paligemma2

# PaliGemma's processor makes NumPy arrays of tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.*")

ROOT = Path(__file__).parent.parent
N_CANDIDATES = 3 * N_LAYERS
SPECIFIED = {
    "refusal_direction_vlm.pt",
    "direction_metadata_vlm.json",
    "candidate_directions_vlm.pt",
    "all_direction_scores_vlm.json",
}
SCORES = ("ablation_refusal", "steering_refusal", "kl_div")
QUESTIONS = ("What is shown?", "How is this made?", "Where is it from, and who made it?", "Why?")


def own_pairs(folder: Path, colour: str, count: int = 8) -> Path:
    """Images with questions, in the Hub's imagefolder convention."""
    folder.mkdir()
    lines = []
    for number in range(count):
        image = Image.new("RGB", (20 + number, 30), colour)
        image.paste("white", (number, number, number + 5, number + 9))
        image.save(folder / f"{number}.png")
        question = f"{QUESTIONS[number % len(QUESTIONS)]} {colour}"
        lines.append(json.dumps({"file_name": f"{number}.png", "question": question}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and the pairs."""
    folder = tmp_path_factory.mktemp("vision")
    save_paligemma2(folder / "model")
    own_pairs(folder / "bad", "red")
    own_pairs(folder / "good", "blue")
    return folder


Run = Callable[..., int]
DOUBT = "Warning: The refusal tokens 'I', 'Sorry', 'No', 'As' hold "
"""What is rightly said of a model with random weights."""


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command with few prompts; returns the exit code. Results are in tmp_path / "out"."""
    for variable in ("VLM_N_TRAIN", "VLM_N_VAL"):
        monkeypatch.delenv(variable, raising=False)

    def main(*arguments: str, sizes: tuple[str, ...] = ("--n_train", "4", "--n_val", "3")) -> int:
        return cli.main_vlm([*where(made), "--output_dir", str(tmp_path / "out"), "--skip_filter", *sizes, *arguments])

    return main


def where(made: Path) -> list[str]:
    return ["--model_id", str(made / "model"), "--harmful", str(made / "bad"), "--harmless", str(made / "good")]


def read(tmp_path: Path, name: str) -> Any:
    return json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))


def scores_of(tmp_path: Path) -> list[dict[str, Any]]:
    return read(tmp_path, "all_direction_scores_vlm.json")


def test_a_run_writes_its_files_and_prints_the_table(
    run: Run, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == set(file_names(VISION)) == SPECIFIED | {"run.json", "per_prompt_scores.safetensors"}
    shown = capsys.readouterr().out
    for part in (
        f"Refusal direction of {made / 'model'}",
        "| Metric",
        "(3 harmful prompts)",
        "KL divergence",
        *SPECIFIED,
    ):
        assert part in shown


def test_the_files_hold_what_is_specified(run: Run, made: Path, tmp_path: Path) -> None:
    assert run() == 0
    metadata, scores = read(tmp_path, "direction_metadata_vlm.json"), scores_of(tmp_path)
    candidates = torch.load(tmp_path / "out" / "candidate_directions_vlm.pt", weights_only=True)
    direction = torch.load(tmp_path / "out" / "refusal_direction_vlm.pt", weights_only=True)
    assert candidates.shape == (3, N_LAYERS, D_MODEL)
    assert candidates.dtype == direction.dtype == torch.float32
    assert (metadata["model_id"], metadata["n_layers"], metadata["d_model"]) == (str(made / "model"), N_LAYERS, D_MODEL)
    assert metadata["position_index"] == metadata["position"] + 3
    assert torch.equal(direction, candidates[metadata["position_index"], metadata["layer"]])
    assert [(row["position_index"], row["position"], row["layer"]) for row in scores] == [
        (position, position - 3, layer) for position in range(3) for layer in range(N_LAYERS)
    ]
    chosen = scores[metadata["position_index"] * N_LAYERS + metadata["layer"]]
    for name in SCORES:
        assert metadata[name] == pytest.approx(chosen[name])


def test_load_direction_reads_the_folder(run: Run, made: Path, tmp_path: Path) -> None:
    assert run() == 0
    metadata, direction = read(tmp_path, "direction_metadata_vlm.json"), load_direction(tmp_path / "out")
    assert (direction.layer, direction.position) == (metadata["layer"], metadata["position"])
    assert direction.model_id == str(made / "model")
    assert torch.equal(direction.vector, torch.load(tmp_path / "out" / "refusal_direction_vlm.pt", weights_only=True))


def test_only_the_survivors_of_the_kl_get_the_other_scores(run: Run, tmp_path: Path) -> None:
    """Candidates of length zero change nothing, so their scores are known without being run."""
    assert run("--top_k_candidates", "2", "--kl_threshold", "100") == 0
    rows = scores_of(tmp_path)
    candidates = torch.load(tmp_path / "out" / "candidate_directions_vlm.pt", weights_only=True).flatten(0, 1)
    assert all(row["kl_div"] is not None for row in rows)
    null = [index for index, r in enumerate(candidates) if r.norm() <= 1e-12]
    alive = [i for i, row in enumerate(rows) if row["layer"] < int(N_LAYERS * 0.8) and i not in null]
    survivors = sorted(alive, key=lambda index: rows[index]["kl_div"])[:2]
    scored = [index for index, row in enumerate(rows) if row["ablation_refusal"] is not None]
    assert set(scored) == {*survivors, *null}
    assert [index for index, row in enumerate(rows) if row["steering_refusal"] is not None] == scored
    assert len(scored) < N_CANDIDATES
    per_prompt = load_file(tmp_path / "out" / "per_prompt_scores.safetensors")
    assert per_prompt["ablation_refusal"].isnan().any(dim=1).tolist() == [i not in scored for i in range(len(rows))]
    assert not per_prompt["kl_div"].isnan().any()


def test_an_exhaustive_search_scores_every_candidate_alike(run: Run, tmp_path: Path) -> None:
    assert run("--top_k_candidates", "2") == 0
    few = scores_of(tmp_path)
    assert run("--search", "exhaustive") == 0
    every = scores_of(tmp_path)
    assert all(row[name] is not None for row in every for name in SCORES)
    assert any(row["ablation_refusal"] is None for row in few)
    for one, other in zip(few, every, strict=True):
        for name in SCORES:
            assert one[name] is None or other[name] == pytest.approx(one[name], abs=1e-4)


def test_what_was_relaxed_is_said_and_recorded(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--kl_threshold", "-1", "--induce_threshold", "50") == 0
    shown = capsys.readouterr()
    assert "This one may not carry refusal at all: its KL is above -1, and its steering score is below " in shown.out
    said = [line.removeprefix("Warning: ") for line in shown.err.splitlines()]
    assert len(said) == 3
    assert f"Warning: {said[0]}".startswith(DOUBT)
    assert said[1].startswith("No candidate has a KL of -1 or less below layer 3")
    assert said[2].startswith("No candidate reaches a steering score of")
    assert read(tmp_path, "direction_metadata_vlm.json")["warnings"] == said
    assert read(tmp_path, "run.json")["warnings"] == said


def test_a_run_that_relaxes_nothing_warns_of_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusal_tokens, "diagnose", lambda *args, **kinds: None)
    assert run("--kl_threshold", "100", "--induce_threshold", "-50") == 0
    shown = capsys.readouterr()
    assert (shown.err, "may not carry refusal" in shown.out) == ("", False)
    assert read(tmp_path, "direction_metadata_vlm.json")["warnings"] == []


def test_the_filter_fills_up_to_eight_with_a_warning(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model refuses nothing, so the most fitting harmful prompts are taken."""
    sizes = ["--n_train", "5", "--n_val", "3"]
    assert cli.main_vlm([*where(made), *sizes, "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "The filter left 0 of 5 harmful_train prompts; the 5 most fitting are used." in said
    warnings = read(tmp_path, "direction_metadata_vlm.json")["warnings"]
    assert [text for text in warnings if "harmful_val" in text]
    assert read(tmp_path, "run.json")["prompts"]["harmful_train"]["kept"] == 5


def sizes_of(*flags: str) -> tuple[int, int]:
    prompts = parse(flags, VISION_CONFIG).prompts
    return prompts.n_train, prompts.n_val


def test_the_environment_sets_the_sample_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_N_TRAIN", "5")
    monkeypatch.setenv("VLM_N_VAL", "2")
    assert sizes_of() == (5, 2)


def test_sample_sizes_of_the_environment_reach_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_N_TRAIN", "5")
    monkeypatch.setenv("VLM_N_VAL", "2")
    assert run(sizes=()) == 0
    drawn = {name: part["drawn"] for name, part in read(tmp_path, "run.json")["prompts"].items()}
    left = {"harmful_test": 1, "harmless_test": 1}
    assert drawn == {"harmful_train": 5, "harmless_train": 5, "harmful_val": 2, "harmless_val": 2, **left}


@pytest.mark.parametrize("overruled", ["1000", "many", ""])
@pytest.mark.parametrize("flags", [("--n_train", "4"), ("--n-train=4",), ("--n_tr", "4")])
def test_a_flag_wins_over_the_environment(
    overruled: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_N_TRAIN", overruled)
    monkeypatch.setenv("VLM_N_VAL", "2")
    assert sizes_of(*flags) == (4, 2)


def test_help_is_given_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_N_TRAIN", "many")
    with pytest.raises(SystemExit) as ended:
        cli.main_vlm(["--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize("variable", ["VLM_N_TRAIN", "VLM_N_VAL"])
@pytest.mark.parametrize("value", ["0", "-3", "many", "2.5", "²", "9" * 5000])
def test_a_sample_size_that_is_no_positive_number_is_an_error(
    variable: str,
    value: str,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    assert run(sizes=()) == 2
    assert capsys.readouterr().err == f"Error: {variable}={value[:40]}: must be a whole number of at least 1.\n"
    assert not (tmp_path / "out").exists()


def test_the_defaults_are_those_of_the_configuration() -> None:
    assert parse([], VISION_CONFIG) == VISION_CONFIG
    assert (VISION_CONFIG.prompts.n_train, VISION_CONFIG.prompts.n_val, VISION_CONFIG.batch_size) == (128, 32, 8)
    assert VISION_CONFIG.output_dir == Path("artifacts/vlm")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top_k_candidates", "0"], "--top_k_candidates 0: must be at least 1"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--n_train", "1000"], "There are 8 harmful pairs, but 1000 + 3 were asked for"),
        (["--harmful", "nowhere"], "nowhere: no such folder. Expected a folder of images with a metadata.jsonl"),
        (["--refusal_tokens", "zyxwvut"], "is not one token"),
        (["--chat_template", "{{ messages }"], "chat template"),
        (["--chat_template", "<image>{{ bos_token }}"], "leaves out the request"),
        (
            ["--model_id", str(ROOT / "refusal_direction" / "demo" / "model")],
            "does not know as a vision-language model",
        ),
    ],
)
def test_an_error_is_one_message_and_exit_code_2(
    arguments: list[str], said: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("Error: ")
    assert shown.out == ""
    assert list((tmp_path / "out").iterdir() if (tmp_path / "out").exists() else ()) == []


def test_sanity_shows_completions_of_images_with_questions(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--sanity") == 0
    shown = capsys.readouterr().out
    assert shown.count("Harmful: ") == shown.count("Harmless: ") == shown.count("  ablated:") == 3
    assert shown.count("  steered:") == 3
    assert shown.count("  baseline:") == 6
    assert "red (image bad/" in shown
    assert "blue (image good/" in shown


def test_calibration_is_recorded(run: Run, tmp_path: Path) -> None:
    assert run("--calibrate_refusal") == 0
    tokens = read(tmp_path, "run.json")["refusal_tokens"]
    assert tokens["source"] == "calibrated on 0 refusals of 4 harmful prompts"
    assert set(tokens["texts"]) >= {"I", "Sorry", "No", "As"}


def test_images_that_cannot_be_shown_are_skipped_with_a_count(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = own_pairs(tmp_path / "mixed", "green", count=10)
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    (folder / "5.png").write_bytes(b"")
    Image.new("CMYK", (9, 9)).save(folder / "7.png", "JPEG")
    assert run("--harmful", str(folder)) == 0
    said = capsys.readouterr().err
    assert f"2 of the images of mixed cannot be read and are left out ({folder / '2.png'}: " in said
    ids = [name for part in read(tmp_path, "run.json")["prompts"].values() for name in part["ids"]]
    assert not {"mixed/2", "mixed/5"} & set(ids)
    assert any("cannot be read" in text for text in read(tmp_path, "direction_metadata_vlm.json")["warnings"])


def test_the_batch_size_does_not_change_the_scores(run: Run, tmp_path: Path) -> None:
    found = []
    for size in ("1", "50"):
        assert run("--search", "exhaustive", "--batch_size", size) == 0
        found.append(scores_of(tmp_path))
    for one, many in zip(*found, strict=True):
        for name in SCORES:
            assert one[name] == pytest.approx(many[name], abs=1e-4)


def test_harmful_pairs_alone_are_not_enough(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model_id", str(made / "model"), "--harmful", str(made / "bad"), "--output_dir", str(tmp_path)]
    assert cli.main_vlm(arguments) == 2
    assert "--harmful and --harmless go together" in capsys.readouterr().err


def test_a_loaded_model_and_pairs_can_be_given_from_python(run: Run, made: Path, tmp_path: Path) -> None:
    """The same direction as by the command line, and progress that ends where it was announced to."""
    announced: dict[str, list[int]] = {}

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[int], object]]:
        done = announced[description] = [total, 0]

        def tick(count: int) -> None:
            done[1] += count

        yield tick

    pools = [vision.read_folder(made / kind) for kind in ("bad", "good")]
    pairs = sample_pairs(*pools, SampleSizes(n_train=5, n_val=3, seed=42))
    found = extract(load_vision_model(str(made / "model")), prompts=pairs, progress=progress)
    assert found.config.rules == VISION
    assert all(total == done for total, done in announced.values())
    assert len(announced) == 3
    arguments = [*where(made), "--n_train", "5", "--n_val", "3", "--output_dir", str(tmp_path / "out")]
    assert cli.main_vlm(arguments) == 0
    direction = load_direction(tmp_path / "out")
    assert (direction.layer, direction.position) == (found.direction.layer, found.direction.position)
    assert torch.allclose(direction.vector, found.direction.vector, atol=1e-5)


def test_a_direction_of_length_zero_is_never_selected(run: Run, tmp_path: Path) -> None:
    """The last tokens are often the same in every prompt, and so is what layer 0 gets there; such a KL is 0."""
    assert run("--kl_threshold", "1e-9", "--induce_threshold", "-50") == 0
    candidates = torch.load(tmp_path / "out" / "candidate_directions_vlm.pt", weights_only=True)
    assert (candidates.norm(dim=-1) == 0).any()  # control
    assert load_direction(tmp_path / "out").vector.norm() > 0


def test_a_single_validation_prompt_has_no_standard_error(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--induce_threshold", "-50", sizes=("--n_train", "2", "--n_val", "1")) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(DOUBT)


def test_the_script_says_nothing_but_the_results(made: Path, tmp_path: Path) -> None:
    arguments = [*where(made), "--skip_filter", "--kl_threshold", "100", "--induce_threshold", "-50"]
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    done = forked.run(
        ["extract_refusal_direction_vlm.py", *arguments, "--output_dir", str(tmp_path / "out")],
        env={**environment, "VLM_N_TRAIN": "4", "VLM_N_VAL": "3"},
    )
    assert done.returncode == 0
    (said,) = done.stderr.splitlines()
    assert said.startswith(DOUBT)
    assert "Refusal direction of" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(file_names(VISION))


def test_the_demo_runs_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--n_train", "24", "--n_val", "12", "--output_dir", str(tmp_path / "out"), "--sanity"]
    assert cli.main_vlm(["--model_id", "demo", *few]) == 0
    metadata = read(tmp_path, "direction_metadata_vlm.json")
    assert metadata["model_id"] == "demo"
    assert load_direction(tmp_path / "out").model_id == "demo"
    assert "steered:" in capsys.readouterr().out
