"""A device that is not there, as strict as the real one: tensors lie in CPU memory, say that they are on MPS, and refuse what
MPS refuses: float64, and arithmetic with tensors that are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["MPS", "Pretended", "pretended_mps"]

MPS = torch.device("mps", 0)
_MIXING = ("index", "_to_copy", "copy_", "_copy_from", "lift_fresh", "detach")
"""Operators that may take tensors of two devices."""
_ASK_THE_DEVICE = (
    *(Tensor.__getitem__, Tensor.__setitem__, nn.functional.scaled_dot_product_attention),
    *(
        Tensor.contiguous,
        Tensor.nonzero,
        Tensor.item,
        Tensor.tolist,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__bool__,
        Tensor.__index__,
    ),
)
"""What looks for the real device before it is dispatched."""


class Pretended(Tensor):
    """A tensor that says it is on MPS."""

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> Pretended:
        if own.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {own.dtype}: the MPS framework doesn't support it.")
        made = Tensor._make_wrapper_subclass(
            cls,
            own.shape,
            strides=own.stride(),
            storage_offset=own.storage_offset(),
            dtype=own.dtype,
            dispatch_device=True,
        )
        made.own = own
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.own!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASK_THE_DEVICE:
            return _compute(func, args, kwargs or {}, stays=True)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return MPS
        return _dispatch(func, args, kwargs or {})


def _is_mps(device: Any) -> bool:
    return device is not None and torch.device(device).type == "mps"


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute in CPU memory; what comes out is on MPS if what went in was, unless another device was asked for."""
    name = func.overloadpacket.__name__
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, Pretended)]
    elsewhere = [value for value in tensors if not isinstance(value, Pretended) and value.ndim]
    if there and elsewhere and not name.startswith(_MIXING):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found mps and cpu.")
    onto = kwargs.get("device")
    stays = _is_mps(onto) or (onto is None and bool(there))
    kwargs = {**kwargs, "device": torch.device("cpu")} if _is_mps(onto) else kwargs
    if name == "copy_":
        args[0].own.copy_(args[1].own if isinstance(args[1], Pretended) else args[1])
        return args[0]
    return _compute(func, args, kwargs, stays=stays)


def _compute(func: Any, args: Any, kwargs: dict[str, Any], *, stays: bool) -> Any:
    there = {id(value.own): value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Pretended)}
    inside = tree_map(lambda value: value.own if isinstance(value, Pretended) else value, (args, kwargs))
    output = func(*inside[0], **inside[1])
    if not stays:
        return output
    # what was changed in place stays itself
    return tree_map(lambda value: _outside(value, there), output)


def _outside(value: Any, there: dict[int, Pretended]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return there[id(value)] if id(value) in there else Pretended(value)


class _Factories(TorchDispatchMode):
    """Catches what is made on the device out of nothing, or brought there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_mps((kwargs or {}).get("device")):
            return _dispatch(func, args, kwargs)
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_mps(model: nn.Module) -> Iterator[None]:
    """Move the model to the pretended device, within which context others may be made there, too."""
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(Pretended(weight.data), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = Pretended(buffer)
    with _Factories():
        yield
