"""Loading models: devices, dtypes, and what the Hub says when it says no."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from refusal_direction import demo, load_chat_model, load_vision_model
from refusal_direction.config import ModelSource
from refusal_direction.errors import ConfigurationError, ModelAccessError, TokenizerError, UnsupportedModelError
from refusal_direction.models import loading


def refusing(kind: type[Exception]):
    """The way transformers passes on what the Hub says."""

    def from_pretrained(*args: object, **kwargs: object) -> None:
        raise OSError("You are trying to access something.") from kind.__new__(kind)

    return from_pretrained


@pytest.mark.parametrize("load", [load_chat_model, load_vision_model])
@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), None, 7, {"model_id": "demo"}])
def test_what_is_neither_an_id_nor_a_folder_is_named(load: Any, given: object):
    with pytest.raises(ConfigurationError, match=f"or a ModelSource, not by a {type(given).__name__}"):
        load(given)


def test_a_gated_model_says_how_to_get_access(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", refusing(GatedRepoError))
    with pytest.raises(
        ModelAccessError, match=r"Accept its licence on .*google/gemma-7b-it.*HF_TOKEN.*--model_id demo"
    ):
        load_chat_model("google/gemma-7b-it")


def test_an_unknown_model_id_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", refusing(RepositoryNotFoundError))
    with pytest.raises(ModelAccessError, match=r"neither a folder here nor a model on the Hub.*Check the spelling"):
        load_chat_model("gogle/gemma-7b-it")


def test_an_id_that_cannot_be_one_says_so():
    with pytest.raises(ModelAccessError, match="neither a folder here nor a model on the Hub"):
        load_chat_model("not an id!")


def test_no_network_and_nothing_cached_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelAccessError, match=r"not in its local cache.*Check the network"):
        load_chat_model("nobody/nothing-that-exists")


def test_a_folder_without_a_model_says_what_is_needed(tmp_path: Path):
    with pytest.raises(ModelAccessError, match=r"A model folder needs config\.json"):
        load_chat_model(str(tmp_path))


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(tmp_path)
    with pytest.raises(ModelAccessError, match="does not know as a chat model.*extract_refusal_direction_vlm.py"):
        load_chat_model(str(tmp_path))


def test_a_folder_without_tokenizer_files_is_found_out(tmp_path: Path):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((demo.MODEL_DIR / name).read_bytes())
    with pytest.raises((TokenizerError, ModelAccessError), match="tokenizer"):
        load_chat_model(str(tmp_path))


def copied(folder: Path) -> Path:
    for path in demo.MODEL_DIR.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_weights_that_were_cut_off_are_explained(tmp_path: Path):
    weights = copied(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ModelAccessError, match="cannot be read.*download it again"):
        load_chat_model(str(tmp_path))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "model.safetensors"]
)
def test_a_git_lfs_pointer_is_told_from_the_file(name: str, tmp_path: Path):
    (copied(tmp_path) / name).write_bytes(POINTER)
    with pytest.raises(ModelAccessError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_chat_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_empty_file_is_named(name: str, tmp_path: Path):
    (copied(tmp_path) / name).write_bytes(b"")
    with pytest.raises(ModelAccessError, match=rf"{name} is empty. Download it again"):
        load_chat_model(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"metadata": {}}', '{"weight_map": {}}', "[]"])
def test_an_index_that_lists_no_weights_is_explained(index: str, tmp_path: Path):
    (copied(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelAccessError, match=r"index\.json lists no files of weights.*Download it again"):
        load_chat_model(tmp_path)


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize(
    ("content", "said"),
    [(POINTER, "git lfs pull"), (b"", "is empty"), (b"junk" * 99, "not a file of weights")],
    ids=["pointer", "empty", "junk"],
)
def test_a_pickle_that_is_none_is_not_to_be_allowed(content: bytes, said: str, allow_pickle: bool, tmp_path: Path):
    (copied(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelAccessError, match=said) as error:
        load_chat_model(ModelSource(str(tmp_path), allow_pickle=allow_pickle))
    assert "--allow_pickle" not in str(error.value)


def test_a_pickle_of_other_objects_is_explained(tmp_path: Path):
    (copied(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Path, protocol=2))
    with pytest.raises(ModelAccessError, match="holds other objects than tensors"):
        load_chat_model(ModelSource(str(tmp_path), allow_pickle=True))


def test_text_that_is_not_json_is_named(tmp_path: Path):
    (copied(tmp_path) / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelAccessError, match=r"config\.json is not valid JSON"):
        load_chat_model(tmp_path)


def test_a_tokenizer_that_contradicts_itself_is_explained(tmp_path: Path):
    path = copied(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": {"type": "frob"}}))
    with pytest.raises((TokenizerError, ModelAccessError), match="tokenizer"):
        load_chat_model(tmp_path)


def test_a_value_that_a_configuration_may_not_have_is_not_taken_for_another_kind_of_model(tmp_path: Path):
    with pytest.raises(ModelAccessError, match=r"cannot build a model from the config\.json .*flash_attention_9"):
        load_chat_model(changed(tmp_path, _attn_implementation="flash_attention_9"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"architectures": ["GemmaForSequenceClassification"]}, "GemmaForSequenceClassification.*writes no text"),
        ({"model_type": "bart", "architectures": None}, r"encoder-decoder \(bart\)"),
    ],
    ids=["classifier", "encoder-decoder"],
)
def test_a_model_of_which_only_a_part_would_be_loaded_is_refused(
    settings: dict[str, object], said: str, tmp_path: Path
):
    with pytest.raises(UnsupportedModelError, match=said):
        load_chat_model(changed(tmp_path, **settings))


def test_integers_without_their_scales_are_refused(tmp_path: Path):
    file = copied(tmp_path) / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**weights, name: (weights[name] * 50).to(torch.int8)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelAccessError, match=r"q_proj\.weight as integers \(I8\).*no quantization_config"):
        load_chat_model(tmp_path)


def test_an_empty_model_id_says_what_to_give():
    with pytest.raises(ConfigurationError, match="--model_id: it is empty"):
        load_chat_model("")


def changed(folder: Path, **settings: object) -> str:
    path = copied(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(folder)


def test_weights_of_another_shape_are_explained(tmp_path: Path):
    with pytest.raises(ModelAccessError, match="other shapes than its config.json says"):
        load_chat_model(changed(tmp_path, intermediate_size=300))


@pytest.mark.parametrize("settings", [{"num_hidden_layers": "7"}, {"hidden_size": "many"}])
def test_a_configuration_that_makes_no_sense_is_explained(tmp_path: Path, settings: dict[str, int | str]):
    with pytest.raises(ModelAccessError, match=r"config.json of .* cannot be used.*Fix it"):
        load_chat_model(changed(tmp_path, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_act": "foo"},
        {"rope_parameters": {"rope_type": "foo"}},
        {"dtype": "float17"},
        {"num_attention_heads": 0},
        {"vocab_size": -5},
        {"pad_token_id": 10**9},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_configuration_that_transformers_stumbles_over_is_explained(tmp_path: Path, settings: dict[str, object]):
    with pytest.raises(ModelAccessError, match=r"config\.json"):
        load_chat_model(changed(tmp_path, **settings))


def test_a_path_names_a_model_too(tmp_path: Path):
    assert load_chat_model(copied(tmp_path)).model_id == str(tmp_path)


def test_weights_that_are_not_used_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    load_chat_model("demo")
    assert not caplog.records  # control
    load_chat_model(changed(tmp_path, num_hidden_layers=7))
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("refusal_direction")]
    assert "9 of the weights of" in warning
    assert "model.layers.7." in warning


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (ModelSource("demo", dtype="float8"), "--dtype float8 is not known"),
        (ModelSource("demo", device="toaster"), "--device toaster is not a device"),
        (ModelSource("demo", chat_template="nowhere.jinja"), "--chat_template nowhere.jinja: neither"),
    ],
)
def test_a_setting_that_makes_no_sense_is_explained(source: ModelSource, said: str):
    with pytest.raises(ConfigurationError, match=said):
        load_chat_model(source)


def test_a_device_that_is_not_there_is_explained():
    absent = "mps" if torch.cuda.is_available() else "cuda"  # no machine has both
    with pytest.raises(ConfigurationError, match="this machine .* has none"):
        load_chat_model(ModelSource("demo", device=absent))


def test_a_cpu_computes_in_float32_where_it_fits_and_in_bfloat16_where_not(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(loading, "free_bytes", lambda device: 16 << 30)
    assert loading._dtype("auto", cpu, 1_000_000_000) is torch.float32
    assert loading._dtype("auto", cpu, 8_500_000_000) is torch.bfloat16


def test_a_model_larger_than_memory_is_spread_over_all_there_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "free_bytes", lambda device: 16 << 30)
    cpu = torch.device("cpu")
    assert loading._placement("auto", cpu, 10 << 30) == {"device_map": {"": cpu}}
    assert loading._placement("auto", cpu, 17 << 30)["device_map"] == "auto"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_template_file_is_read(encoding: str, tmp_path: Path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0]['content'] }} ->", encoding=encoding)
    assert load_chat_model(ModelSource("demo", chat_template=str(path))).render("Hello") == "Hello ->"
