"""The matrix products of one layer on many microbatches, by oneDNN.

On a CPU torch multiplies float32 by MKL. oneDNN, which torch carries too, is quicker by a sixth on an AMD processor
(docs/performance.md), most of all where a weight lies in memory in oneDNN's own blocks. To bring it there takes as long as a
product of a few rows. Layer by layer that is done once a pass, for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["BlockedWeights", "blocked_bytes"]

_LEAST_WORK = 1 << 24  # multiplications; for fewer, the time that a call takes counts for more
_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight")  # those that torch.compile uses on CPUs
_AVAILABLE = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
)


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


def blocked_bytes(layer: nn.Module) -> int:
    """What the weights of a layer take once they are all in blocks."""
    return sum(module.weight.nbytes for module in layer.modules() if isinstance(module, nn.Linear))


def _pays(inputs: Any, weight: Any) -> bool:
    return (
        _AVAILABLE
        and not torch.is_grad_enabled()
        and isinstance(weight, nn.Parameter)  # and not a slice of one, such as an expert's: gone after the product
        and all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in (inputs, weight))
        and _n_rows(inputs) * weight.numel() >= _LEAST_WORK
    )


def _n_rows(inputs: Tensor) -> int:
    return inputs.shape[:-1].numel()
