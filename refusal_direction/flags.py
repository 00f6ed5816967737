"""The command line's flags, made from the fields of the configuration: one flag for each setting, with the same name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, get_args, get_type_hints

from refusal_direction.config import Config, ModelSource, PromptSource, Thresholds
from refusal_direction.errors import ConfigurationError

__all__ = ["config_from", "parse", "parser"]

_DESCRIPTION = """\
Find the direction in the residual stream that carries refusal in a chat model (Arditi et al., NeurIPS 2024), score every
candidate, and write the best with its scores. Try: --model_id demo. Before a long run, `inspect MODEL` with the same flags
shows its steps and its cost on this machine."""

_PARTS = {"model": ModelSource, "prompts": PromptSource, "thresholds": Thresholds}
"""The parts of the configuration that are flags, by their field in it."""
_GROUPS = {"model": "model", "prompts": "prompts", "thresholds": "method"}
"""The heading of each part's flags in --help."""
_VARIABLES = {"n_train": "VLM_N_TRAIN", "n_val": "VLM_N_VAL"}
"""Environment variables that stand for flags of the vision-language pipeline."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows informative defaults, and only the first spelling of a flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = any(action.default is nothing for nothing in (None, False, (), argparse.SUPPRESS))
        return action.help if silent else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        if not spellings or action.nargs == 0:
            return ", ".join(spellings or action.option_strings)
        return f"{', '.join(spellings)} {self._format_args(action, action.dest.upper())}"


def parser(defaults: Config = Config()) -> argparse.ArgumentParser:
    """The flags of a pipeline, grouped, with its defaults."""
    name = "extract_refusal_direction" + ("_vlm" if defaults.rules.images else "")
    top = argparse.ArgumentParser(name, description=_DESCRIPTION, formatter_class=_Formatter)
    groups = {name: top.add_argument_group(name) for name in ("model", "prompts", "method", "output")}
    for group, field, value, annotation in _settings(defaults):
        if defaults.rules.images or not field.metadata.get("vision_only"):
            spellings = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
            groups[group].add_argument(*spellings, dest=field.name, **_options(field, value, annotation, defaults))
    return top


def _settings(defaults: Config) -> Iterator[tuple[str, Field[Any], Any, Any]]:
    """Heading, field, default and type of every setting that is a flag."""
    for part, kind in _PARTS.items():
        hints = get_type_hints(kind)
        for field in fields(kind):
            yield _GROUPS[part], field, getattr(getattr(defaults, part), field.name), hints[field.name]
    hints = get_type_hints(Config)
    for field in fields(Config):
        if "help" in field.metadata:
            yield field.metadata["group"], field, getattr(defaults, field.name), hints[field.name]


def _options(field: Field[Any], value: Any, annotation: Any, defaults: Config) -> dict[str, Any]:
    """The arguments of `add_argument` for one setting."""
    metadata, kinds = field.metadata, get_args(annotation) or (annotation,)
    options: dict[str, Any] = {"default": value, "help": _text(metadata, "help", defaults)}
    if bool in kinds:
        return {**options, "action": "store_true"}
    if metavar := _text(metadata, "metavar", defaults):
        options["metavar"] = metavar
    if "choices" in metadata:
        options["choices"] = metadata["choices"]
    if field.name == "search":
        options["choices"] = defaults.rules.searches
        options["help"] += f" (default: {defaults.rules.searches[0]})"
    if field.name == "batch_size" and value is not None:
        options["help"] = "most rows through a layer at once"
    if isinstance(value, tuple):
        return {**options, "nargs": "+"}
    types = {int: _bytes if metadata.get("size") else int, float: float}
    for kind in kinds:
        if kind in types:
            options["type"] = types[kind]
    return options


def _text(metadata: Mapping[str, Any], name: str, defaults: Config) -> str | None:
    vision = metadata.get(f"vision_{name}") if defaults.rules.images else None
    return vision or metadata.get(name)


def parse(flags: Sequence[str], defaults: Config) -> Config:
    """The configuration that flags ask for; for images VLM_N_TRAIN and VLM_N_VAL stand in for flags that are absent.

    Raises ConfigurationError for invalid values, SystemExit for flags that cannot be parsed.
    """
    variables = _VARIABLES if defaults.rules.images else {}
    given = {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}
    arguments = parser(defaults).parse_args(flags, argparse.Namespace(**given))
    for name, text in given.items():
        if getattr(arguments, name) is text:  # no flag has overridden it
            setattr(arguments, name, _count(variables[name], text))
    return config_from(arguments, defaults)


def _count(variable: str, text: str) -> int:
    """The number in an environment variable."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigurationError(f"{variable}={text[:40]}: must be a whole number of at least 1.")
    return count


def config_from(arguments: argparse.Namespace, defaults: Config = Config()) -> Config:
    """The configuration of parsed arguments.

    Raises ConfigurationError for invalid values.
    """
    parts = {name: kind(**_some_of(arguments, fields(kind))) for name, kind in _PARTS.items()}
    own = _some_of(arguments, fields(Config))
    own["refusal_tokens"] = tuple(own["refusal_tokens"])
    return Config(rules=defaults.rules, methods=defaults.methods, **parts, **own)


def _some_of(arguments: argparse.Namespace, of: Sequence[Field[Any]]) -> dict[str, Any]:
    """The arguments that have the names of these fields."""
    return {
        field.name: getattr(arguments, field.name)
        for field in of
        if "help" in field.metadata and hasattr(arguments, field.name)
    }


def _bytes(size: str) -> int:
    """A size with its unit, in bytes."""
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        return int(convert_file_size_to_int(size))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"{size!r} is not a size: give a number and a unit, as 512MiB or 4GB (KB, MB, GB, KiB, MiB, GiB)"
        ) from error
