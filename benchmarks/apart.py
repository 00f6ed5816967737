"""Running a measurement in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from refusal_direction.errors import RefusalDirectionError


def apart(measure: Callable[..., Any], *args: Any) -> Any:
    """What `measure(*args)` returns, run in a fresh process; the benchmark ends if that process dies."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, measure, args))
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"A measurement died with exit code {process.exitcode}; the reason is above.") from None
    process.join()
    return result


def _send(there: Connection, measure: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        result = measure(*args)
    except RefusalDirectionError as error:
        raise SystemExit(f"Error: {error}") from None
    there.send(result)
