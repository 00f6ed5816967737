"""Several processes, one run: each takes a share of the rows, and all end up with every result.

Started by `accelerate launch` or torchrun, which set the rank and the number of processes and end all of them when one
dies. Only results cross between processes, as CPU tensors over gloo; each has the whole model on its own device, or a share
of the devices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, TypeVar

from refusal_direction.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "all_ranks",
    "joined",
    "all_max",
    "local_rank",
    "rank",
    "gather_warnings",
    "merge_ranks",
    "share",
    "size",
    "all_sum",
]

_T = TypeVar("_T")
_K = TypeVar("_K")
_PATIENCE = timedelta(days=7)  # with another process's pass over the weights; one that has died is noticed at once
_group: Any = None  # of the processes that have met
_REMEDY = (
    "Start several processes by `accelerate launch` or torchrun; for one alone, unset WORLD_SIZE, RANK and LOCAL_RANK."
)


def rank() -> int:
    """Which of the processes this is, from 0; the first alone writes and prints."""
    return _set_by_launcher("RANK", 0)


def local_rank() -> int:
    """Which of the processes on this machine this is."""
    return _set_by_launcher("LOCAL_RANK", 0)


def size() -> int:
    """How many processes there are."""
    return _set_by_launcher("WORLD_SIZE", 1)


def _set_by_launcher(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise ConfigurationError(f"{variable}={value} in the environment: must be a whole number. {_REMEDY}")
    return int(value)


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes, and leave them at the end. Nothing to do for one alone.

    A process that ends without leaving can be aborted at it by threads that still wait for the others' messages.

    Raises ConfigurationError where the environment names others that cannot be met.
    """
    global _group
    if size() == 1:
        yield
        return
    import torch.distributed as distributed

    met = distributed.is_initialized()  # a script that has launched us may have its own use of them
    try:
        if not met:
            distributed.init_process_group("gloo")
        _group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except (ValueError, distributed.DistError) as error:
        raise ConfigurationError(
            f"By WORLD_SIZE={size()} in the environment this is one of several processes, and they could not meet: "
            f"{error}. {_REMEDY}"
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group(_group if met else None)
        _group = None


def share(rows: Sequence[_T], costs: Sequence[float]) -> Sequence[_T]:
    """This process's part of the rows: consecutive, and of about the same cost as the others'."""
    if size() == 1:
        return rows
    ends = list(accumulate(costs))
    total = ends[-1] if ends else 0.0
    mine = [index for index, end in enumerate(ends) if int((end - costs[index] / 2) / total * size()) == rank()]
    return [rows[index] for index in mine]


def all_ranks(here: bool) -> bool:
    """Whether it is so in every process."""
    import torch

    return bool(_together(torch.tensor(float(here)), "MIN") == 1)


def all_max(here: float) -> float:
    """The largest that it is in any process."""
    import torch

    return float(_together(torch.tensor(here, dtype=torch.float64), "MAX"))


def all_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums over all processes. Each has zeros for what the others ran, so nothing is rounded."""
    return tuple(_together(tensor, "SUM") for tensor in tensors)


def merge_ranks(here: Mapping[_K, _T]) -> dict[_K, _T]:
    """The entries of all processes together; tensors arrive on the CPU."""
    if _group is None:
        return dict(here)
    import torch.distributed as distributed

    parts: list[dict[_K, _T]] = [{} for _ in range(size())]
    moved = {key: value.cpu() if hasattr(value, "cpu") else value for key, value in here.items()}
    distributed.all_gather_object(parts, moved, group=_group)
    return {key: value for part in parts for key, value in part.items()}


def gather_warnings(messages: Sequence[str]) -> list[str]:
    """What other processes have to say and this one has not said."""
    if _group is None:
        return []
    import torch.distributed as distributed

    everyone: list[list[str]] = [[] for _ in range(size())]
    distributed.all_gather_object(everyone, list(messages), group=_group)
    return [message for message in dict.fromkeys(chain(*everyone)) if message not in messages]


def _together(tensor: Tensor, how: str) -> Tensor:
    if _group is None:
        return tensor
    import torch.distributed as distributed

    total = tensor.detach().cpu().clone()
    distributed.all_reduce(total, op=getattr(distributed.ReduceOp, how), group=_group)
    return total
