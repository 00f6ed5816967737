"""Several processes in one run: each runs a share of the rows, and all of them get every result.

They are started by `accelerate launch` or torchrun, which set the rank and the number of processes, and end all of them when
one dies. Processes exchange results alone, as CPU tensors over gloo; each has the whole model on its own device.
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
_TIMEOUT = timedelta(days=7)  # longer than any pass of another process; a process that dies is noticed at once
_group: Any = None  # the process group, within `joined`
_REMEDY = "Start several processes with `accelerate launch` or torchrun; for a single one, unset WORLD_SIZE, RANK and LOCAL_RANK."


def rank() -> int:
    """Rank of this process, from 0; only rank 0 writes and prints."""
    return _set_by_launcher("RANK", 0)


def local_rank() -> int:
    """Rank of this process among those on this machine, from 0."""
    return _set_by_launcher("LOCAL_RANK", 0)


def size() -> int:
    """Number of processes."""
    return _set_by_launcher("WORLD_SIZE", 1)


def _set_by_launcher(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise ConfigurationError(f"{variable}={value} in the environment: must be a whole number. {_REMEDY}")
    return int(value)


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group, and leave it at exit; do nothing in a single process.

    A process that ends without leaving can be aborted by its threads that still wait for messages.

    Raises ConfigurationError if the other processes that the environment announces cannot be reached.
    """
    global _group
    if size() == 1:
        yield
        return
    import torch.distributed as distributed

    initialized = distributed.is_initialized()  # by a script that uses torch.distributed itself
    try:
        if not initialized:
            distributed.init_process_group("gloo")
        _group = distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    except (ValueError, distributed.DistError) as error:
        raise ConfigurationError(
            f"WORLD_SIZE={size()} in the environment announces several processes, but they could not be joined: {error}. "
            f"{_REMEDY}"
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group(_group if initialized else None)
        _group = None


def share(rows: Sequence[_T], costs: Sequence[float]) -> Sequence[_T]:
    """This process's share of the rows: consecutive, and of about the same total cost in every process."""
    if size() == 1:
        return rows
    ends = list(accumulate(costs))
    total = ends[-1] if ends else 0.0
    mine = [index for index, end in enumerate(ends) if int((end - costs[index] / 2) / total * size()) == rank()]
    return [rows[index] for index in mine]


def all_ranks(here: bool) -> bool:
    """Whether `here` is true in every process."""
    import torch

    return bool(_all_reduce(torch.tensor(float(here)), "MIN") == 1)


def all_max(here: float) -> float:
    """The maximum of `here` over all processes."""
    import torch

    return float(_all_reduce(torch.tensor(here, dtype=torch.float64), "MAX"))


def all_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over all processes. Exact if, as here, each entry is non-zero in one process alone."""
    return tuple(_all_reduce(tensor, "SUM") for tensor in tensors)


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
    """Warnings logged only on other ranks."""
    if _group is None:
        return []
    import torch.distributed as distributed

    everyone: list[list[str]] = [[] for _ in range(size())]
    distributed.all_gather_object(everyone, list(messages), group=_group)
    return [message for message in dict.fromkeys(chain(*everyone)) if message not in messages]


def _all_reduce(tensor: Tensor, how: str) -> Tensor:
    if _group is None:
        return tensor
    import torch.distributed as distributed

    total = tensor.detach().cpu().clone()
    distributed.all_reduce(total, op=getattr(distributed.ReduceOp, how), group=_group)
    return total
