"""Keeping the weights of offloaded modules in memory while they are used (accelerate's disk and CPU offload).

accelerate reloads a leaf module's weights at every call. Within `resident(module)` they are loaded once, and a thread brings
the next layer's files into the system's file cache meanwhile, so that its weights need not wait for the disk. What is read
ahead is thrown away: weights are always loaded the same way, so a late thread costs time but cannot change a result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from accelerate.hooks import AlignDevicesHook
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from torch import nn

from refusal_direction.models.placement import offload_hooks

__all__ = ["outside", "resident"]


def outside(model: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The model's modules that are in none of the layers: embeddings, final norm, head."""
    inside = {id(module) for module in layers.modules()}
    return (module for module in model.modules() if id(module) not in inside)


@contextmanager
def resident(*modules: nn.Module, recurse: bool = True) -> Iterator[None]:
    """Load the modules' offloaded weights once, for the duration of the context. Nested uses cost nothing."""
    members = (member for module in modules for member in (module.modules() if recurse else (module,)))
    held = offload_hooks(members)
    try:
        for module, hook in held:
            hook.pre_forward(module)
            hook.offload = False
        _read_next_ahead(held)
        yield
    finally:
        for module, hook in held:
            hook.offload = True
            hook.post_forward(module, None)


_reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
_BLOCK = 8 << 20
_Stretch = tuple[Path, int, int]
"""A file, and where in it a tensor begins and ends."""


def _read_next_ahead(held: list[tuple[nn.Module, AlignDevicesHook]]) -> None:
    """Read what is on disk of the layer that follows these modules, on a thread. Modules outside of a layer have none."""
    for _, hook in held:
        weights = hook.weights_map
        place = re.match(r"(\D+\.)(\d+)\.", weights.prefix) if isinstance(weights, PrefixedDataset) else None
        if place is not None and isinstance(weights.dataset, OffloadedWeightsLoader):
            _reader.submit(_read, weights.dataset, f"{place[1]}{int(place[2]) + 1}.")
            return


def _read(weights: OffloadedWeightsLoader, prefix: str) -> None:
    """Runs on the thread: what cannot be read is missed, and explained, where it is needed."""
    block = bytearray(_BLOCK)
    for path, begin, end in sorted(_stretches(weights, prefix)):
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while begin < end and (count := file.readinto(memoryview(block)[: end - begin])):
                begin += count


def _stretches(weights: OffloadedWeightsLoader, prefix: str) -> Iterator[_Stretch]:
    """Where the tensors lie that are on disk and whose names begin with `prefix`: in files of their own, or in the model's."""
    shared: dict[Path, list[str]] = {}
    for key, info in weights.index.items():
        if not key.startswith(prefix):
            continue
        if info.get("safetensors_file") is None:
            path = Path(weights.save_folder, f"{key}.dat")
            yield path, 0, path.stat().st_size
        else:
            shared.setdefault(Path(info["safetensors_file"]), []).append(info.get("weight_name", key))
    for path, names in shared.items():
        with path.open("rb") as file:  # eight bytes, then so many with the places of all tensors, counted from there
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name in names:
            begin, end = header[name]["data_offsets"]
            yield path, 8 + length + begin, 8 + length + end
