"""Keeping the weights of offloaded modules in memory while they are used (accelerate's disk and CPU offload).

accelerate reloads a leaf module's weights at every call. Within `resident(module)` they are loaded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

__all__ = ["execution_device", "is_offloaded", "outside", "resident"]


def _hooks(modules: Iterator[nn.Module]) -> Iterator[tuple[nn.Module, AlignDevicesHook]]:
    """Modules and what accelerate has attached to them."""
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        for part in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(part, AlignDevicesHook):
                yield module, part


def _offload_hooks(modules: Iterator[nn.Module]) -> list[tuple[nn.Module, AlignDevicesHook]]:
    return [(module, hook) for module, hook in _hooks(modules) if hook.offload]


def execution_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: offloaded weights themselves may be on no device at all."""
    for _, hook in _hooks(model.modules()):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(model.parameters()).device


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of the model are on disk or in CPU memory and loaded only for a call."""
    return bool(_offload_hooks(model.modules()))


def outside(model: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The model's modules that are in none of the layers: embeddings, final norm, head."""
    inside = {id(module) for module in layers.modules()}
    return (module for module in model.modules() if id(module) not in inside)


@contextmanager
def resident(*modules: nn.Module, recurse: bool = True) -> Iterator[None]:
    """Load the modules' offloaded weights once, for the duration of the context. Nested uses cost nothing."""
    members = (member for module in modules for member in (module.modules() if recurse else (module,)))
    held = _offload_hooks(members)
    try:
        for module, hook in held:
            hook.pre_forward(module)
            hook.offload = False
        yield
    finally:
        for module, hook in held:
            hook.offload = True
            hook.post_forward(module, None)
