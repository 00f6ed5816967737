"""Damage to a model's files on disk: Git LFS pointers in their place, empty files, text that is not JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from refusal_direction.errors import ModelAccessError

__all__ = ["check_downloaded", "check_floating", "check_texts", "damage_of"]

_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLES = (b"PK", b"\x80")  # of torch.save: a zip file, or in old versions a bare pickle
_JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json",
         "special_tokens_map.json", "preprocessor_config.json", "processor_config.json")  # fmt: skip
_INDEX = ".index.json"


def check_downloaded(file: Path) -> None:
    """Raise ModelAccessError if a file is empty, or a Git LFS pointer."""
    if found := _not_downloaded(file):
        raise ModelAccessError(found)


def check_texts(folder: Path) -> None:
    """Raise ModelAccessError if a configuration or a template is a Git LFS pointer, which can pass for a template."""
    for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        if _begins(file, _POINTER):
            check_downloaded(file)


def check_floating(folder: Path) -> None:
    """Raise ModelAccessError if matrices are stored as integers, which transformers reads as numbers without their scale."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                stored = weights.get_slice(name)
                if name.endswith(".weight") and len(stored.get_shape()) == 2 and stored.get_dtype()[0] in "IU":
                    raise ModelAccessError(
                        f"{file} holds {name} as integers ({stored.get_dtype()}), but config.json has no quantization_config that "
                        "says how to read them. Use weights that are not quantised, or files that belong together."
                    )


def damage_of(folder: Path) -> str | None:
    """The first damaged file of a folder, in words; None if none is found."""
    return next(_damages(folder), None) if folder.is_dir() else None


def _damages(folder: Path) -> Iterator[str]:
    texts = [path for name in _JSON if (path := folder / name).is_file()]
    indices = [path for path in sorted(folder.glob(f"*{_INDEX}")) if path.is_file()]
    safe = sorted(folder.glob("*.safetensors"))
    pickles = [] if safe else sorted(folder.glob("*.bin"))
    yield from filter(None, map(_not_downloaded, (*texts, *indices, *safe, *pickles)))
    yield from (f"{path} is not valid JSON. Fix it or download it again." for path in texts if _parsed(path) is None)
    for path in indices:
        index = _parsed(path)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
            yield f"{path} lists no files of weights (weight_map). Download it again, or remove it if the weights are in one file."
    for path in pickles:
        if not any(_begins(path, mark) for mark in _PICKLES):
            yield f"{path} is not a file of weights. Download the model again, best in safetensors format."


def _not_downloaded(file: Path) -> str | None:
    if _begins(file, _POINTER):
        return (
            f"{file} is a Git LFS pointer in place of the file. Run `git lfs pull` in its repository, or download the model "
            "again."
        )
    return f"{file} is empty. Download it again." if file.is_file() and file.stat().st_size == 0 else None


def _begins(file: Path, mark: bytes) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark


def _parsed(file: Path) -> object:
    """The content of a JSON file; None if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
