"""PEFT adapters: layers of their own beside the model's, and the same results as if they were merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from refusal_direction import Config, demo, extract, load_chat_model
from refusal_direction.config import ModelSource, PromptSource, Thresholds
from refusal_direction.engine.interventions import ResidualStream, ablated, intervened, steered
from refusal_direction.errors import ConfigurationError, ModelAccessError, UnsupportedModelError
from refusal_direction.models import adapters, loading
from refusal_direction.prompts import gather
from refusal_direction.prompts.sets import Kind, Split
from refusal_direction.scoring.metrics import refusal_score
from tests.families import D_MODEL, FAMILIES, build
from tests.problems import engine_of, leak_of, make_problem, solve

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")
families = pytest.mark.parametrize("name", ["llama", "gemma2"])
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


def test_a_folder_with_an_adapter_says_how_to_use_it(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelAccessError, match=r"holds an adapter, not a model.*--adapter"):
        load_chat_model(str(tmp_path))


def test_an_adapter_without_peft_names_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install peft"):
        load_chat_model(ModelSource("demo", adapter="somewhere"))


def lora(model: PreTrainedModel, folder: Path, **settings: Any) -> tuple[Path, PreTrainedModel]:
    """An adapter with random weights, saved, and the model that it is merged into."""
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": "all-linear", **settings}
    wrapped = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    wrapped.save_pretrained(folder)
    return folder, wrapped.merge_and_unload()


@needs_peft
@families
def test_an_adapter_gives_what_the_merged_model_gives(name: str, tmp_path: Path):
    problem, model = make_problem(), build(FAMILIES[name])
    folder, merged = lora(build(FAMILIES[name]), tmp_path)
    before = solve(engine_of(model, problem), problem)
    adapters.add_adapter(model, str(folder))
    found, expected = solve(engine_of(model, problem), problem), solve(engine_of(merged, problem), problem)
    assert found.engine.name == "layer-major"
    for ours, theirs, without in (
        (found.candidates, expected.candidates, before.candidates),
        (found.scores.ablation, expected.scores.ablation, before.scores.ablation),
        (found.scores.steering, expected.scores.steering, before.scores.steering),
        (found.scores.kl, expected.scores.kl, before.scores.kl),
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert not torch.allclose(without, theirs, atol=1e-1)  # control: the adapter matters


@needs_peft
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 20]},
    ],
    ids=["embedding", "tokens"],
)
def test_an_adapter_on_the_embedding_gives_what_peft_gives(settings: dict[str, Any], tmp_path: Path):
    from peft import PeftModel

    folder, _ = lora(AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR), tmp_path, **settings)
    if "trainable_token_indices" in settings:
        change(folder, lambda name, weight: weight + 1.0 if "trainable_tokens" in name else weight)
    chat, plain = load_chat_model(ModelSource("demo", adapter=str(folder))), load_chat_model("demo")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR), folder).eval()
    ids = torch.tensor([[2, 4, *range(5, 25)]])
    with torch.no_grad():
        assert torch.equal(chat.model(ids).logits, theirs(ids).logits)
        assert not torch.allclose(chat.model(ids).logits, plain.model(ids).logits, atol=1e-2)  # control
    config = Config(prompts=PromptSource(n_train=2, n_val=2, n_test=0), skip_filter=True)
    config = replace(config, thresholds=Thresholds(kl_threshold=1e9, induce_threshold=-1e9))
    prompts = gather(replace(config, model=ModelSource("demo")))
    result = extract(chat, config, prompts=prompts)
    assert result.engine.name == "layer-major"  # so the logits are those of the model's own forward
    kept = result.prompts[Kind.HARMFUL, Split.TRAIN].refusal
    own = [
        float(refusal_score(theirs(**chat.inputs(p)).logits[:, -1], result.refusal_tokens.ids))
        for p in prompts.harmful_train
    ]
    assert torch.allclose(kept, torch.tensor(own, dtype=kept.dtype), atol=1e-4)


def change(folder: Path, how: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the weights of a saved adapter."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name: how(name, weight) for name, weight in load_file(file).items()}, file)


@needs_peft
def test_an_adapter_with_a_larger_vocabulary_says_by_how_much(tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    folder, _ = lora(model, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(
        ModelAccessError, match=rf"larger vocabulary .* by 3 tokens.*resize_token_embeddings\({size + 3}\)"
    ):
        load_chat_model(ModelSource("demo", adapter=str(folder)))


@needs_peft
@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_writes_of_layers_with_adapters_are_those_without(name: str, dtype: torch.dtype, tmp_path: Path):
    model = build(FAMILIES[name], dtype=dtype)
    expected = ResidualStream(build(FAMILIES[name], dtype=dtype)).writes
    adapters.add_adapter(model, str(lora(build(FAMILIES[name]), tmp_path)[0]))
    assert ResidualStream(model).writes == expected
    assert leak_of(model, torch.randn(D_MODEL)) < (1e-6 if dtype is torch.float32 else 1e-2)
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@needs_peft
def test_an_adapter_can_be_asked_for_by_its_folder(tmp_path: Path):
    folder, merged = lora(AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR), tmp_path)
    chat = load_chat_model(ModelSource("demo", adapter=str(folder)))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(chat.model(ids).logits, merged(ids).logits, atol=1e-4)
    assert chat.adapter == str(folder)


@needs_peft
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = str(lora(build(FAMILIES["llama"]), tmp_path / "llama")[0])
    with pytest.raises(ModelAccessError, match="Target modules .* not found"):
        adapters.add_adapter(build(FAMILIES["gpt2"]), folder)
    with pytest.raises(ModelAccessError, match=r"does not fit Gemma.*size mismatch.*Give the model it was trained on"):
        adapters.add_adapter(AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR), folder)


@needs_peft
def test_an_adapter_with_gaps_is_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = lora(build(FAMILIES["llama"]), tmp_path)[0]
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelAccessError, match="1 tensors have no counterpart"):
        adapters.add_adapter(build(FAMILIES["llama"]), str(folder))


@needs_peft
def test_an_adapter_that_was_trained_on_a_model_of_another_name_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = lora(build(FAMILIES["llama"]), tmp_path)[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/other"}))
    adapters.add_adapter(build(FAMILIES["llama"]), str(folder))
    assert "was trained on someone/other" in caplog.text


@needs_peft
def test_a_pickled_adapter_is_not_taken_unasked(tmp_path: Path):
    from safetensors.torch import load_file

    folder = lora(build(FAMILIES["llama"]), tmp_path)[0]
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelAccessError, match="--allow_pickle"):
        adapters.add_adapter(build(FAMILIES["llama"]), str(folder))
    adapters.add_adapter(build(FAMILIES["llama"]), str(folder), allow_pickle=True)


@needs_peft
def test_an_adapter_that_changes_the_prompt_is_refused(tmp_path: Path):
    from peft import PromptTuningConfig, get_peft_model

    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(build(FAMILIES["llama"]), settings).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="changes the prompt"):
        adapters.add_adapter(build(FAMILIES["llama"]), str(tmp_path))


@needs_peft
@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_an_adapter_says_what_is_needed(name: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelAccessError, match="adapter_config.json|neither a folder here nor an adapter"):
        adapters.add_adapter(build(FAMILIES["llama"]), str(tmp_path / name))


@needs_peft
def test_what_peft_wraps_is_the_same_model_to_interventions():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(build(FAMILIES["llama"]), LoraConfig(r=4, target_modules="all-linear"))
    base, (u, v), ids = wrapped.get_base_model(), torch.randn(2, D_MODEL), torch.tensor([[5, 6, 7, 8]])
    with steered(wrapped, u, layer=1):
        assert intervened(base)
    assert not intervened(base)
    with torch.no_grad():
        plain = wrapped(ids).logits
        with ablated(wrapped, u), ablated(base, v):
            mixed = wrapped(ids).logits
        with ablated(base, u), ablated(base, v):
            expected = wrapped(ids).logits
    assert torch.allclose(mixed, expected, atol=1e-5)
    assert not torch.allclose(mixed, plain, atol=1e-2)  # control


@needs_peft
def test_an_adapter_without_weights_is_explained(tmp_path: Path):
    folder = lora(build(FAMILIES["llama"]), tmp_path)[0]
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelAccessError, match=r"has no weights: an adapter's are in adapter_model\.safetensors"):
        adapters.add_adapter(build(FAMILIES["llama"]), str(folder))


@needs_peft
@pytest.mark.parametrize("config", [{"peft_type": "FOO"}, {}], ids=["unknown", "none"])
def test_a_kind_of_adapter_that_peft_does_not_know_is_explained(config: dict[str, str], tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelAccessError, match="names no kind of adapter that peft .* knows"):
        adapters.add_adapter(build(FAMILIES["llama"]), str(tmp_path))


@needs_peft
def test_an_adapter_that_is_missing_is_found_before_any_weights_are_loaded(tmp_path: Path):
    with pytest.raises(ModelAccessError, match="neither a folder here nor an adapter"):
        loading.check_access(ModelSource("demo", adapter=str(tmp_path / "missing")))
