"""Peak memory of this process, on the device that computes."""

from __future__ import annotations

import sys

import psutil
import torch

__all__ = ["peak_bytes"]


def peak_bytes(device: torch.device) -> int:
    """The most memory held at once so far: allocated on a CUDA device, else resident in the process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
