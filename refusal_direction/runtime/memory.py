"""Memory: what is free, this process's peak on the device that computes, and what it keeps of what is freed."""

from __future__ import annotations

import ctypes
import sys

import psutil
import torch

__all__ = ["free_bytes", "keep_freed", "peak_bytes"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h
_LARGEST = 2**31 - 1


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def peak_bytes(device: torch.device) -> int:
    """The most memory held at once so far: allocated on a CUDA device, else resident in the process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed(size: int) -> None:
    """Keep up to so many bytes of freed memory for the next tensors, on Linux with glibc; elsewhere nothing changes.

    By default each large tensor is given new pages by the system and its pages are taken away when it is freed: in a run on CPUs
    that is a twelfth of the processors' time.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is not None:
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            adjust(threshold, min(size, _LARGEST))
