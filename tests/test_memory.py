"""Freed memory is kept for the next tensors."""

from __future__ import annotations

import ctypes
import sys

import pytest

from tests import forked

FAULTS = """
import resource, torch
from refusal_direction.runtime.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        parts = [torch.ones(2 << 20) for _ in range(5)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = faults()
keep_freed(64 << 20)
faults()
print(by_default, faults())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc is not in use"
)
@pytest.mark.extended
def test_tensors_are_given_the_pages_of_those_before_them() -> None:
    """By default 40 MiB are taken from the system and given back fifty times, 4 KiB at a time or 2 MiB with huge pages."""
    by_default, kept = map(int, forked.run(["-c", FAULTS]).stdout.split())
    assert kept < by_default / 10
