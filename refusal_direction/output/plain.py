"""Dataclasses to plain JSON values and back, without loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["from_plain", "json_bytes", "to_plain"]


def to_plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN becomes null, infinity a string, an enumeration's member its value."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(to_plain(key)): to_plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: Any, value: Any) -> Any:
    """The value of a type (a dataclass or a supported field type) from its plain form.

    A field that was added since it was written has its default. Raises ValueError, TypeError or LookupError where they do not fit.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _from_union(arguments, value)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        given = [field for field in fields(kind) if field.name in value or field.default is MISSING]
        return kind(**{field.name: from_plain(hints[field.name], value[field.name]) for field in given})
    if origin is tuple:
        return tuple(from_plain(arguments[0], member) for member in value)
    if kind is float:
        return math.nan if value is None else float(value)
    if kind is Path or (isinstance(kind, type) and issubclass(kind, Enum)):
        return kind(value)
    return value


def _from_union(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in kinds:
        return None
    (kind, *others) = (member for member in kinds if member is not type(None))
    return value if others else from_plain(kind, value)


def json_bytes(content: Any) -> bytes:
    """A JSON file."""
    return (json.dumps(to_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
