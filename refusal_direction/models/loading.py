"""Loading a chat model from the Hub or a folder, placed and in a dtype that suit the machine."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

import psutil
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from refusal_direction import demo
from refusal_direction.config import DEMO_MODEL, Config, ModelSource
from refusal_direction.demo import vision as demo_vision
from refusal_direction.errors import ConfigurationError, ModelAccessError, TokenizerError, UnsupportedModelError
from refusal_direction.models.access import access_explained, configuration_explained, fitting, not_built
from refusal_direction.models.adapters import add_adapter, check_adapter
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.damage import check_floating, check_texts
from refusal_direction.models.gguf import (
    GgufContents,
    alone,
    check_rotary,
    commit_of,
    contents_of,
    converting,
    gguf_file,
)
from refusal_direction.models.vision import VisionChatModel
from refusal_direction.runtime import processes
from refusal_direction.runtime.memory import free_bytes

__all__ = ["check_access", "load", "load_chat_model", "load_vision_model"]

log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BITS = {"4bit": 4, "8bit": 8}
_SHARE_FOR_WEIGHTS = 0.75  # of free memory
_KINDS = {
    AutoModelForCausalLM: ("chat model", "with images, extract_refusal_direction_vlm.py"),
    AutoModelForImageTextToText: ("vision-language model", "for text alone, extract_refusal_direction.py"),
}
"""Kind of model that each pipeline loads, and the command of the other pipeline."""
_Chat = TypeVar("_Chat", bound=ChatModel)


def check_access(source: ModelSource) -> None:
    """Check before a long download of prompts or weights that the model is accessible, by reading its config.json.

    Raises ModelAccessError, ConfigurationError.
    """
    _check_settings(source)
    _device(source.device)
    if gguf_file(source) is None and source.model_id != DEMO_MODEL:
        with access_explained(source.model_id), configuration_explained(source.model_id):
            AutoConfig.from_pretrained(source.model_id, **_origin(source))


def load(config: Config) -> ChatModel:
    """Load the model of a configuration: for text, or for images with text."""
    return load_vision_model(config.model) if config.rules.images else load_chat_model(config.model)


def load_chat_model(source: ModelSource | str | os.PathLike[str]) -> ChatModel:
    """Load a chat model: a Hub id, a folder, a GGUF file, or "demo". Weights that do not fit are offloaded to CPU memory
    and disk.

    Raises ModelError (ModelAccessError if it is gated, unknown or out of reach, TokenizerError, ChatTemplateError, ...),
    ConfigurationError, OutOfMemoryError.
    """
    source = _source(source)
    files = _files(source, demo.MODEL_DIR)
    model, tokenizer = _load(source, files, AutoModelForCausalLM, AutoTokenizer)
    return _checked(ChatModel(model, tokenizer, **_identity(source, files, model)))


def load_vision_model(source: ModelSource | str | os.PathLike[str]) -> VisionChatModel:
    """Load a vision-language model with its processor, in the same way as `load_chat_model`, and with the same errors."""
    source = _source(source)
    files = _files(source, demo_vision.MODEL_DIR)
    if files.gguf is not None:
        raise ConfigurationError(
            f"{files.gguf} is a GGUF file, which transformers reads for text alone. Use the model in safetensors format, or, "
            "for text alone, extract_refusal_direction.py."
        )
    model, processor = _load(source, files, AutoModelForImageTextToText, AutoProcessor)
    return _checked(VisionChatModel(model, processor.tokenizer, **_identity(source, files, model), processor=processor))


def _source(given: ModelSource | str | os.PathLike[str]) -> ModelSource:
    if not isinstance(given, ModelSource | str | os.PathLike):
        raise ConfigurationError(
            f"A model is loaded by its Hub id, its folder or a ModelSource, not by a {type(given).__name__}. A model that is "
            "loaded already needs none of it: ChatModel(model, tokenizer, model_id)."
        )
    return given if isinstance(given, ModelSource) else ModelSource(model_id=os.fspath(given))


@dataclass(frozen=True)
class _Files:
    """The place of a model's files."""

    path: str
    """Folder or Hub id."""
    settings: dict[str, Any]
    """Arguments of every `from_pretrained`."""
    gguf: Path | None = None
    contents: GgufContents | None = None


def _files(source: ModelSource, demo_dir: Path) -> _Files:
    _check_settings(source)
    gguf = gguf_file(source)
    check_texts(Path(source.model_id))
    if gguf is not None:
        return _Files(str(gguf.parent), {"gguf_file": gguf.name}, gguf, contents_of(gguf))
    return _Files(str(demo_dir) if source.model_id == DEMO_MODEL else source.model_id, _origin(source))


