"""The command line: arguments to a configuration, progress, printed errors, exit codes. Of a run nothing else prints.

Exit codes: 0 done; 2 an error the user can mend (see errors.py); 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from refusal_direction.config import (
    TEXT,
    UNFINISHED,
    VISION_CONFIG,
    Config,
    ModelSource,
    PromptSource,
    Rules,
    Thresholds,
)
from refusal_direction.errors import ConfigurationError, OutputError, RefusalDirectionError
from refusal_direction.runtime import processes

if TYPE_CHECKING:
    from refusal_direction.pipeline import RunResult

__all__ = ["config_from", "main", "main_vlm", "parser"]

_A_MINUTE = 60.0

_DESCRIPTION = """\
Find the direction in the residual stream that carries refusal in a chat model (Arditi et al., NeurIPS 2024), score every
candidate, and write the best with its scores. Try: --model_id demo. Before a long run, `inspect MODEL` with the same flags
shows what would be done and what it would cost on this machine."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing, and the first spelling of a flag only."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = any(action.default is nothing for nothing in (None, False, (), argparse.SUPPRESS))
        return action.help if silent else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        if not spellings or action.nargs == 0:
            return ", ".join(spellings or action.option_strings)
        return f"{', '.join(spellings)} {self._format_args(action, action.dest.upper())}"


def _add(group: argparse._ArgumentGroup, name: str, **settings: object) -> None:
    """A flag in both spellings, with an underscore and with a hyphen."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    group.add_argument(*spellings, dest=name, **settings)  # type: ignore[arg-type]


def parser(defaults: Config = Config()) -> argparse.ArgumentParser:
    """The arguments, grouped, with the defaults of a pipeline (config.py)."""
    name = "extract_refusal_direction" + ("_vlm" if defaults.rules.images else "")
    top = argparse.ArgumentParser(name, description=_DESCRIPTION, formatter_class=_Formatter)
    _add_model(top.add_argument_group("model"), defaults)
    _add_prompts(top.add_argument_group("prompts"), defaults)
    _add_method(top.add_argument_group("method"), defaults)
    _add_output(top.add_argument_group("output"), defaults)
    return top


def _add_model(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add, model = partial(_add, group), defaults.model
    by_memory = " (default: by memory)" if defaults.batch_size is None else ""
    add("model_id", default=model.model_id, metavar="ID", help="Hub id, local folder, or demo")
    add("dtype", default=model.dtype, help="bfloat16, float16, float32 or auto")
    add("device", default=model.device, help="cuda, mps, cpu or auto (what does not fit is offloaded)")
    add("quantization", metavar="BITS", help="4bit or 8bit, as weights are loaded (bitsandbytes)")
    add("revision", metavar="NAME", help="branch, tag or commit of a Hub id")
    add("adapter", metavar="ID", help="PEFT adapter on the model: Hub id or folder")
    add("trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("allow_pickle", action="store_true", help="take weights that are not in safetensors format")
    add("chat_template", metavar="FILE", help="Jinja chat template, for models without one")
    add("system_prompt", metavar="TEXT", help="system message, where the template takes one")
    add("thinking", action="store_true", help="let a reasoning model think before it answers")
    rows = f"most rows through a layer at once{by_memory}"
    add("batch_size", type=int, default=defaults.batch_size, metavar="ROWS", help=rows)
    add("memory_budget", type=_bytes, metavar="SIZE", help="most memory beside the model, as 512MiB or 4GB")


def _add_prompts(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add, prompts = partial(_add, group), defaults.prompts
    files = ("FILE", ".json, .jsonl, .csv, .txt")
    own, kind = ("FOLDER", "images with metadata.jsonl") if defaults.rules.images else files
    add("harmful", type=_path, metavar=own, help=f"own harmful prompts: {kind}")
    add("harmless", type=_path, metavar=own, help="own harmless prompts, likewise")
    add("data_dir", type=_path, default=prompts.data_dir, help="where the published prompts are kept")
    add("n_train", type=int, default=prompts.n_train, help="prompts of each kind for the direction")
    add("n_val", type=int, default=prompts.n_val, help="prompts of each kind for its scores")
    add("seed", type=int, default=prompts.seed, help="of the draw")
    add("skip_filter", action="store_true", help="keep prompts whatever the model does with them")


def _add_method(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add, thresholds, searches = partial(_add, group), defaults.thresholds, defaults.rules.searches
    add("refusal_tokens", nargs="+", default=(), metavar="TOKEN", help="first tokens of a refusal: text or ids")
    add("calibrate_refusal", action="store_true", help="find them from what the model itself says")
    add("kl_threshold", type=float, default=thresholds.kl, help="discard candidates with a larger KL")
    add("induce_threshold", type=float, default=thresholds.induce, help="... with a smaller steering score")
    add("prune_layers", type=float, default=thresholds.prune_layers, help="... from this last part of the layers")
    fewer = f"exhaustive: score them all; pruned: choose alike with less work (default: {searches[0]})"
    add("search", choices=searches, help=fewer)
    if defaults.rules.images:
        add("top_k_candidates", type=int, default=defaults.rules.top_k, metavar="K", help="score so many of lowest KL")


def _add_output(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = partial(_add, group)
    add("output_dir", type=_path, default=defaults.output_dir, help="folder of the results")
    add("resume", action="store_true", help="go on with a run that was cut off, from what it had finished")
    add("sanity", action="store_true", help="show a few baseline, ablated and steered completions at the end")


def config_from(arguments: argparse.Namespace, rules: Rules = TEXT) -> Config:
    """The configuration that the arguments ask for.

    Raises ConfigurationError where a value makes no sense.
    """
    if rules.images:
        rules = replace(rules, top_k=arguments.top_k_candidates)
    return Config(
        rules=rules,
        model=_some_of(ModelSource, arguments),
        prompts=_some_of(PromptSource, arguments),
        thresholds=Thresholds(arguments.kl_threshold, arguments.induce_threshold, arguments.prune_layers),
        search=arguments.search,
        output_dir=arguments.output_dir,
        batch_size=arguments.batch_size,
        memory_budget=arguments.memory_budget,
        skip_filter=arguments.skip_filter,
        refusal_tokens=tuple(arguments.refusal_tokens),
        calibrate_refusal=arguments.calibrate_refusal,
        sanity=arguments.sanity,
        resume=arguments.resume,
    )


def _path(name: str) -> Path:
    """A file or folder; ~ is one's home, also where the shell leaves it as it is."""
    if not name:
        raise argparse.ArgumentTypeError("it is empty: name a file or folder, or leave the flag out")
    return Path(os.path.expanduser(name))  # Path's own fails on ~names that are no user's


