"""Errors of fetching and loading a model, explained with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import transformers
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from refusal_direction.errors import ModelAccessError, OutOfMemoryError
from refusal_direction.models.damage import damage_of

__all__ = ["access_explained", "configuration_explained", "fitting", "not_built"]

_TRY_DEMO = "To try the tool without an account, use --model_id demo."


def _causes(error: BaseException) -> tuple[BaseException, ...]:
    """The error, its cause, that one's cause, and so on."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return tuple(causes)


@contextmanager
def fitting(model_id: str, weights: int, device: object) -> Iterator[None]:
    """Raise OutOfMemoryError when memory runs out while weights are loaded.

    Args:
        model_id: the model's id.
        weights: size of its weights in bytes.
        device: the device on which they are loaded.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        raise OutOfMemoryError(
            f"The weights of {model_id} (about {weights / 2**30:.1f} GiB) do not fit on {device}. Free memory there, use "
            "--device auto to put the rest elsewhere, or make them smaller: --dtype bfloat16, --quantization 8bit or 4bit, or a "
            "smaller model."
        ) from error


@contextmanager
def configuration_explained(model_id: str) -> Iterator[None]:
    """Raise ModelAccessError if transformers fails on a config.json or its code: unknown names, impossible numbers."""
    try:
        yield
    except (KeyError, AttributeError, ArithmeticError, TypeError, RuntimeError, AssertionError, SyntaxError) as error:
        raise not_built(model_id, error) from error


def not_built(model_id: str, error: Exception) -> ModelAccessError:
    """The error for a config.json from which transformers builds no model."""
    return ModelAccessError(
        f"transformers {transformers.__version__} cannot build a model from the config.json of {model_id} "
        f"({type(error).__name__}: {error}). It may be made for another version, or damaged: download it again, or use another "
        "version of transformers."
    )


@contextmanager
def _damage_explained(model_id: str) -> Iterator[None]:
    """Raise ModelAccessError for a failure whose cause is a damaged file in the model's folder."""
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        RuntimeError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        if found := damage_of(Path(model_id)):
            raise ModelAccessError(found) from error
        raise


@contextmanager
def access_explained(model_id: str, *, adapter: bool = False, quantised: bool = False) -> Iterator[None]:
    """Turn errors of the libraries into ModelAccessError with a remedy.

    Args:
        model_id: the model's or adapter's id.
        adapter: whether it is an adapter.
        quantised: whether its weights are quantised, which not every machine can run.
    """
    try:
        with _damage_explained(model_id):
            yield
    except ImportError as error:
        raise ModelAccessError(
            f"{model_id} needs a package that is not installed: {' '.join(str(error).split())} Install it, or use another "
            "model. (Image processors often need torchvision.)"
        ) from error
    except StrictDataclassError as error:
        raise ModelAccessError(
            f"The config.json of {model_id} cannot be used: {' '.join(str(error).split())} Fix it or download it again."
        ) from error
    except SafetensorError as error:
        raise ModelAccessError(
            f"The weights of {model_id} cannot be read ({_first_line(error)}) A file is incomplete or damaged: download it "
            "again."
        ) from error
    except (UnpicklingError, EOFError) as error:
        raise ModelAccessError(
            f"The weights of {model_id} cannot be read: a file is damaged, or holds other objects than tensors. Download it "
            "again, best in safetensors format."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ModelAccessError(
                f"The weights of {model_id} have other shapes than its config.json says. They do not belong together: "
                "download both from the same place."
            ) from error
        if not quantised or should_reduce_batch_size(error):
            raise
        raise ModelAccessError(
            f"{model_id} could not be loaded with quantised weights on this machine: {_first_line(error)} Use a machine that "
            "supports them, or weights that are not quantised."
        ) from error
    except (OSError, ValueError) as error:  # HFValidationError is a ValueError; so is a folder without config.json
        raise ModelAccessError(_explanation(error, model_id, adapter)) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".") + "."


def _explanation(error: Exception, model_id: str, adapter: bool) -> str:
    causes = _causes(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    message = " ".join(str(cause) for cause in causes)
    kind, a_kind = ("adapter", "an adapter") if adapter else ("model", "a model")
    if caused_by(GatedRepoError):
        return (
            f"{model_id} is gated. Accept its licence on https://huggingface.co/{model_id}, then log in with `hf auth login` "
            f"or set HF_TOKEN to a token of that account. {_TRY_DEMO}"
        )
    if caused_by(RevisionNotFoundError):
        return f"{model_id} has no such --revision. Give a branch, a tag or the full hash of a commit, as listed on its page."
    if "trust_remote_code" in message:
        return (
            f"{model_id} comes with Python code of its own, which would run here with your rights. Read that code. If you "
            "trust it, pass --trust_remote_code, on the Hub with --revision and the commit that you have read."
        )
    if "use_safetensors=True" in message or ("model.safetensors" in message and any(Path(model_id).glob("*.bin"))):
        return (
            f"{model_id} has no weights in safetensors format. Other formats are pickles, and a pickle can hold code: use "
            "safetensors weights (another --revision, or a conversion), or, if you trust the source, pass --allow_pickle."
        )
    if not adapter and (Path(model_id) / "adapter_config.json").exists():
        return f"{model_id} holds an adapter, not a model. Give the model it was trained on, and --adapter {model_id}."
    if Path(model_id).exists():
        return f"{model_id} could not be loaded: {_first_line(error)}{_needed(Path(model_id), adapter)}"
    if caused_by(RepositoryNotFoundError, HFValidationError):
        return (
            f"{model_id} is neither a folder here nor {a_kind} on the Hub that you can access. Check the spelling; a "
            f"private {kind} needs HF_TOKEN. {_TRY_DEMO}"
        )
    if not isinstance(error, OSError) or (caused_by(EntryNotFoundError) and not caused_by(LocalEntryNotFoundError)):
        gguf = " If it holds GGUF files, name one with --gguf_file." if "config.json" in message and not adapter else ""
        return f"{model_id} could not be loaded: {_first_line(error)}{gguf}"
    return (
        f"{model_id} could not be fetched from the Hub and is not in its local cache ({_first_line(error)}). Check the network "
        f"and the spelling, or give a local folder. {_TRY_DEMO}"
    )


def _needed(folder: Path, adapter: bool) -> str:
    """The files that a folder lacks a part of, in a sentence; empty if it has all."""
    if adapter:
        return " An adapter folder needs adapter_config.json and its weights."
    patterns = ("config.json", "*.safetensors", "tokenizer*")
    if all(any(folder.glob(pattern)) for pattern in patterns):
        return ""
    return " A model folder needs config.json, *.safetensors weights, and tokenizer files."
