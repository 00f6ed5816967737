"""Results on disk: what they hold, and that they are never half-written or mixed."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from refusal_direction import load_direction, load_run
from refusal_direction.config import TEXT, VISION, Rules
from refusal_direction.errors import NoCandidateError, OutputError
from refusal_direction.output import artifacts
from refusal_direction.output.artifacts import file_names, written_files
from refusal_direction.prompts import Kind, Prompt, PromptSets, Split
from refusal_direction.prompts.sets import SETS, set_name
from refusal_direction.results import RunResult
from refusal_direction.selection.conditions import Rejection


def marked(extraction: RunResult, mark: str) -> RunResult:
    """The same results, recognisable in every JSON file's stead by the model's id."""
    return replace(extraction, model=replace(extraction.model, model_id=mark))


def marks(folder: Path) -> set[str]:
    """The runs whose files lie side by side in a folder."""
    found = set()
    if (folder / "direction_metadata.json").exists():
        found.add(json.loads((folder / "direction_metadata.json").read_text())["model_id"])
    if (folder / "run.json").exists():
        found.add(json.loads((folder / "run.json").read_text())["model"]["model_id"])
    return found


def test_the_files_have_the_names_shapes_and_keys_of_the_specification(extraction: RunResult, tmp_path: Path):
    artifacts.write(extraction, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))
    n_positions, n_layers, d_model = extraction.candidates.laid_out().shape
    direction = torch.load(tmp_path / "refusal_direction.pt", weights_only=True)
    candidates = torch.load(tmp_path / "candidate_directions.pt", weights_only=True)
    metadata = json.loads((tmp_path / "direction_metadata.json").read_text())
    scores = json.loads((tmp_path / "all_direction_scores.json").read_text())
    assert direction.shape == (d_model,)
    assert candidates.shape == (n_positions, n_layers, d_model)
    assert torch.equal(direction, candidates[metadata["position"], metadata["layer"]])
    assert [(row["position"], row["layer"]) for row in scores] == [
        (position, layer) for position in range(-n_positions, 0) for layer in range(n_layers)
    ]
    assert set(scores[0]) == {
        "position", "layer", "ablation_refusal", "steering_refusal", "kl_div", "method", "measured", "dropped",
        "rejection",
    }  # fmt: skip


def test_the_direction_is_a_copy_and_not_a_view_of_all_candidates(extraction: RunResult, tmp_path: Path):
    artifacts.write(extraction, tmp_path)
    size = (tmp_path / "refusal_direction.pt").stat().st_size
    assert size < 4 * extraction.model.d_model + 2048


def test_run_json_identifies_the_run(extraction: RunResult, prompts: PromptSets, tmp_path: Path):
    artifacts.write(extraction, tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert torch.__version__.startswith(run["versions"]["torch"])
    assert run["config"]["prompts"]["seed"] == 42
    assert [token["text"] for token in run["eoi_tokens"]][-1] == "\n"
    assert run["refusal_tokens"]["texts"] == ["I"]
    assert run["engine"]["name"] == "layer-major"
    assert run["peak_memory_bytes"] > 0
    assert set(run["prompts"]) == set(map(set_name, SETS))
    for which, record in extraction.prompts.items():
        stored = run["prompts"][set_name(which)]
        assert (stored["drawn"], stored["kept"]) == (len(record.ids), len(record.kept))
        assert stored["sha256"] == prompts.digest(which)
        assert stored["ids"] == [prompt.id for prompt in prompts[which]]
        assert stored["kept_ids"] == [prompts[which][index].id for index in record.kept]


def test_per_prompt_scores_average_to_the_scores(extraction: RunResult, tmp_path: Path):
    artifacts.write(extraction, tmp_path)
    scores = json.loads((tmp_path / "all_direction_scores.json").read_text())
    with safe_open(tmp_path / "per_prompt_scores.safetensors", "pt") as file:
        for name in ("ablation_refusal", "steering_refusal", "kl_div"):
            means = file.get_tensor(name).mean(1)
            assert torch.allclose(means, torch.tensor([row[name] for row in scores], dtype=means.dtype))
        for kind, name in ((Kind.HARMFUL, "ablation_refusal"), (Kind.HARMLESS, "kl_div")):
            ids = json.loads(file.metadata()[f"{kind.value}_ids"])
            assert tuple(ids) == extraction.prompts[kind, Split.VALIDATION].kept_ids
            assert len(ids) == file.get_tensor(name).shape[1]


def test_baseline_scores_are_those_of_the_prompts_drawn_set_after_set(extraction: RunResult, tmp_path: Path):
    artifacts.write(extraction, tmp_path)
    drawn = [extraction.prompts[kind, split] for split in (Split.TRAIN, Split.VALIDATION) for kind in Kind]
    with safe_open(tmp_path / "per_prompt_scores.safetensors", "pt") as file:
        refusal, probability = file.get_tensor("baseline_refusal"), file.get_tensor("baseline_probability")
    assert torch.equal(refusal, torch.cat([record.refusal for record in drawn]))
    assert torch.equal(probability, torch.cat([record.probability for record in drawn]))
    assert refusal[:24].mean() > 0 > refusal[24:48].mean()  # control: harmful prompts come first


def test_an_infinite_threshold_is_spelled_out(extraction: RunResult, tmp_path: Path):
    thresholds = replace(extraction.config.thresholds, kl_threshold=math.inf, induce_threshold=-math.inf)
    artifacts.write(replace(extraction, config=replace(extraction.config, thresholds=thresholds)), tmp_path)
    recorded = json.loads((tmp_path / "run.json").read_text())["config"]["thresholds"]
    assert recorded == {
        "kl_threshold": "inf", "induce_threshold": "-inf", "prune_layers": 0.2, "top_k_candidates": None
    }  # fmt: skip


def test_json_has_null_for_nan(extraction: RunResult, tmp_path: Path):
    broken = replace(extraction.means[0], kl_div=float("nan"))
    selection = replace(extraction.selection, means=(broken, *extraction.means[1:]))
    artifacts.write(replace(extraction, selection=selection), tmp_path)
    text = (tmp_path / "all_direction_scores.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)[0]["kl_div"] is None


def test_what_was_written_can_be_loaded(extraction: RunResult, tmp_path: Path):
    artifacts.write(extraction, tmp_path)
    loaded, direction = load_direction(tmp_path), extraction.direction
    assert torch.equal(loaded.vector, direction.vector)
    assert (loaded.layer, loaded.position, loaded.model_id) == (direction.layer, direction.position, direction.model_id)
    assert loaded.method == direction.method == "difference_of_means"


@pytest.mark.parametrize("load", [load_direction, load_run])
def test_loading_from_an_empty_folder_is_explained(tmp_path: Path, load: Callable[[Path], object]):
    with pytest.raises(OutputError, match="holds no results of a run"):
        load(tmp_path)


def failing_after(calls: int, function: Callable[..., object], error: BaseException) -> Callable[..., object]:
    left = calls

    def wrapper(*args: object, **kwargs: object) -> object:
        nonlocal left
        if left == 0:
            raise error
        left -= 1
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("operation", ["replace", "fsync", "unlink"])
@pytest.mark.parametrize("calls", range(8))
def test_a_crash_at_any_moment_leaves_one_set_and_the_next_run_recovers(
    extraction: RunResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    calls: int,
    error: BaseException,
):
    artifacts.write(marked(extraction, "old"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing_after(calls, getattr(os, operation), error))
        try:
            artifacts.write(marked(extraction, "new"), tmp_path)
            finished = True
        except (KeyboardInterrupt, MemoryError):
            finished = False
    assert len(marks(tmp_path)) <= 1
    survivor = load_direction(tmp_path).model_id
    assert load_run(tmp_path).model.model_id == survivor
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))
    assert marks(tmp_path) == {survivor}
    assert survivor == "new" or not finished


def with_activations(extraction: RunResult) -> RunResult:
    """The same results with random activations."""
    model = extraction.model
    shape = (3, model.n_positions, model.n_layers, model.d_model)
    config = replace(extraction.config, keep_activations=True)
    return replace(extraction, config=config, activations={kind: torch.randn(shape) for kind in Kind})


@pytest.mark.parametrize("operation", ["replace", "fsync", "unlink", "rmdir"])
@pytest.mark.parametrize("calls", range(9))
@pytest.mark.parametrize("kept", ["old", "new"])
def test_a_crash_never_leaves_the_activations_of_another_run(
    extraction: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, calls: int, kept: str
):
    runs = {mark: marked(extraction, mark) for mark in ("old", "new")}
    runs[kept] = with_activations(runs[kept])
    artifacts.write(runs["old"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing_after(calls, getattr(os, operation), KeyboardInterrupt()))
        with contextlib.suppress(KeyboardInterrupt):
            artifacts.write(runs["new"], tmp_path)
    survivor = load_run(tmp_path)
    expected = {*file_names(TEXT), *artifacts.optional_file_names(survivor.config)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (survivor.activations is not None) == (survivor.model.model_id == kept)
    if survivor.activations is not None:
        assert all(torch.equal(survivor.activations[kind], runs[kept].activations[kind]) for kind in Kind)  # type: ignore[index]


def without_selection(extraction: RunResult) -> RunResult:
    """The same scores under conditions that no candidate meets."""
    selection = extraction.selection
    conditions = replace(selection.conditions, kl_threshold=-1.0)
    rejections = tuple(Rejection.KL if found in (None, Rejection.NOT_BEST) else found for found in selection.rejections)
    unselected = replace(
        selection, index=None, ties=(), rejections=rejections, conditions=conditions, conditions_asked=conditions
    )
    return replace(extraction, selection=unselected)


@pytest.mark.parametrize("operation", ["replace", "fsync", "unlink", "rmdir"])
@pytest.mark.parametrize("calls", range(9))
@pytest.mark.parametrize("unselected", ["old", "new"])
def test_a_crash_never_leaves_the_direction_of_another_run(
    extraction: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, calls: int, unselected: str
):
    """Nor that of a run beside files of a run that selected none."""
    runs = {mark: with_activations(marked(extraction, mark)) for mark in ("old", "new")}
    runs[unselected] = without_selection(marked(extraction, unselected))
    artifacts.write(runs["old"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing_after(calls, getattr(os, operation), KeyboardInterrupt()))
        with contextlib.suppress(KeyboardInterrupt):
            artifacts.write(runs["new"], tmp_path)
    survivor = load_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(written_files(survivor))
    assert (survivor.selection.index is None) == (survivor.model.model_id == unselected)
    assert (survivor.activations is None) == (survivor.model.model_id == unselected)
    if survivor.selection.index is None:
        with pytest.raises(NoCandidateError):
            load_direction(tmp_path)
    else:
        assert load_direction(tmp_path).model_id == survivor.model.model_id


@pytest.mark.parametrize("rules", [TEXT, VISION], ids=["text", "images"])
def test_a_run_without_a_selection_says_why_in_its_metadata(extraction: RunResult, tmp_path: Path, rules: Rules):
    config = replace(extraction.config, rules=rules)
    names = set(file_names(rules))
    direction, metadata = (
        next(name for name in names if name.startswith(stem)) for stem in ("refusal_direction", "direction_metadata")
    )
    artifacts.write(replace(extraction, config=config), tmp_path)
    assert json.loads((tmp_path / metadata).read_text())["selected"] == "best"
    run = without_selection(replace(extraction, config=config))
    artifacts.write(run, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names - {direction} == set(written_files(run))
    stored = json.loads((tmp_path / metadata).read_text())
    assert stored["selected"] is None
    assert stored["discarded"]["KL > 0.1 (--kl_threshold)"] > 0
    assert "candidates passes every condition" in stored["explanation"]
    (nearest, *_) = stored["nearest_misses"]
    score = run.selection.misses[0].score
    assert (nearest["position"], nearest["layer"], nearest["kl_div"]) == (score.position, score.layer, score.kl_div)
    assert "kl" in nearest["violated"]
    assert nearest["needs"]["kl_threshold"] == pytest.approx(score.kl_div, abs=1e-3)
    assert not {"layer", "position"} & stored.keys()


def test_the_direction_of_a_run_without_a_selection_is_explained(extraction: RunResult, tmp_path: Path):
    artifacts.write(extraction, tmp_path)
    run = without_selection(extraction)
    artifacts.write(run, tmp_path)
    with pytest.raises(NoCandidateError, match="selected no direction(.|\n)*The nearest misses(.|\n)*--select nearest"):
        load_direction(tmp_path)


def test_a_full_disk_leaves_the_old_set_untouched(
    extraction: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    artifacts.write(marked(extraction, "old"), tmp_path)
    monkeypatch.setattr(os, "fsync", failing_after(2, os.fsync, OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        artifacts.write(marked(extraction, "new"), tmp_path)
    assert marks(tmp_path) == {"old"}
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits on files to imitate a full disk by")
@pytest.mark.parametrize("size", [0, 1000, 12_000])
def test_a_disk_that_is_full_from_some_byte_on_is_one_clear_error(extraction: RunResult, tmp_path: Path, size: int):
    import resource
    import signal

    artifacts.write(marked(extraction, "old"), tmp_path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OutputError, match="could not be written"):
            artifacts.write(marked(extraction, "new"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert marks(tmp_path) == {"old"}
    assert {path.name for path in tmp_path.iterdir()} == set(file_names(TEXT))


@pytest.mark.parametrize("name", ["refusal_direction.pt", "direction_metadata.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_explained(extraction: RunResult, tmp_path: Path, name: str, content: bytes):
    artifacts.write(extraction, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError, match="cannot be read"):
        load_direction(tmp_path)


@pytest.mark.parametrize("vector", [torch.tensor([1.0, math.nan]), torch.zeros(0), torch.ones(4, dtype=torch.int64)])
def test_what_is_no_direction_is_not_handed_out(extraction: RunResult, tmp_path: Path, vector: torch.Tensor):
    artifacts.write(extraction, tmp_path)
    torch.save(vector, tmp_path / "refusal_direction.pt")
    with pytest.raises(OutputError, match="cannot be read.*Run it again"):
        load_direction(tmp_path)


@pytest.mark.parametrize("layer", [None, "5", 5.0])
def test_a_layer_that_is_no_number_is_not_handed_out(extraction: RunResult, tmp_path: Path, layer: object):
    artifacts.write(extraction, tmp_path)
    path = tmp_path / "direction_metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer": layer}))
    with pytest.raises(OutputError, match="cannot be read.*not a whole number"):
        load_direction(tmp_path)


def test_a_folder_with_results_of_the_other_pipeline_is_refused(extraction: RunResult, tmp_path: Path):
    """They would share run.json."""
    artifacts.write(extraction, tmp_path)
    artifacts.check_writable(tmp_path, TEXT)
    with pytest.raises(OutputError, match="results of a run on text. Choose another --output_dir"):
        artifacts.check_writable(tmp_path, VISION)


def test_the_digest_of_prompts_is_of_their_images_too():
    def digest(prompt: Prompt) -> str:
        return PromptSets([prompt], [], [], []).digest((Kind.HARMFUL, Split.TRAIN))

    red, blue = (Prompt("a/0", "What is this?", Image.new("RGB", (4, 4), colour)) for colour in ("red", "blue"))
    assert digest(red) == digest(red)
    assert len({digest(one) for one in (red, blue, Prompt("a/0", "What is this?"))}) == 3


def test_a_folder_where_a_file_goes_is_found_out_before_the_work(tmp_path: Path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OutputError, match=r"run\.json is a folder in the place of a results file"):
        artifacts.check_writable(tmp_path, TEXT)
    artifacts.check_writable(tmp_path / "other", TEXT)


def test_other_files_in_the_folder_are_left_alone(extraction: RunResult, tmp_path: Path):
    (tmp_path / "vlm").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    artifacts.write(extraction, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "vlm").is_dir()


def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Choose another --output_dir"):
        artifacts.check_writable(tmp_path / "file" / "artifacts", TEXT)


def test_only_the_result_of_a_run_is_written(extraction: RunResult, tmp_path: Path):
    with pytest.raises(TypeError, match="write needs the RunResult that extract returns, not a Direction"):
        artifacts.write(extraction.direction, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
