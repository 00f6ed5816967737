"""Weights that are not plain: quantised ones, pickles and code that come with a model, and what does not fit or is not there."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GemmaForCausalLM, PreTrainedModel

from refusal_direction import ChatModel, demo, load_chat_model
from refusal_direction.config import ModelSource
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.errors import (
    ConfigurationError,
    ModelAccessError,
    OutOfMemoryError,
)
from refusal_direction.models import access, loading
from refusal_direction.models.writes import in_float32
from tests.families import D_MODEL, FAMILIES, build
from tests.problems import engine_of, leak_of, make_problem, solve

families = pytest.mark.parametrize("name", ["llama", "gemma2"])
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def copied(folder: Path, *without: str) -> Path:
    """The demo model in a folder of its own."""
    for path in demo.MODEL_DIR.iterdir():
        if path.name not in without:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


class Quantised(nn.Module):
    """A linear layer whose weights are 8-bit, and which computes in the dtype of its input."""

    def __init__(self, own: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        scale = own.weight.abs().amax(1, keepdim=True) / (127 if dtype is torch.int8 else 448)
        whole = (own.weight / scale).round() if dtype is torch.int8 else own.weight / scale
        self.weight = nn.Parameter(whole.to(dtype), requires_grad=False)
        self.scale = nn.Parameter(scale)
        self.bias = own.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x) * self.scale.to(x), self.bias)


def quantised(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for layer in model.model.layers:
        for name, module in [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]:
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, Quantised(module, dtype))
    return model


eight_bits = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])


@families
@eight_bits
def test_the_writes_of_quantised_layers_are_found_and_their_weights_left_alone(name: str, dtype: torch.dtype):
    plain = build(FAMILIES[name], dtype=torch.bfloat16)
    model = quantised(build(FAMILIES[name], dtype=torch.bfloat16), dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with in_float32(model.model.layers[0]) as widened:
        assert not widened
    assert ResidualStream(model).writes == ResidualStream(plain).writes
    after = model.state_dict()
    assert all(after[key].dtype == tensor.dtype and torch.equal(after[key], tensor) for key, tensor in before.items())


@families
@eight_bits
def test_ablation_of_quantised_weights_leaves_nothing_along_the_direction(name: str, dtype: torch.dtype):
    model, r = quantised(build(FAMILIES[name]), dtype), torch.randn(D_MODEL)
    assert leak_of(model, r) < 1e-6


def test_scores_of_quantised_weights_are_those_of_the_numbers_that_they_stand_for():
    problem = make_problem()
    model = quantised(build(FAMILIES["llama"]), torch.int8)
    same = build(FAMILIES["llama"])
    with torch.no_grad():
        for layer, other in zip(model.model.layers, same.model.layers, strict=True):
            for name, module in layer.named_modules():
                if isinstance(module, Quantised):
                    other.get_submodule(name).weight.copy_(module.weight * module.scale)
    found, expected = solve(engine_of(model, problem), problem), solve(engine_of(same, problem), problem)
    assert found.engine.name == "layer-major"
    assert torch.allclose(found.scores.ablation, expected.scores.ablation, atol=1e-4)
    assert torch.allclose(found.scores.kl, expected.scores.kl, atol=1e-4)


class Packed(Tensor):
    """Passes for bfloat16, but holds something else: quantised tensors of torchao and quanto are of this kind."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Packed:
        return Tensor._make_subclass(cls, data)


def test_weights_of_a_class_of_their_own_are_not_converted():
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(Packed(layer.weight.data), requires_grad=False)
    with in_float32(layer) as widened:
        assert not widened
        assert {tensor.dtype for tensor in layer.parameters()} == {torch.bfloat16}


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [pytest.param("8bit", marks=pytest.mark.extended), "4bit"])
def test_weights_can_be_quantised_while_they_are_loaded(bits: str, tmp_path: Path):
    config = AutoConfig.from_pretrained(demo.MODEL_DIR, hidden_size=128, intermediate_size=256, head_dim=32)
    GemmaForCausalLM(config).save_pretrained(copied(tmp_path, "model.safetensors", "config.json"))
    chat = load_chat_model(ModelSource(str(tmp_path), quantization=bits, dtype="bfloat16"))
    assert any(not weight.is_floating_point() for weight in chat.model.parameters())
    assert [site.module for site in ResidualStream(chat.model).writes[0]] == ["self_attn.o_proj", "mlp.down_proj"]
    r = torch.randn(128)
    assert leak_of(chat.model, r) < 1e-2
    chat.model.save_pretrained(tmp_path)
    again = load_chat_model(ModelSource(str(tmp_path), dtype="bfloat16"))  # a quantised checkpoint says so itself
    assert any(not weight.is_floating_point() for weight in again.model.parameters())
    with pytest.raises(ConfigurationError, match="is quantised already"):
        load_chat_model(ModelSource(str(tmp_path), quantization=bits))


def test_quantising_without_bitsandbytes_names_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install bitsandbytes"):
        load_chat_model(ModelSource("demo", quantization="4bit"))


