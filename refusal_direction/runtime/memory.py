"""Memory: free bytes of a device, peak use by this process, and reuse of freed pages."""

from __future__ import annotations

import ctypes
import sys

import psutil
import torch

__all__ = ["free_bytes", "keep_freed", "peak_bytes"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h
_LARGEST = 2**31 - 1


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: allocated on all CUDA devices, or else resident in CPU memory."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed(size: int) -> None:
    """Keep up to `size` bytes of freed memory for the next tensors, on Linux with glibc; elsewhere do nothing.

    By default the system maps new pages for each large tensor and unmaps them when it is freed, which takes a twelfth of the
    time of a run on CPUs.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is not None:
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            adjust(threshold, min(size, _LARGEST))
