"""The matrix products of one layer on many microbatches, by oneDNN.

On a CPU torch multiplies float32 by MKL, which is Intel's. On an AMD processor with AVX-512, oneDNN, which torch carries too, is
quicker by a tenth to a quarter, once a weight lies in memory in oneDNN's own blocks; on Intel's it is slower
(docs/performance.md). To bring a weight there takes as long as a product of two hundred rows, so it is done once a pass, for one
layer at a time.

For each shape of product oneDNN compiles a kernel, and 1024 are kept. They lie among the large tensors that are freed and made
again, which then find no room there, so memory grows with their number: products go this way only in a process that keeps few.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["BlockedWeights", "available", "blocked_bytes", "keep_few_kernels"]

_LEAST_WORK = 1 << 27  # multiplications; with fewer, to compile a kernel costs what it gains
_KERNELS = 8  # a layer has products of four or five shapes, and a lane one or two sizes of microbatches
_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and torch's on top of it
_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight")  # those that torch.compile uses on CPUs
_PROCESSORS = Path("/proc/cpuinfo")  # where Linux describes them


def keep_few_kernels() -> None:
    """Have this process keep few of oneDNN's kernels; numbers that the environment sets stay.

    This is for a program to say, not for a library: it holds for all that the process does by oneDNN, from the first time on.
    """
    for name in _CAPACITIES:
        os.environ.setdefault(name, str(_KERNELS))


def available() -> bool:
    """Whether oneDNN is there, on a processor where it is the quicker one, and keeps few kernels."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _made_by_amd()
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
        and all(0 < _number(os.environ.get(name, "")) <= _KERNELS for name in _CAPACITIES)
    )


def _made_by_amd() -> bool:
    if not _PROCESSORS.exists():
        return False
    with _PROCESSORS.open() as description:
        return "AuthenticAMD" in description.read(1024)  # of the first; to describe hundreds takes Linux a while


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def blocked_bytes(layer: nn.Module, tokens: int, widest: int) -> int:
    """What a layer's weights take once they are all in blocks, and what kernels keep from use.

    As measured, that is half of a large tensor for each kernel.

    Args:
        tokens: that a microbatch has.
        widest: how wide its tensors become.
    """
    linear = (module for module in layer.modules() if isinstance(module, nn.Linear))
    weights = sum(weight.nbytes for module in linear for weight in module.parameters(recurse=False) if weight.ndim == 2)
    return weights + _KERNELS * tokens * widest * torch.float32.itemsize // 2


class BlockedWeights(TorchFunctionMode):
    """Within this context `torch.nn.functional.linear` multiplies by oneDNN: large products, in float32, on a CPU.

    Weights in blocks are kept as long as this object is, and are as large as the weights themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[nn.Parameter, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear and not kwargs and _pays(*args[:2]):
            return self._linear(*args)
        return func(*args, **(kwargs or {}))

    def _linear(
        self,
        inputs: Float[Tensor, "*row d_in"],
        weight: Float[nn.Parameter, "d_out d_in"],
        bias: Float[Tensor, "d_out"] | None = None,
    ) -> Float[Tensor, "*row d_out"]:
        if weight not in self._blocks:
            self._blocks[weight] = torch.ops.mkldnn._reorder_linear_weight(weight, _n_rows(inputs))
        return torch.ops.mkldnn._linear_pointwise(inputs, self._blocks[weight], bias, "none", [], "")


def _pays(inputs: Any, weight: Any) -> bool:
    return (
        not torch.is_grad_enabled()
        and isinstance(weight, nn.Parameter)  # and not a slice of one, such as an expert's: gone after the product
        and all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in (inputs, weight))
        and _n_rows(inputs) * weight.numel() >= _LEAST_WORK
    )


def _n_rows(inputs: Tensor) -> int:
    return inputs.shape[:-1].numel()
