"""A model whose layers are on disk: each of their tensors is read at most twice in a whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils.offload import OffloadedWeightsLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from refusal_direction.engine import residency
from refusal_direction.engine.interventions import ablated
from refusal_direction.engine.residency import resident
from refusal_direction.models.placement import is_offloaded, offload_hooks
from tests.families import FAMILIES, build, layers_of
from tests.problems import as_inputs, engine_of, make_problem, solve

families = pytest.mark.parametrize("name", ["gemma", "llama"])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor was read from disk."""
    counted: Counter[str] = Counter()
    own = OffloadedWeightsLoader.__getitem__

    def counting(self: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        counted[key] += 1
        return own(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
    return counted


def on_disk(model: PreTrainedModel, folder: Path, *, everything: bool = False) -> PreTrainedModel:
    """The same model with its layers on disk, or with everything there."""
    model.save_pretrained(folder / "model")
    outside = "disk" if everything else "cpu"
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers": "disk", **dict.fromkeys(parts, outside)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=folder / "offload", dtype=torch.float32
    )
    return offloaded.eval()


def layer_tensors(model: PreTrainedModel, name: str) -> set[str]:
    prefix = FAMILIES[name].layers
    return {f"{prefix}.{tensor}" for tensor, _ in layers_of(model, FAMILIES[name]).named_parameters()}


@families
def test_whole_run_reads_each_layer_tensor_at_most_twice(name: str, tmp_path: Path, reads: Counter[str]) -> None:
    problem, plain = make_problem(), build(FAMILIES[name])
    model = on_disk(plain, tmp_path)
    assert is_offloaded(model)
    reads.clear()
    answer = solve(engine_of(model, problem, batch_size=3), problem)
    assert answer.engine.name == "layer-major"
    counts = {tensor: reads[tensor] for tensor in layer_tensors(model, name)}
    assert set(counts.values()) <= {1, 2}
    assert max(counts.values()) == 2  # control: every one is needed in both passes


@families
def test_scores_from_disk_are_those_from_memory(name: str, tmp_path: Path) -> None:
    problem, plain = make_problem(), build(FAMILIES[name])
    expected = solve(engine_of(plain, problem, batch_size=3), problem)
    found = solve(engine_of(on_disk(plain, tmp_path), problem, batch_size=3), problem)
    for ours, theirs in (
        (found.candidates, expected.candidates),
        (found.baseline.refusal, expected.baseline.refusal),
        (found.scores.ablation, expected.scores.ablation),
        (found.scores.steering, expected.scores.steering),
        (found.scores.kl, expected.scores.kl),
    ):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-6)


@families
def test_plain_forwards_read_every_time(name: str, tmp_path: Path, reads: Counter[str]) -> None:
    """Control: accelerate by itself reads at each call, and the count sees it."""
    model = on_disk(build(FAMILIES[name]), tmp_path)
    reads.clear()
    with torch.no_grad():
        for prompt in make_problem().harmful_val[:3]:
            model(**as_inputs(prompt), use_cache=False)
    assert {reads[tensor] for tensor in layer_tensors(model, name)} == {3}


@families
def test_weights_go_back_to_disk_after_a_run(name: str, tmp_path: Path) -> None:
    problem = make_problem()
    model = on_disk(build(FAMILIES[name]), tmp_path)
    places = {tensor: weight.device.type for tensor, weight in model.named_parameters()}
    assert "meta" in places.values()
    solve(engine_of(model, problem), problem)
    assert {tensor: weight.device.type for tensor, weight in model.named_parameters()} == places


@families
def test_weights_go_back_to_disk_after_a_failure(name: str, tmp_path: Path) -> None:
    model = on_disk(build(FAMILIES[name]), tmp_path)
    engine = engine_of(model, make_problem())

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.baseline(lambda *_: None, fail)
    assert all(weight.device.type == "meta" for weight in layers_of(model, FAMILIES[name]).parameters())


@families
def test_only_one_layer_is_in_memory_at_a_time(name: str, tmp_path: Path) -> None:
    """Beyond the first pass's start, where the layers that were called to learn from stay for their first use."""
    problem = make_problem()
    model = on_disk(build(FAMILIES[name]), tmp_path)
    engine = engine_of(model, problem)
    held: list[int] = []

    def look(*_: object) -> None:
        layers = layers_of(model, FAMILIES[name])
        held.append(sum(any(weight.device.type != "meta" for weight in layer.parameters()) for layer in layers))

    engine.baseline(lambda *_: None, look)
    assert held
    assert max(held) <= 2  # the first, until the pass ends, and the one at work
    assert look() is None
    assert held[-1] == 0