def _identity(source: ModelSource, files: _Files, model: PreTrainedModel) -> dict[str, Any]:
    """Fields that text and vision-language models have in common."""
    return {
        "model_id": source.model_id,
        "revision": commit_of(files.gguf) if files.gguf else getattr(model.config, "_commit_hash", None),
        "chat_template": _template(source.chat_template),
        "system_prompt": source.system_prompt,
        "thinking": source.thinking,
        "adapter": source.adapter,
        "gguf_types": files.contents.types if files.contents else None,
    }


def _checked(chat: _Chat) -> _Chat:
    chat.check_tokenizer()
    chat.check_request()
    chat.check_system_prompt()
    return chat


def _load(source: ModelSource, files: _Files, model_class: Any, tokenizer_class: Any) -> tuple[PreTrainedModel, Any]:
    """Load the model, and its tokenizer or processor."""
    device = _device(source.device)
    with access_explained(source.model_id):
        with configuration_explained(source.model_id), converting(files.gguf):
            config = AutoConfig.from_pretrained(files.path, **files.settings)
        _check_kind(source.model_id, config, model_class)
        with configuration_explained(source.model_id):
            parameters = _parameters(config, model_class, source)
        tokenizer = _tokenizer(source.model_id, files, tokenizer_class)
    dtype = _dtype(source.dtype, device, parameters)
    weights = parameters * _BITS.get(source.quantization or "", 8 * dtype.itemsize) // 8
    placement = _placement(source.device, device, weights)
    quantised = hasattr(config, "quantization_config") or source.quantization is not None
    safe = None if source.allow_pickle else True
    with (
        access_explained(source.model_id, quantised=quantised),
        fitting(source.model_id, weights, device),
        converting(files.gguf),
        _offload_folder(placement) as (offload, owned_by),
    ):
        model, report = model_class.from_pretrained(
            files.path,
            config=config,
            dtype=dtype,
            use_safetensors=safe,
            output_loading_info=True,
            **files.settings,
            **_quantization(source, files, config, dtype),
            **placement,
            **offload,
        )
        owned_by(model)
        _try_quantised(model)
    _check_complete(source.model_id, report)
    if not hasattr(config, "quantization_config"):
        check_floating(Path(files.path))
    if files.contents is not None:
        check_rotary(files.contents, model.config, source.model_id)
    if source.adapter is not None:
        add_adapter(model, source.adapter, allow_pickle=source.allow_pickle)
    return model.eval(), tokenizer


def _tokenizer(model_id: str, files: _Files, tokenizer_class: Any) -> Any:
    """The tokenizer or processor.

    Raises TokenizerError for files that contradict themselves, for which the package tokenizers raises a bare Exception.
    """
    try:
        if files.gguf is None:
            return tokenizer_class.from_pretrained(files.path, **files.settings)
        with alone(files.gguf) as folder, converting(files.gguf):
            return tokenizer_class.from_pretrained(folder, **files.settings)
    except Exception as error:  # no narrower class can be caught: a bug is raised again
        if type(error) is not Exception:
            raise
        raise TokenizerError(
            f"The tokenizer of {model_id} cannot be made from its files ({error}). Download them again, or use another version "
            "of transformers."
        ) from error


def _origin(source: ModelSource) -> dict[str, Any]:
    revision = {"revision": source.revision} if source.revision else {}
    return {"trust_remote_code": source.trust_remote_code, **revision}


def _check_settings(source: ModelSource) -> None:
    """Raise ConfigurationError or ModelError, before any weights are loaded, for settings that cannot be used."""
    if source.revision is not None and (source.model_id == DEMO_MODEL or Path(source.model_id).exists()):
        raise ConfigurationError(
            f"--revision {source.revision}: only models on the Hub have revisions, and this is a folder. Leave out --revision."
        )
    if source.quantization is not None:
        if source.quantization not in _BITS:
            raise ConfigurationError(f"--quantization {source.quantization} is not known. Use {' or '.join(_BITS)}.")
        if find_spec("bitsandbytes") is None:
            raise ConfigurationError(
                f"--quantization {source.quantization} needs the package bitsandbytes, which is not installed: pip install "
                "bitsandbytes"
            )
    if source.adapter is not None:
        check_adapter(source.adapter, allow_pickle=source.allow_pickle)
    _template(source.chat_template)


def _check_kind(model_id: str, config: PretrainedConfig, model_class: Any) -> None:
    """Raise UnsupportedModelError for models of which transformers would load a part as if it were a decoder."""
    classifier = next((name for name in config.architectures or () if "Classification" in name), None)
    if classifier is not None:
        raise UnsupportedModelError(
            f"{model_id} is a {classifier}, as reward models are, and writes no text. Use the chat model that it was made from."
        )
    if config.is_encoder_decoder and model_class is AutoModelForCausalLM:
        raise UnsupportedModelError(
            f"{model_id} is an encoder-decoder ({config.model_type}), but the method needs a decoder alone. Use another model."
        )