@needs_bitsandbytes
@pytest.mark.parametrize("broken", [True, False])
def test_a_shape_that_this_machine_cannot_run_quantised_is_found_out_by_loading(
    broken: bool, monkeypatch: pytest.MonkeyPatch
):
    """Quantising it goes well, multiplying by it does not."""
    used: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        used.append(x)
        if broken:
            raise RuntimeError("There is no kernel for this shape.")
        return x

    def from_pretrained(*args: Any, quantization_config: object, **settings: Any) -> Any:
        model, report = own(*args, **settings)
        linear = model.model.layers[2].mlp.up_proj
        linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
        linear.forward = forward
        return model, report

    own = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    said = (
        "could not be loaded with quantised weights on this machine: There is no kernel for this shape. Use a machine"
    )
    with pytest.raises(ModelAccessError, match=said) if broken else nullcontext():
        load_chat_model(ModelSource("demo", quantization="4bit"))
    assert len(used) == 1


def test_a_quantisation_that_this_machine_cannot_run_says_so():
    with (
        pytest.raises(ModelAccessError, match=r"quantised weights on this machine: No GPU found\. Use a machine"),
        access.access_explained("someone/model-fp8", quantised=True),
    ):
        raise RuntimeError("No GPU found.")
    with pytest.raises(RuntimeError, match="a bug"), access.access_explained("someone/model"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
    ids=["CUDA", "CPU", "Python"],
)
def test_weights_that_do_not_fit_are_explained(error: BaseException, monkeypatch: pytest.MonkeyPatch):
    def from_pretrained(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(OutOfMemoryError, match=r"weights of demo \(about 0\.0 GiB\) do not fit on cpu.*--quantization"):
        load_chat_model("demo")


CODE = """
from transformers import GemmaConfig, GemmaForCausalLM
from pathlib import Path

Path(__file__).with_name("ran").touch()

class OwnConfig(GemmaConfig):
    model_type = "own"

class OwnForCausalLM(GemmaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with Python code of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "model").mkdir()
    folder = copied(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(CODE)
    return folder


def test_code_that_comes_with_a_model_does_not_run_unasked(with_code: Path):
    with pytest.raises(ModelAccessError, match=r"Python code of its own.*with your rights.*--trust_remote_code"):
        load_chat_model(str(with_code))
    assert not list(with_code.parent.rglob("ran"))


def test_code_that_is_trusted_runs(with_code: Path):
    chat = load_chat_model(ModelSource(str(with_code), trust_remote_code=True))
    assert type(chat.model).__name__ == "OwnForCausalLM"
    assert list(with_code.parent.rglob("ran"))  # control: what the test above looks for


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A model folder without weights in safetensors format."""
    folder = copied(tmp_path, "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_not_taken_unasked(pickled: Path):
    with pytest.raises(ModelAccessError, match=r"no weights in safetensors format.*can hold code.*--allow_pickle"):
        load_chat_model(str(pickled))


def test_pickled_weights_are_taken_where_they_are_asked_for(pickled: Path, chat: ChatModel):
    loaded = load_chat_model(ModelSource(str(pickled), allow_pickle=True)).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in chat.model.state_dict().items())


def test_weights_with_gaps_are_found_out(tmp_path: Path):
    """transformers fills them with random numbers, and says so in a log."""
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.3.mlp.up_proj" not in name}
    model.save_pretrained(copied(tmp_path, "model.safetensors"), state_dict=state)
    with pytest.raises(ModelAccessError, match=r"lacks 1 of the model's weights \(model\.layers\.3\.mlp\.up_proj"):
        load_chat_model(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (ModelSource("demo", revision="main"), "only models on the Hub have revisions"),
        (ModelSource(str(demo.MODEL_DIR), revision="main"), "only models on the Hub have revisions"),
        (ModelSource("demo", quantization="3bit"), "--quantization 3bit is not known. Use 4bit or 8bit"),
    ],
)
def test_a_setting_that_makes_no_sense_is_explained(source: ModelSource, said: str):
    with pytest.raises(ConfigurationError, match=said):
        load_chat_model(source)


def test_a_revision_reaches_everything_that_is_fetched(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def spy(kind: Any) -> None:
        own = kind.from_pretrained

        def from_pretrained(path: str, **settings: Any) -> Any:
            asked.setdefault(kind.__name__, settings.pop("revision", None))  # the tokenizer asks for the config again
            return own(demo.MODEL_DIR, **settings)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        spy(kind)
    load_chat_model(ModelSource("someone/model", revision="v1"))
    assert asked == {"AutoConfig": "v1", "AutoTokenizer": "v1", "AutoModelForCausalLM": "v1"}


def test_an_unknown_revision_says_so(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub.errors import RevisionNotFoundError

    def from_pretrained(*args: object, **kwargs: object) -> None:
        raise OSError("not a valid git identifier") from RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(ModelAccessError, match="no such --revision"):
        load_chat_model(ModelSource("someone/model", revision="v9"))
