"""Writing files whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["write_atomically", "write_durably"]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk.

    Raises OSError where it cannot be written.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file through a temporary one beside it: after a crash it is complete or absent.

    Raises OSError where it cannot be written.
    """
    temporary = path.with_suffix(f".{os.getpid()}.half")
    try:
        write_durably(temporary, content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
