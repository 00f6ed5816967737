"""PEFT adapters on a model's weights. The optional package peft is imported only when an adapter is loaded."""

from __future__ import annotations

import logging
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from refusal_direction.errors import ConfigurationError, ModelAccessError, UnsupportedModelError
from refusal_direction.models.access import access_explained
from refusal_direction.models.damage import check_downloaded
from refusal_direction.models.layers import n_embeddings
from refusal_direction.models.placement import is_offloaded

__all__ = ["add_adapter", "check_adapter"]

log = logging.getLogger(__name__)

_SHAPES = re.compile(r"torch\.Size\(\[([\d, ]+)\]\) from checkpoint.*?torch\.Size\(\[([\d, ]+)\]\)")
_PICKLED = "adapter_model.bin"
_SAFE = "adapter_model.safetensors"


def check_adapter(adapter: str, *, allow_pickle: bool = False) -> Any:
    """The configuration of an adapter, before the model or any weights of the adapter are loaded.

    Args:
        adapter: a folder or a Hub id.
        allow_pickle: accept weights that are not in safetensors format.

    Raises ConfigurationError without peft; ModelAccessError if the adapter cannot be read; UnsupportedModelError for adapters
    that change the prompt.
    """
    if find_spec("peft") is None:
        raise ConfigurationError("--adapter needs the package peft, which is not installed: pip install peft")
    from peft import PeftConfig

    with access_explained(adapter, adapter=True):
        config: Any = _config(PeftConfig, adapter)
        _check_format(adapter, allow_pickle)
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{adapter} changes the prompt ({config.peft_type.value}), not the weights, so it has no residual stream of "
            "its own. Use an adapter of weights, such as LoRA."
        )
    return config


def add_adapter(model: PreTrainedModel, adapter: str, *, allow_pickle: bool = False) -> None:
    """Insert an adapter's layers into the model, in place, without merging their weights.

    Args:
        model: the base model, its weights in memory.
        adapter: a folder or a Hub id.
        allow_pickle: accept weights that are not in safetensors format.

    Raises ConfigurationError without peft; ModelAccessError if the adapter cannot be loaded or does not belong to this
    model; UnsupportedModelError for adapters that change the prompt, and for models that are partly offloaded.
    """
    config = check_adapter(adapter, allow_pickle=allow_pickle)
    from peft import PeftModel

    if is_offloaded(model):
        raise UnsupportedModelError(
            f"With --adapter {adapter} the weights must fit into memory. Try --dtype bfloat16 or --quantization 4bit, or merge "
            "the adapter into its base model first."
        )
    with access_explained(adapter, adapter=True):
        _check_base(adapter, config.base_model_name_or_path or "", model)
        config.inference_mode = True
        wrapped = PeftModel(model, config, autocast_adapter_dtype=False)
        try:
            found = wrapped.load_adapter(adapter, "default", autocast_adapter_dtype=False)
        except RuntimeError as error:
            raise _mismatch(adapter, model, str(error)) from error
    unplaced = [*found.missing_keys, *found.unexpected_keys]
    if unplaced:
        raise _belongs_elsewhere(adapter, model, f"{len(unplaced)} tensors have no counterpart, such as {unplaced[0]}")


def _config(known: Any, adapter: str) -> Any:
    unknown = ModelAccessError(
        f"The adapter_config.json of {adapter} names no kind of adapter that peft {version('peft')} knows. Try another version of peft."
    )
    try:
        config = known.from_pretrained(adapter)
    except KeyError as error:
        raise unknown from error
    if config.peft_type is None:
        raise unknown
    return config


def _check_format(adapter: str, allow_pickle: bool) -> None:
    """Raise ModelAccessError if an adapter has no safetensors weights; pickles, which peft would load, need `allow_pickle`."""
    if _file(adapter, _SAFE) is not None:
        return
    if _file(adapter, _PICKLED) is None:
        raise ModelAccessError(
            f"{adapter} has no weights: an adapter's are in {_SAFE}. Download it again, or check the network and the spelling."
        )
    check_downloaded(Path(str(_file(adapter, _PICKLED))))
    if not allow_pickle:
        raise ModelAccessError(
            f"{adapter} has no weights in safetensors format, only {_PICKLED}. A pickle can hold code. If you trust its source, "
            "pass --allow_pickle."
        )


def _check_base(adapter: str, base: str, model: PreTrainedModel) -> None:
    """Warn if an adapter was trained on a model of another name: it fits any model of the same shape."""
    trained_on, given = (name.rstrip("/").rpartition("/")[2] for name in (base, model.name_or_path))
    if trained_on not in ("", given):
        log.warning(
            "The adapter %s was trained on %s by its own configuration, but is loaded on %s.",
            adapter,
            base,
            model.name_or_path,
        )


def _file(adapter: str, name: str) -> str | None:
    return cached_file(
        adapter, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def _mismatch(adapter: str, model: PreTrainedModel, message: str) -> ModelAccessError:
    """The error for weights of other shapes, or for a vocabulary that was enlarged before the adapter was trained."""
    size = n_embeddings(model)
    for shapes in _SHAPES.findall(message):
        saved, own = ([int(length) for length in shape.split(",")] for shape in shapes)
        if added := sum(
            theirs - size for theirs, ours in zip(saved, own, strict=False) if ours == size and theirs > size
        ):
            return ModelAccessError(
                f"{adapter} has a larger vocabulary than {model.name_or_path}, by {added} tokens: they were added before it was "
                f"trained. Merge it first: load the model, model.resize_token_embeddings({size + added}), load the adapter, "
                "merge_and_unload() and save_pretrained(), also of the adapter's tokenizer; then give that folder as --model_id, "
                "without --adapter."
            )
    return _belongs_elsewhere(adapter, model, message.splitlines()[-1].strip(" \t."))


def _belongs_elsewhere(adapter: str, model: PreTrainedModel, why: str) -> ModelAccessError:
    return ModelAccessError(
        f"{adapter} does not fit {type(model).__name__}: {why}. Give the model it was trained on as --model_id "
        "(base_model_name_or_path in its adapter_config.json)."
    )