def _quantization(source: ModelSource, files: _Files, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Settings to quantise weights while they are loaded; none for checkpoints that are quantised already."""
    if files.gguf is not None:
        return {"quantization_config": GgufConfig(dequantize=True)}
    if source.quantization is None:
        return {}
    if hasattr(config, "quantization_config"):
        raise ConfigurationError(f"{source.model_id} is quantised already. Leave out --quantization.")
    if source.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    }


@torch.no_grad()
def _try_quantised(model: PreTrainedModel) -> None:
    """Run one quantised linear layer of each shape, since not every processor supports every shape."""
    shapes = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.is_floating_point() and not module.weight.is_meta:
            shape = (module.in_features, module.out_features)
            if shape not in shapes:
                module(torch.zeros(1, module.in_features, dtype=model.dtype, device=module.weight.device))
            shapes.add(shape)


def _check_complete(model_id: str, report: dict[str, Any]) -> None:
    """Raise ModelAccessError if weights are missing, since transformers would fill them with random numbers.

    Warn of unused weights: they belong to a part that is not run, or the configuration belongs to another model.
    """
    unused = sorted(report.get("unexpected_keys") or ())
    if unused:
        log.warning("%d of the weights of %s are not used (%s, ...).", len(unused), model_id, ", ".join(unused[:3]))
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelAccessError(
            f"{model_id} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}, ...), so it would run with "
            "random ones. Its files are incomplete, or belong to another kind of model: download them again."
        )


def _device(asked: str) -> torch.device:
    """The device of a flag; with several processes on CUDA, each gets its own."""
    if asked == "auto":
        if torch.cuda.is_available():
            return _device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigurationError(f"--device {asked} is not a device. Use auto, cuda, cuda:1, mps or cpu.") from error
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available.get(device.type, False):
        raise ConfigurationError(
            f"--device {asked}: this machine (or this build of torch) has none. Use --device auto."
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", processes.local_rank() % torch.cuda.device_count())
    return device


def _parameters(config: PretrainedConfig, model_class: Any, source: ModelSource) -> int:
    """Number of the model's weights, without loading any."""
    try:
        with torch.device("meta"):
            model = model_class.from_config(config, trust_remote_code=source.trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise
        if "Unrecognized configuration class" not in str(error):
            raise not_built(source.model_id, error) from error
        kind, other = _KINDS[model_class]
        raise ModelAccessError(
            f"{source.model_id} is a {config.model_type}, which transformers does not know as a {kind}. Use a {kind}, or, {other}."
        ) from error
    return sum(weight.numel() for weight in model.parameters())


def _dtype(asked: str, device: torch.device, parameters: int) -> torch.dtype:
    """The dtype of a flag; auto: bfloat16 on an accelerator that supports it, and on a CPU if float32 does not fit."""
    if asked != "auto":
        if asked not in _DTYPES:
            raise ConfigurationError(f"--dtype {asked} is not known. Use auto, {', '.join(_DTYPES)}.")
        return _DTYPES[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.bfloat16
    fits = 4 * parameters < _SHARE_FOR_WEIGHTS * free_bytes(device)
    return torch.float32 if processes.all_ranks(fits) else torch.bfloat16


def _placement(asked: str, device: torch.device, weights: int) -> dict[str, object]:
    """One device if the weights fit; otherwise all devices, then CPU memory, then disk."""
    if asked != "auto" or weights < _SHARE_FOR_WEIGHTS * free_bytes(device):
        return {"device_map": {"": device}}
    limits: dict[int | str, int] = {"cpu": int(_SHARE_FOR_WEIGHTS * psutil.virtual_memory().available)}
    if device.type == "mps":
        limits["mps"] = limits.pop("cpu")
    alone = processes.size() == 1  # if not, the other devices belong to the other processes
    own = [device.index] if device.type == "cuda" else []
    for index in range(torch.cuda.device_count()) if alone else own:
        limits[index] = int(_SHARE_FOR_WEIGHTS * free_bytes(torch.device("cuda", index)))
    return {"device_map": "auto", "max_memory": limits}


@contextmanager
def _offload_folder(placement: Mapping[str, object]) -> Iterator[tuple[dict[str, str], Callable[[object], None]]]:
    """Create a folder for weights offloaded to disk; it is removed with its owner, or on failure."""
    if placement["device_map"] != "auto":
        yield {}, lambda owner: None
        return
    folder = tempfile.mkdtemp(prefix="refusal_direction_")
    with ExitStack() as on_failure:
        on_failure.callback(shutil.rmtree, folder, ignore_errors=True)

        def owned_by(owner: object) -> None:
            finalize(owner, on_failure.pop_all().close)

        yield {"offload_folder": folder}, owned_by


def _template(given: str | None) -> str | None:
    """A chat template, given as Jinja or as a file that holds it."""
    if given is None:
        return None
    if "{" in given:
        return given.removeprefix("\ufeff")
    try:
        return Path(os.path.expanduser(given)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--chat_template {given}: neither a Jinja template (it has no braces) nor a readable file. Give either."
        ) from error