def test_resident_loads_once_for_any_number_of_calls_and_nests(tmp_path: Path, reads: Counter[str]) -> None:
    model = on_disk(build(FAMILIES["llama"]), tmp_path)
    layers = layers_of(model, FAMILIES["llama"])
    reads.clear()
    with torch.no_grad(), resident(layers[0]):
        for _ in range(3):
            with resident(layers[0]):
                model(**as_inputs([5, 6, 7]), use_cache=False)
    own = {tensor: reads[tensor] for tensor in layer_tensors(model, "llama")}
    assert {count for tensor, count in own.items() if ".layers.0." in tensor} == {1}
    assert {count for tensor, count in own.items() if ".layers.0." not in tensor} == {3}
    assert all(weight.device.type == "meta" for weight in layers[0].parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".dat"])
def test_while_a_layer_is_at_work_the_next_ones_tensors_are_read_and_nothing_else(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are offloaded as they are in the checkpoint stay in its file; others get files of their own."""
    plain = build(FAMILIES["llama"])
    places = {"model.layers": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    in_files = (
        on_disk(plain, tmp_path) if suffix == ".safetensors" else dispatch_model(plain, places, offload_dir=tmp_path)
    )
    layers, own = layers_of(in_files, FAMILIES["llama"]), residency._blocks
    read: dict[str, bytes] = {}

    def blocks(weights: OffloadedWeightsLoader, name: str) -> Iterator[torch.Tensor | bytes]:
        assert name not in read
        assert (weights.index[name].get("safetensors_file") is None) == (suffix == ".dat")
        read[name] = b""
        for block in own(weights, name):
            read[name] += block if isinstance(block, bytes) else block.numpy().tobytes()
            yield block

    monkeypatch.setattr(residency, "_BLOCK_BYTES", 1000)  # several blocks a tensor
    monkeypatch.setattr(residency, "_BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(residency, "_blocks", blocks)
    with resident(layers[0]):
        residency._reader.submit(int).result()  # the only thread has done what it was given before this
    monkeypatch.setattr(residency, "_read", lambda *_: None)
    with resident(layers[1]):
        expected = {
            f"model.layers.1.{name}": weight.detach().numpy().tobytes() for name, weight in layers[1].named_parameters()
        }
    assert read == expected


def test_blocks_are_copies_that_the_file_must_be_read_for(tmp_path: Path) -> None:
    """A tensor of a safetensors file is a view of the mapped file: it alone would read nothing."""
    model = on_disk(build(FAMILIES["llama"]), tmp_path)
    hook = next(hook for _, hook in offload_hooks(layers_of(model, FAMILIES["llama"]).modules()))
    weights = hook.weights_map.dataset
    name = next(name for name in weights.index if name.startswith("model.layers."))
    file_bytes = Path(weights.index[name]["safetensors_file"]).stat().st_size
    for block in residency._blocks(weights, name):
        assert isinstance(block, torch.Tensor)
        assert block.untyped_storage().nbytes() == block.nbytes < file_bytes


def test_a_disk_that_fails_while_reading_ahead_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised and explained when the weights are loaded."""
    problem, plain = make_problem(), build(FAMILIES["llama"])
    own, failed = residency.safe_open, []

    def gone(path: str, **kwargs: Any) -> Any:
        failed.append(path)
        return own(tmp_path / "gone", **kwargs)

    monkeypatch.setattr(residency, "safe_open", gone)
    found = solve(engine_of(on_disk(plain, tmp_path), problem), problem)
    assert failed
    assert torch.allclose(found.scores.ablation, solve(engine_of(plain, problem), problem).scores.ablation, atol=1e-5)


@families
def test_ablation_of_a_model_on_disk_is_that_in_memory(name: str, tmp_path: Path) -> None:
    plain = build(FAMILIES[name])
    model, r = on_disk(plain, tmp_path), torch.randn(32)
    inputs = as_inputs(make_problem().harmful_val[0])
    with torch.no_grad(), ablated(plain, r), ablated(model, r):
        assert torch.allclose(model(**inputs).logits, plain(**inputs).logits, atol=1e-5)


@families
def test_model_that_is_wholly_on_disk_runs_too(name: str, tmp_path: Path, reads: Counter[str]) -> None:
    """Embedding and head too: they are read a fixed number of times, whatever the number of rows."""
    problem, plain = make_problem(), build(FAMILIES[name])
    expected = solve(engine_of(plain, problem), problem)
    model = on_disk(plain, tmp_path, everything=True)
    counts = []
    for batch_size in (1, None):
        reads.clear()
        answer = solve(engine_of(model, problem, batch_size), problem)
        assert torch.allclose(answer.scores.ablation, expected.scores.ablation, atol=1e-5)
        counts.append(dict(reads))
    assert counts[0] == counts[1]
    assert max(counts[0][tensor] for tensor in layer_tensors(model, name)) == 2
