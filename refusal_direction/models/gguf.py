"""Models in one GGUF file: weights, tokenizer and chat template, which transformers reads and de-quantises.

The optional package gguf is imported only when such a file is loaded.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import transformers
from transformers import PretrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from refusal_direction.config import DEMO_MODEL, ModelSource
from refusal_direction.errors import ConfigurationError, ModelAccessError
from refusal_direction.models.access import access_explained
from refusal_direction.models.damage import check_downloaded

__all__ = [
    "GgufContents",
    "alone",
    "check_rotary",
    "commit_of",
    "contents_of",
    "converting",
    "gguf_file",
    "weight_type",
]

log = logging.getLogger(__name__)

_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf\Z", re.IGNORECASE)
_PLAIN = ("F32", "F16", "BF16", "F64")
_UNREADABLE = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    UnicodeDecodeError,
    struct.error,
)
"""Errors of the package gguf on a file that is damaged."""
_NOT_CONVERTED = (ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError)
"""Errors of transformers on a GGUF file that it does not understand."""


def gguf_file(source: ModelSource) -> Path | None:
    """The GGUF file of a model, downloaded if it is on the Hub; None for a model in other files.

    Raises ConfigurationError, ModelAccessError.
    """
    found = _named(source) if source.gguf_file is not None else _implied(Path(source.model_id))
    if found is None:
        return None
    if find_spec("gguf") is None:
        raise ConfigurationError(f"{found.name} needs the package gguf, which is not installed: pip install gguf")
    if source.quantization is not None:
        raise ConfigurationError(
            f"{found.name} is quantised already, and is de-quantised when it is loaded. Leave out --quantization."
        )
    if _SPLIT.search(found.name):
        raise ModelAccessError(
            f"{found} is one part of a model, and transformers cannot join parts. Join them first: llama-gguf-split --merge "
            "FIRST_PART JOINED.gguf"
        )
    check_downloaded(found)
    with access_explained(source.model_id), found.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelAccessError(f"{found} is not a GGUF file: it does not begin with GGUF. Download it again.")
    return found


def _named(source: ModelSource) -> Path:
    """The file of --gguf_file."""
    name, folder = str(source.gguf_file), Path(source.model_id)
    if source.model_id == DEMO_MODEL or folder.is_file():
        raise ConfigurationError(
            f"--gguf_file {name}: --model_id {source.model_id} is no folder or Hub id. Leave it out."
        )
    if _SPLIT.search(name):
        return folder / name
    if not folder.is_dir():
        with access_explained(source.model_id):
            return Path(cached_file(source.model_id, name, revision=source.revision or "main"))
    if not (folder / name).is_file():
        there = ", ".join(path.name for path in _ggufs(folder)) or "none"
        raise ModelAccessError(f"--gguf_file {name}: {folder} has no such file. Its GGUF files: {there}.")
    return folder / name


def _implied(path: Path) -> Path | None:
    """The GGUF file that a model id names, or that is alone in the folder that it names."""
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_file():
        if is_gguf:
            return path
        raise ModelAccessError(
            f"{path} is a file, but no .gguf file. Give the folder that holds the model: config.json, *.safetensors weights, "
            "and tokenizer files."
        )
    if is_gguf and not path.is_dir():
        raise ModelAccessError(
            f"There is no file {path}. Check the path. For a file on the Hub: --model_id OWNER/NAME --gguf_file {path.name}"
        )
    if not path.is_dir() or (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return None
    files = _ggufs(path)
    if len(files) > 1 and not all(_SPLIT.search(file.name) for file in files):
        names = ", ".join(file.name for file in files)
        raise ModelAccessError(f"{path} holds {len(files)} GGUF files: {names}. Name one of them with --gguf_file.")
    return files[0] if files else None


def _ggufs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())


def commit_of(file: Path) -> str | None:
    """The commit of a file from the Hub; None for a local one."""
    return extract_commit_hash(str(file), None)


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A folder with nothing but a link to the file: transformers prefers tokenizer files that lie beside it.

    Raises ModelAccessError if the system makes no links and other files lie beside it.
    """
    if len(os.listdir(file.parent)) == 1:
        yield file.parent
        return
    with tempfile.TemporaryDirectory(prefix="refusal_direction_") as folder:
        try:
            (Path(folder) / file.name).symlink_to(file.resolve())
        except OSError as error:  # as for most users of Windows
            raise ModelAccessError(f"Other files lie beside {file}. Move it into a folder of its own.") from error
        yield Path(folder)


@contextmanager
def converting(file: Path | None) -> Iterator[None]:
    """Raise ModelAccessError if transformers cannot convert the file; None: the model is not from one."""
    if file is None:
        yield
        return
    try:
        yield
    except _NOT_CONVERTED as error:
        raise ModelAccessError(
            f"transformers {transformers.__version__} cannot convert {file} ({type(error).__name__}: {error}). Use the same "
            "model in safetensors format, or another version of transformers."
        ) from error


@dataclass(frozen=True)
class GgufContents:
    """Facts about a GGUF file that transformers does not keep."""

    types: dict[str, int]
    """Number of weights of each type, the most frequent type first."""
    scales_rotary: bool
    """Whether rotary positions are scaled for long texts."""


def contents_of(file: Path) -> GgufContents:
    """Read a file's list of tensors.

    Raises ModelAccessError if the file is damaged.
    """
    from gguf import GGUFReader

    try:
        read = GGUFReader(file)
    except _UNREADABLE as error:
        raise ModelAccessError(
            f"{file} cannot be read as GGUF ({error}). It is incomplete or damaged: download it again."
        ) from error
    types: Counter[str] = Counter()
    for tensor in read.tensors:
        types[tensor.tensor_type.name] += int(tensor.n_elements)
    factors = any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in read.tensors)
    return GgufContents(dict(types.most_common()), factors or any(".rope.scaling.factor" in key for key in read.fields))


def check_rotary(contents: GgufContents, config: PretrainedConfig, model_id: str) -> None:
    """Warn if transformers has dropped a scaling of rotary positions, as of Llama 3.1 and Gemma 3."""
    rope_type = re.compile(r"'rope_type': '(?!default)")
    if contents.scales_rotary and not rope_type.search(str(config.get_text_config().to_dict())):
        log.warning(
            "The GGUF file of %s scales rotary positions for long texts, which transformers leaves out. Scores differ a "
            "little from those of the model in safetensors format.",
            model_id,
        )


def weight_type(types: Mapping[str, int]) -> str:
    """The type of most weights, in words."""
    name = next(iter(types))
    return f"GGUF {name}" if name in _PLAIN else f"GGUF {name}, de-quantised"
