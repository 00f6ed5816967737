"""Placement of a model's weights: on a device, or offloaded by accelerate and loaded for each call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

__all__ = ["execution_device", "is_offloaded", "not_finite", "offload_hooks"]


def _hooks(modules: Iterator[nn.Module]) -> Iterator[tuple[nn.Module, AlignDevicesHook]]:
    """Modules with their accelerate hooks."""
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        for part in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(part, AlignDevicesHook):
                yield module, part


def offload_hooks(modules: Iterator[nn.Module]) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """Modules with offloaded weights, and the hooks that load those for each call."""
    return [(module, hook) for module, hook in _hooks(modules) if hook.offload]


def execution_device(model: nn.Module) -> torch.device:
    """The device of the model's inputs; offloaded weights themselves may be on the meta device."""
    for _, hook in _hooks(model.modules()):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(model.parameters()).device


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of the model are on disk or in CPU memory, and loaded for each call."""
    return bool(offload_hooks(model.modules()))


def not_finite(model: nn.Module) -> list[str]:
    """Names of the weights in memory that hold infinities or NaN."""
    return [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not weight.is_meta and not weight.detach().float().isfinite().all()
    ]
