"""The command line: progress, printed results and errors, exit codes. Nothing else in a run prints.

Exit codes: 0 done; 2 an error that the user can fix (see errors.py); 3 no candidate meets every condition, and the results
without a direction are written; 130 interrupted.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from refusal_direction.config import CHECKPOINTS, VISION_CONFIG, Config
from refusal_direction.errors import NoCandidateError, OutputError, RefusalDirectionError, UnsupportedModelError
from refusal_direction.flags import parse
from refusal_direction.runtime import processes

__all__ = ["main", "main_vlm"]

_LINE_INTERVAL = 60.0


@contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    settings = (
        {}
        if sys.stderr.isatty()
        else {"file": _Lines(), "mininterval": _LINE_INTERVAL, "delay": _LINE_INTERVAL, "leave": False}
    )
    with tqdm(total=total, desc=description, unit=" row-layers", unit_scale=True, **settings) as bar:
        yield bar.update


class _Lines(io.TextIOBase):
    """A line now and then, where output is not a terminal, in place of a bar that is redrawn."""

    def write(self, text: str) -> int:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr, flush=True)
        return len(text)


def _show(text: str) -> None:
    """Print and flush.

    Raises OutputError if the text cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        raise OutputError(
            f"The output could not be printed ({error.strerror}). Results that are finished are in their files."
        ) from error


def _discard_output() -> None:
    """Redirect stdout to devnull, so that Python does not try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(config: Config) -> None:
    from refusal_direction import pipeline
    from refusal_direction.output import artifacts, text
    from refusal_direction.runtime.checkpoints import forget

    first = processes.rank() == 0
    new = first and artifacts.check_writable(config.output_dir, config.rules)
    try:
        with pipeline.prepared(config.model.model_id, config, progress=first) as ready:
            result = pipeline.run(ready, progress=_bar if first else None, checkpoint_dir=config.output_dir)
    except RefusalDirectionError:
        if new:
            with suppress(OSError):  # it holds checkpoints
                config.output_dir.rmdir()
        raise
    if not first:
        return
    artifacts.write(result, config.output_dir)
    if result.selection.index is not None:
        forget(config.output_dir)
    _show(f"{result}\n\n{text.files(result)}")
    if result.selection.index is None:  # checkpoints stay, for --resume with other thresholds
        raise NoCandidateError(f"{result.selection.explanation}\nAll scores are in {config.output_dir}/.")
    if config.sanity:
        _show("\n" + text.completions(result, ready.chat, ready.prompts))


def _inspect(config: Config) -> None:
    if processes.rank() > 0:
        return
    from refusal_direction.estimate import inspect

    print("Loading the model, then timing a few rows for about 15 s ...", file=sys.stderr, flush=True)
    _show(str(inspect(config)))


def _open_output() -> None:
    """Redirect closed streams to devnull."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for the life of the process


def _set_up_output() -> None:
    """Show the package's warnings, and no bars of the libraries unless output is a terminal."""
    if sys.stderr.isatty() and processes.rank() == 0:
        print("Loading torch and transformers ...", file=sys.stderr, flush=True)  # takes some seconds
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± still shows the table
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("Warning: %(message)s"))
    if processes.rank() > 0:  # the first process shows them
        handler.setLevel(logging.ERROR)
    logging.getLogger("refusal_direction").handlers = [handler]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs at every call of every layer
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the text pipeline; returns the exit code."""
    return _main(argv, Config())


def main_vlm(argv: Sequence[str] | None = None) -> int:
    """Run the vision-language pipeline; returns the exit code."""
    return _main(argv, VISION_CONFIG)


def _check_working_folder() -> None:
    """Raise OutputError in a folder that has been removed, in which no path means anything."""
    try:
        os.getcwd()
    except OSError as error:
        raise OutputError(f"The working folder is gone ({error.strerror}). Change to one that exists: cd ~") from error


def _command(argv: Sequence[str]) -> tuple[Callable[[Config], None], Sequence[str]]:
    """The command and its flags: `inspect MODEL ...` looks at a model, anything else is a run."""
    if not argv or argv[0] != "inspect":
        return _run, argv
    rest = argv[1:]
    named = bool(rest) and not rest[0].startswith("-")
    return _inspect, ["--model_id", *rest] if named else rest


def _resumable(config: Config | None, before: set[tuple[Path, int]]) -> bool:
    """Whether this run, or the run it resumes, left checkpoints."""
    return config is not None and bool(_checkpoints(config) - (set() if config.resume else before))


def _checkpoints(config: Config) -> set[tuple[Path, int]]:
    """The checkpoints in the output folder, with their modification times."""
    found = set()
    with suppress(OSError):  # a folder that cannot be read: the run will say so
        for path in (config.output_dir / CHECKPOINTS).rglob("*.safetensors"):
            with suppress(FileNotFoundError):  # the first process removes those of an earlier run
                found.add((path, path.stat().st_mtime_ns))
    return found


def _main(argv: Sequence[str] | None, defaults: Config) -> int:
    config: Config | None = None
    before: set[tuple[Path, int]] = set()
    _open_output()
    try:
        _check_working_folder()
        command, flags = _command(sys.argv[1:] if argv is None else argv)
        config = parse(flags, defaults)
        before = _checkpoints(config)
        _set_up_output()
        command(config)
    except BrokenPipeError:  # as by `| head`: the reader has seen enough, and results are written
        _discard_output()
    except RefusalDirectionError as error:
        print(f"Error: {error}", file=sys.stderr)
        if _resumable(config, before) and not isinstance(error, UnsupportedModelError):
            print(
                "The scores measured so far are kept: --resume continues, also with other thresholds.", file=sys.stderr
            )
        return 3 if isinstance(error, NoCandidateError) else 2
    except KeyboardInterrupt:
        kept = " The finished passes are kept: --resume continues from there." if _resumable(config, before) else ""
        print(
            f"\nInterrupted. Results are written completely or not at all; those of earlier runs are untouched.{kept}",
            file=sys.stderr,
        )
        return 130
    return 0