def _bytes(size: str) -> int:
    """A size with its unit, in bytes."""
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        return int(convert_file_size_to_int(size))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"{size!r} is no size: give a number and a unit, as 512MiB or 4GB (KB, MB, GB, KiB, MiB, GiB)"
        ) from error


_Part = TypeVar("_Part", ModelSource, PromptSource)


def _some_of(part: type[_Part], arguments: argparse.Namespace) -> _Part:
    """The part of the configuration whose fields are arguments of the same names."""
    return part(**{field.name: getattr(arguments, field.name) for field in fields(part)})


def _arguments(flags: Sequence[str], defaults: Config) -> argparse.Namespace:
    """What the flags say. For images VLM_N_TRAIN and VLM_N_VAL stand for --n_train and --n_val where those are not given."""
    variables = {"n_train": "VLM_N_TRAIN", "n_val": "VLM_N_VAL"} if defaults.rules.images else {}
    told = {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}
    arguments = parser(defaults).parse_args(flags, argparse.Namespace(**told))
    for name, value in told.items():
        if getattr(arguments, name) is not value:  # a flag said something else
            continue
        if not value.isdecimal() or int(value) < 1:
            raise ConfigurationError(f"{variables[name]}={value}: must be a whole number of at least 1.")
        setattr(arguments, name, int(value))
    return arguments


@contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    how = (
        {} if sys.stderr.isatty() else {"file": _Lines(), "mininterval": _A_MINUTE, "delay": _A_MINUTE, "leave": False}
    )
    with tqdm(total=total, desc=description, unit=" row-layers", unit_scale=True, **how) as bar:
        yield bar.update


class _Lines(io.TextIOBase):
    """Where output is no terminal: a line, now and then, in place of a bar that is drawn anew."""

    def write(self, text: str) -> int:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr, flush=True)
        return len(text)


