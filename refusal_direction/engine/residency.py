"""Keeping the weights of offloaded modules in memory while they are used (accelerate's disk and CPU offload).

accelerate reloads a leaf module's weights at every call. Within `resident(module)` they are loaded once. Meanwhile a thread
reads the next layer's tensors, so that its weights are in the system's file cache when they are needed. Its copies are
thrown away: weights are always loaded the same way, so a slow or failing thread costs time but cannot change a result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from accelerate.hooks import AlignDevicesHook
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import Tensor, nn

from refusal_direction.models.placement import offload_hooks

__all__ = ["outside", "resident"]


def outside(model: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The model's modules outside of its layers: embeddings, final norm, head."""
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
_BLOCK_BYTES = 8 << 20
_BLOCK_ELEMENTS = 1 << 15  # torch copies as many on one thread, and leaves the others to the layer at work


def _read_next_ahead(held: list[tuple[nn.Module, AlignDevicesHook]]) -> None:
    """Have the thread read the layer after the one to which these modules belong, if they belong to one."""
    for _, hook in held:
        weights = hook.weights_map
        place = re.match(r"(\D+\.)(\d+)\.", weights.prefix) if isinstance(weights, PrefixedDataset) else None
        if place is not None and isinstance(weights.dataset, OffloadedWeightsLoader):
            _reader.submit(_read, weights.dataset, f"{place[1]}{int(place[2]) + 1}.")
            return


def _read(weights: OffloadedWeightsLoader, prefix: str) -> None:
    """Read the tensors on disk whose names begin with `prefix`, and throw them away.

    Runs on the thread, where errors are ignored: they are raised and explained when the weights are loaded.
    """
    for name in weights.index:
        if name.startswith(prefix):
            for _ in _blocks(weights, name):
                pass


def _blocks(weights: OffloadedWeightsLoader, name: str) -> Iterator[Tensor | bytes]:
    """Read one tensor block by block: from the model's own safetensors file, or from a file that accelerate wrote."""
    entry = weights.index[name]
    if entry.get("safetensors_file") is None:
        with Path(weights.save_folder, f"{name}.dat").open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
        return
    with safe_open(entry["safetensors_file"], framework="pt") as file:
        mapped = file.get_tensor(entry.get("weight_name", name))
    for part in mapped.flatten().split(_BLOCK_ELEMENTS):
        yield part.clone()  # the file is mapped into memory, and read when it is copied
