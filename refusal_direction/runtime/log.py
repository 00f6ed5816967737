"""Record of a run: warnings, the time of each stage, the largest leak."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from refusal_direction.runtime.store import Part

__all__ = ["RunLog", "StageTimer", "recorded_warnings"]

log = logging.getLogger(__name__)


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Collect the warnings that the package logs within the context."""
    recorder = _Recorder()
    logger = logging.getLogger("refusal_direction")
    logger.addHandler(recorder)
    try:
        yield recorder.messages
    finally:
        logger.removeHandler(recorder)


class StageTimer:
    """Wall time of each stage, in seconds."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds
        self._stage = ""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time within the context for a stage."""
        self._stage, begin = stage, time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - begin)

    def add(self, stage: str, seconds: float) -> None:
        """Count more time for a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass
class _PartRecord:
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


class RunLog(StageTimer):
    """The stages of a run, which may resume an interrupted one."""

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        super().__init__(seconds)
        self.leak = 0.0
        """Largest leak recorded by the interrupted run."""

    @contextmanager
    def part(self) -> Iterator[_PartRecord]:
        """Record the time and the warnings of a part; the time is known after the context."""
        record, begin = _PartRecord(), time.perf_counter()
        with recorded_warnings() as warnings:
            yield record
        record.seconds, record.warnings = time.perf_counter() - begin, list(warnings)

    def resume(self, part: Part, share: float = 1.0) -> None:
        """Add the record of a part that an interrupted run has made to the present stage.

        Args:
            part: as loaded.
            share: the share of it that is used.
        """
        self.add(self._stage, share * part.seconds)
        self.leak = max(self.leak, part.leak)
        for message in part.warnings:
            log.warning("%s", message)
