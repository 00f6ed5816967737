"""GGUF files: the model that they hold, what is said of it, and files that cannot be used."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from refusal_direction import Config, demo, extract, load_chat_model, load_vision_model, prompts
from refusal_direction.config import ModelSource, PromptSource, Thresholds
from refusal_direction.errors import ConfigurationError, ModelAccessError
from refusal_direction.fingerprint import fingerprint
from refusal_direction.flags import parse
from refusal_direction.models import gguf as reading
from refusal_direction.models.loading import check_access
from refusal_direction.models.refusal_tokens import RefusalTokens
from tests.ggufs import build, write_folder, write_gguf

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
SMALL = PromptSource(n_train=2, n_val=2, n_test=0)
EVERY = Thresholds(kl_threshold=1e9, induce_threshold=-1e9)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(build(), tmp_path_factory.mktemp("gguf") / "model.gguf")


def scores(model: str) -> torch.Tensor:
    source = ModelSource(model)
    config = Config(model=source, prompts=SMALL, thresholds=EVERY, skip_filter=True, refusal_tokens=("I",))
    chosen = prompts.gather(Config(model=ModelSource("demo"), prompts=SMALL))
    result = extract(model, config, prompts=chosen)
    return torch.stack([result.scores.ablation, result.scores.steering, result.scores.kl]).nan_to_num()


@needs_gguf
def test_a_gguf_file_is_the_model_that_was_written_to_it(file: Path, tmp_path: Path):
    folder = write_folder(build(), tmp_path)
    ours, theirs = load_chat_model(file), load_chat_model(folder)
    assert ours.render("Hi I'm  7") == theirs.render("Hi I'm  7")
    assert ours.encode("Hi I'm  7") == theirs.encode("Hi I'm  7")
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    expected = scores(str(folder))
    assert torch.allclose(scores(str(file)), expected, atol=1e-5)
    other = write_folder(build(seed=1), tmp_path / "other")
    assert not torch.allclose(scores(str(other)), expected, atol=1e-2)  # control


@needs_gguf
def test_quantised_weights_are_dequantised_and_named(tmp_path: Path):
    from gguf import GGMLQuantizationType, dequantize, quantize

    chat = load_chat_model(write_gguf(build(), tmp_path / "m.gguf", type="Q8_0"))
    own, found = build().model.layers[1].mlp.down_proj.weight, chat.model.model.layers[1].mlp.down_proj.weight
    rounded = dequantize(quantize(own.detach().numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    assert torch.equal(found, torch.from_numpy(rounded))
    assert not torch.equal(found, own)  # control
    assert not hasattr(chat.model.config, "quantization_config")
    assert reading.weight_type(chat.gguf_types) == "GGUF Q8_0, de-quantised"
    assert sum(chat.gguf_types.values()) == sum(weight.numel() for weight in chat.model.parameters())


@needs_gguf
def test_the_record_of_a_run_says_what_the_weights_were(file: Path):
    from refusal_direction.records import model_record

    record = model_record(load_chat_model(file), n_layers=3, d_model=64)
    assert record.quantization["weights"] == "GGUF F32"
    assert record.quantization["quant_method"] == "gguf"


@needs_gguf
@needs_links
def test_nothing_is_taken_from_files_that_lie_beside_it(file: Path, tmp_path: Path):
    for path in demo.MODEL_DIR.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.gguf").write_bytes(file.read_bytes())
    chat = load_chat_model(ModelSource(str(tmp_path), gguf_file="model.gguf"))
    assert chat.encode("Hello") == load_chat_model(file).encode("Hello")
    assert load_chat_model(tmp_path).gguf_types is None  # control: config.json comes first


@needs_gguf
def test_a_folder_with_one_gguf_file_is_that_model_and_one_with_more_asks_which(file: Path, tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(file.read_bytes())
    assert load_chat_model(tmp_path).encode("Hi") == load_chat_model(file).encode("Hi")
    (tmp_path / "b.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ModelAccessError, match=r"holds 2 GGUF files: a\.gguf, b\.gguf.*--gguf_file"):
        load_chat_model(tmp_path)
    check_access(ModelSource(str(tmp_path), gguf_file="b.gguf"))
    with pytest.raises(ModelAccessError, match=r"no such file. Its GGUF files: a\.gguf, b\.gguf"):
        check_access(ModelSource(str(tmp_path), gguf_file="c.gguf"))


def test_gguf_file_is_a_flag():
    assert parse(["--model_id", "o/m", "--gguf_file", "q.gguf"], Config()).model.gguf_file == "q.gguf"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"", "is empty"),
        (b"{}" * 30, "not a GGUF file"),
    ],
    ids=["pointer", "empty", "other"],
)
@needs_gguf
def test_a_file_that_is_no_gguf_is_explained(content: bytes, said: str, tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelAccessError, match=said):
        check_access(ModelSource(str(tmp_path / "m.gguf")))


@needs_gguf
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_explained(share: float, file: Path, tmp_path: Path):
    content = file.read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelAccessError, match="incomplete or damaged: download it again"):
        load_chat_model(tmp_path)


@needs_gguf
def test_an_architecture_that_transformers_does_not_convert_is_explained(file: Path, tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(
        file.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0frobs", 1)
    )
    with pytest.raises(ModelAccessError, match=r"cannot convert .*frobs.*safetensors"):
        load_chat_model(tmp_path)


@needs_gguf
@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"quantization": "4bit"}, ConfigurationError, "Leave out --quantization"),
        ({"revision": "main"}, ConfigurationError, "Leave out --revision"),
        ({"gguf_file": "x.gguf"}, ConfigurationError, "no folder or Hub id. Leave it out"),
    ],
)
def test_settings_that_do_not_go_with_a_file_are_explained(
    settings: dict[str, str], kind: type[Exception], said: str, file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("refusal_direction.models.loading.find_spec", lambda name: True)  # bitsandbytes
    with pytest.raises(kind, match=said):
        check_access(ModelSource(str(file), **settings))


@needs_gguf
def test_parts_of_a_model_are_to_be_joined_first(tmp_path: Path):
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelAccessError, match=r"cannot join parts.*llama-gguf-split --merge"):
        check_access(ModelSource(str(tmp_path)))


def test_a_missing_file_says_how_one_on_the_hub_is_named(tmp_path: Path):
    with pytest.raises(ModelAccessError, match=r"There is no file .*--gguf_file m\.gguf"):
        load_chat_model(tmp_path / "m.gguf")


def test_a_file_of_another_kind_says_to_give_the_folder():
    with pytest.raises(ModelAccessError, match="is a file, but no .gguf file. Give the folder"):
        load_chat_model(demo.MODEL_DIR / "model.safetensors")


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigurationError, match="pip install gguf"):
        load_chat_model(tmp_path)


@needs_gguf
def test_images_need_another_format(file: Path):
    with pytest.raises(ConfigurationError, match="for text alone"):
        load_vision_model(file)


@needs_gguf
@pytest.mark.parametrize("factor", [None, 8.0])
def test_a_scaling_of_rotary_positions_that_is_dropped_is_warned_of(
    factor: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    load_chat_model(write_gguf(build(), tmp_path / "m.gguf", rotary_factor=factor))
    assert ("scales rotary positions" in caplog.text) == (factor is not None)


@needs_gguf
def test_another_file_is_another_run(file: Path, tmp_path: Path):
    chat, path = load_chat_model(file), tmp_path / "m.gguf"
    path.write_bytes(file.read_bytes())

    def of() -> str:
        return fingerprint(Config(model=ModelSource(str(path))), chat, [], RefusalTokens((1,), ("I",), ""))

    before = of()
    assert of() == before
    path.write_bytes(file.read_bytes() + b"\0")
    assert of() != before
