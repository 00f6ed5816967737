"""Runs that are killed in the middle."""

from __future__ import annotations

from itertools import count

import pytest

from refusal_direction.runtime.checkpoints import Checkpoints
from refusal_direction.runtime.store import Part


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def kill_after(parts: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run die when a number of its parts have been kept; None to let it live."""
    own, left = Checkpoints.save, iter(range(parts)) if parts is not None else count()

    def save(self: Checkpoints, key: str, part: Part) -> None:
        if next(left, None) is None:
            raise Killed
        own(self, key, part)

    monkeypatch.setattr(Checkpoints, "save", save)