def _show(text: str) -> None:
    """Print it now.

    Raises OutputError where there is no room for it.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        raise OutputError(
            f"What is to be printed could not be written ({error.strerror}). Results that are finished are in their files."
        ) from error


def _discard_output() -> None:
    """What could not be written is not tried again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(config: Config) -> None:
    from refusal_direction.output import artifacts
    from refusal_direction.output import text as report
    from refusal_direction.pipeline import extract
    from refusal_direction.runtime.checkpoints import forget

    first = processes.rank() == 0
    new = first and artifacts.check_writable(config.output_dir, config.rules)
    try:
        extraction: RunResult = extract(
            config.model.model_id, config, progress=_bar if first else None, unfinished=config.output_dir
        )
    except RefusalDirectionError:
        if new:
            with suppress(OSError):  # what was measured is there
                config.output_dir.rmdir()
        raise
    if not first:
        return
    artifacts.write(extraction, config.output_dir)
    forget(config.output_dir)
    _show(f"{report.results(extraction)}\n\n{report.files(config)}")
    if config.sanity:
        _show("\n" + report.completions(extraction))


def _inspect(config: Config) -> None:
    if processes.rank() > 0:
        return
    from refusal_direction.estimate import inspect
    from refusal_direction.output import text as report

    _show(report.inspection(inspect(config)))


def _open_output() -> None:
    """Where a stream was closed before we began, what goes there goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as we run


def _set_up_output() -> None:
    """Only what concerns the user: our warnings, and no bars of the libraries where output is no terminal."""
    if sys.stderr.isatty() and processes.rank() == 0:
        print("Loading torch and transformers ...", file=sys.stderr, flush=True)  # some seconds
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no ± is no reason to lose the table
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("Warning: %(message)s"))
    if processes.rank() > 0:  # the first says it
        handler.setLevel(logging.ERROR)
    logging.getLogger("refusal_direction").handlers = [handler]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks at every call of every layer
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the text pipeline; returns the exit code."""
    return _main(argv, Config())


def main_vlm(argv: Sequence[str] | None = None) -> int:
    """Run the vision-language pipeline; returns the exit code."""
    return _main(argv, VISION_CONFIG)


def _task(argv: Sequence[str]) -> tuple[Callable[[Config], None], Sequence[str]]:
    """What to do, and its flags: `inspect MODEL ...` looks at a model, anything else is a run."""
    if not argv or argv[0] != "inspect":
        return _run, argv
    rest = argv[1:]
    named = bool(rest) and not rest[0].startswith("-")
    return _inspect, ["--model_id", *rest] if named else rest


def _resumable(config: Config | None, before: set[tuple[Path, int]]) -> bool:
    """Whether there is something to resume: of this run, or of the one that it resumes."""
    return config is not None and bool(_finished(config) - (set() if config.resume else before))


def _finished(config: Config) -> set[tuple[Path, int]]:
    """The finished parts of a run that has not ended, and when each was finished."""
    found = set()
    with suppress(OSError):  # a folder that cannot be looked into: the run will say so
        for path in (config.output_dir / UNFINISHED).rglob("*.safetensors"):
            with suppress(FileNotFoundError):  # the first process forgets those of an earlier run
                found.add((path, path.stat().st_mtime_ns))
    return found


def _main(argv: Sequence[str] | None, defaults: Config) -> int:
    config: Config | None = None
    before: set[tuple[Path, int]] = set()
    _open_output()
    try:
        task, flags = _task(sys.argv[1:] if argv is None else argv)
        config = config_from(_arguments(flags, defaults), defaults.rules)
        before = _finished(config)
        _set_up_output()
        task(config)
    except BrokenPipeError:  # as by `| head`: whoever reads has seen enough, and results are written
        _discard_output()
    except RefusalDirectionError as error:
        print(f"Error: {error}", file=sys.stderr)
        if _resumable(config, before):
            print(
                "What was measured is kept: --resume goes on from there, also with other thresholds.", file=sys.stderr
            )
        return 2
    except KeyboardInterrupt:
        kept = (
            " The passes that were through are kept: --resume goes on from there." if _resumable(config, before) else ""
        )
        print(
            f"\nInterrupted. Results are written whole or not at all; those of earlier runs are untouched.{kept}",
            file=sys.stderr,
        )
        return 130
    return 0
