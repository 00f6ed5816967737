"""Equality field by field, where `==` says nothing of tensors and NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def assert_same(one: Any, other: Any, path: str = "run") -> None:
    """Assert that two values are equal, types included, and name the first field that differs.

    NaN equals NaN. Mappings may be of any class, since one of them may read its values from a file.
    """
    if isinstance(one, Mapping):
        assert isinstance(other, Mapping), path
        assert set(one) == set(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}[{key}]")
        return
    assert type(one) is type(other), f"{path}: {type(one)}, {type(other)}"
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True), path
    elif is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name), f"{path}.{field.name}")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), path
        for index, (ours, theirs) in enumerate(zip(one, other, strict=True)):
            assert_same(ours, theirs, f"{path}[{index}]")
    elif not (isinstance(one, float) and math.isnan(one) and math.isnan(other)):
        assert one == other, f"{path}: {one!r}, {other!r}"
