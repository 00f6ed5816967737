"""Loading a chat model from the Hub or a folder, on the machine there is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

import psutil
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from refusal_direction import demo, processes
from refusal_direction.config import DEMO_MODEL, Config, ModelSource
from refusal_direction.engine.budget import free_bytes
from refusal_direction.errors import ConfigurationError, ModelAccessError
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.vision import VisionChatModel

__all__ = ["load", "load_chat_model", "load_vision_model"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHARE_FOR_WEIGHTS = 0.75
_Chat = TypeVar("_Chat", bound=ChatModel)
_TRY_DEMO = "To see the tool at work without an account, use --model_id demo."


def load(config: Config) -> ChatModel:
    """Load the model that a configuration asks for: for text, or for images with text."""
    return load_vision_model(config.model) if config.rules.images else load_chat_model(config.model)


def load_chat_model(source: ModelSource | str) -> ChatModel:
    """Load a chat model: a Hub id, a folder, or "demo". Weights that do not fit are offloaded to CPU memory and disk.

    Raises ModelAccessError (gated, unknown, out of reach), TokenizerError, ConfigurationError.
    """
    source = ModelSource(model_id=source) if isinstance(source, str) else source
    model, tokenizer = _load(source, demo.MODEL_DIR, AutoModelForCausalLM, AutoTokenizer)
    return _checked(ChatModel(model, tokenizer, **_identity(source, model)))


def load_vision_model(source: ModelSource | str) -> VisionChatModel:
    """Load a vision-language model, likewise.

    Raises ModelAccessError (gated, unknown, out of reach), TokenizerError, ConfigurationError.
    """
    source = ModelSource(model_id=source) if isinstance(source, str) else source
    model, processor = _load(
        source, demo.MODEL_DIR.parent / "vision" / "model", AutoModelForImageTextToText, AutoProcessor
    )
    tokenizer = processor.tokenizer
    return _checked(VisionChatModel(model, tokenizer, **_identity(source, model), processor=processor))


def _identity(source: ModelSource, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "model_id": source.model_id,
        "revision": getattr(model.config, "_commit_hash", None),
        "chat_template": _template(source.chat_template),
    }


def _checked(chat: _Chat) -> _Chat:
    chat.check_tokenizer()
    return chat


def _load(source: ModelSource, demo_dir: Path, model_class: Any, tokenizer_class: Any) -> tuple[PreTrainedModel, Any]:
    """The weights, and the tokenizer or processor."""
    path = str(demo_dir) if source.model_id == DEMO_MODEL else source.model_id
    device = _device(source.device)
    with _access_explained(source.model_id):
        config = AutoConfig.from_pretrained(path)
        tokenizer = tokenizer_class.from_pretrained(path)
        parameters = _parameters(config, model_class, source.model_id)
        dtype = _dtype(source.dtype, device, parameters)
        placement = _placement(source.device, device, parameters * dtype.itemsize)
        with _offload_folder(placement) as owned_by:
            model = model_class.from_pretrained(path, config=config, dtype=dtype, use_safetensors=True, **placement)
            owned_by(model)
    return model.eval(), tokenizer


def _device(asked: str) -> torch.device:
    if asked == "auto":
        if torch.cuda.is_available():
            return _device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigurationError(f"--device {asked} is no device. Use auto, cuda, cuda:1, mps or cpu.") from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(device.type, False):
        raise ConfigurationError(
            f"--device {asked}: this machine (or this build of torch) has none. Use --device auto."
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", processes.local_rank() % torch.cuda.device_count())
    return device


def _parameters(config: PretrainedConfig, model_class: Any, model_id: str) -> int:
    """How many weights the model has, without loading any."""
    try:
        with torch.device("meta"):
            model = model_class.from_config(config)
    except ValueError as error:
        raise ModelAccessError(
            f"{model_id} is a {config.model_type}, which transformers does not know as a model of this kind. Use a chat model, "
            "or, with extract_refusal_direction_vlm.py, a vision-language model."
        ) from error
    return sum(weight.numel() for weight in model.parameters())


def _dtype(asked: str, device: torch.device, parameters: int) -> torch.dtype:
    """As asked; auto: bfloat16 on an accelerator that has it, and on a CPU only where float32 would not fit."""
    if asked != "auto":
        if asked not in _DTYPES:
            raise ConfigurationError(f"--dtype {asked} is not known. Use auto, {', '.join(_DTYPES)}.")
        return _DTYPES[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.bfloat16
    fits = 4 * parameters < _SHARE_FOR_WEIGHTS * free_bytes(device)
    return torch.float32 if fits else torch.bfloat16


def _placement(asked: str, device: torch.device, weights: int) -> dict[str, object]:
    """One device where the weights fit; else spread over all there are, then CPU memory, then disk."""
    if asked != "auto" or weights < _SHARE_FOR_WEIGHTS * free_bytes(device):
        return {"device_map": {"": device}}
    limits: dict[int | str, int] = {"cpu": int(_SHARE_FOR_WEIGHTS * psutil.virtual_memory().available)}
    if device.type == "mps":
        limits["mps"] = limits.pop("cpu")
    alone = processes.size() == 1  # otherwise the other devices are the other processes'
    for index in range(torch.cuda.device_count()) if alone else [device.index]:
        limits[index] = int(_SHARE_FOR_WEIGHTS * free_bytes(torch.device("cuda", index)))
    return {"device_map": "auto", "max_memory": limits}


@contextmanager
def _offload_folder(placement: dict[str, object]) -> Iterator[Callable[[object], None]]:
    """Give a spread-out model a folder for what goes to disk, which is removed with its owner, or on failure."""
    if placement["device_map"] != "auto":
        yield lambda owner: None
        return
    folder = tempfile.mkdtemp(prefix="refusal_direction_")
    placement["offload_folder"] = folder
    with ExitStack() as failed:
        failed.callback(shutil.rmtree, folder, ignore_errors=True)

        def owned_by(owner: object) -> None:
            finalize(owner, failed.pop_all().close)

        yield owned_by


def _template(given: str | None) -> str | None:
    if given is None:
        return None
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--chat_template {given}: neither a Jinja template (it has no braces) nor a file that can be read."
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextmanager
def _access_explained(model_id: str) -> Iterator[None]:
    """Turn the Hub's errors into ones that say what to do."""
    try:
        yield
    except ImportError as error:
        raise ModelAccessError(
            f"{model_id} needs a package that is not installed: {' '.join(str(error).split())} Install it (often: pip install "
            "torchvision), or use another model."
        ) from error
    except (OSError, ValueError) as error:  # HFValidationError is a ValueError; so is a folder without config.json
        causes = tuple(_causes(error))
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            raise ModelAccessError(
                f"{model_id} is gated. Accept its licence on https://huggingface.co/{model_id}, then log in with `hf auth "
                f"login` or set HF_TOKEN to a token of that account. {_TRY_DEMO}"
            ) from error
        if any(isinstance(cause, (RepositoryNotFoundError, HFValidationError)) for cause in causes):
            raise ModelAccessError(
                f"{model_id} is neither a folder here nor a model on the Hub that you can see. Check the spelling; a private "
                f"model needs HF_TOKEN. {_TRY_DEMO}"
            ) from error
        if Path(model_id).exists():
            raise ModelAccessError(
                f"{model_id} could not be loaded: {str(error).splitlines()[0]} A model folder needs config.json, "
                "*.safetensors weights, and the tokenizer's files."
            ) from error
        raise ModelAccessError(
            f"{model_id} could not be fetched from the Hub and is not in its local cache ({str(error).splitlines()[0]}). "
            f"Check the network and the spelling, or give a local folder. {_TRY_DEMO}"
        ) from error
