"""Settings of a run. Every default stands here, once; the command line is made from these fields (flags.py)."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from refusal_direction.errors import ConfigurationError

__all__ = [
    "CHECKPOINTS",
    "DEMO_MODEL",
    "DIFFERENCE_OF_MEANS",
    "TEXT",
    "VISION",
    "VISION_CONFIG",
    "Config",
    "ModelSource",
    "PromptSource",
    "Rules",
    "Thresholds",
    "search_name",
]

CHECKPOINTS = ".unfinished"
"""The folder, inside the output folder, with the checkpoints of a run that has not finished."""

DIFFERENCE_OF_MEANS = "difference_of_means"
"""The name of the published method, which is the default."""

DEMO_MODEL = "demo"
"""The model id of the small model that ships with the project, which has prompts of its own."""


def _setting(default: Any, help: str, **flag: Any) -> Any:
    """A field that is also a flag; its help text documents both.

    `path` marks text that may name a file or folder, `empty` text that may be empty.
    """
    return field(default=default, metadata={"help": help, **flag})


def _require(holds: bool, name: str, value: object, condition: str) -> None:
    """Raise ConfigurationError in terms of the command line, whose flags have the fields' names."""
    if not holds:
        raise ConfigurationError(f"--{name} {value}: must be {condition}.")


def _at_least(minimum: int, **counts: int | None) -> None:
    for name, count in counts.items():
        _require(count is None or count >= minimum, name, count, f"at least {minimum}")


_EXPECTED = {
    NoneType: "None",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
"""Types of settings, in words."""


def _expected(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_expected, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a tuple, each member {_expected(get_args(kind)[0])}"
    return _EXPECTED.get(kind) or f"a {kind.__name__}"


def _converted(kind: Any, value: Any) -> Any:
    """The value as an instance of a type: a list becomes a tuple, a string a path, a whole number a float.

    Raises TypeError if it is of another type.
    """
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            with suppress(TypeError):
                return _converted(member, value)
    elif get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_converted(get_args(kind)[0], member) for member in value)
    elif kind in (bool, NoneType, str) or is_dataclass(kind):
        if isinstance(value, kind):
            return value
    elif kind is Path and isinstance(value, str | os.PathLike):
        return Path(os.path.expanduser(value))  # Path.expanduser fails for unknown users
    elif kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    elif kind is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{kind} expected")


def _check_text(name: str, value: object, empty: bool) -> None:
    """Raise ConfigurationError for text that no file, template or model can take.

    Args:
        name: the name of the setting.
        value: its value, of any type.
        empty: whether it may be empty.
    """
    for member in value if isinstance(value, list | tuple) else (value,):
        text = os.fspath(member) if isinstance(member, os.PathLike) else member
        if not isinstance(text, str):
            continue
        if not text and not empty:
            raise ConfigurationError(f"{name}: it is empty. Give a value, or leave it out.")
        if "\0" in text:
            raise ConfigurationError(f"{name} {shortened(text)}: it holds a NUL character. Take that out.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigurationError(
                f"{name} {shortened(text)}: it holds bytes that are not UTF-8. Write it in UTF-8; rename a file whose name is not."
            ) from error


@dataclass(frozen=True)
class _Settings:
    """Settings whose values are checked by the types of their fields, and converted where nothing is lost.

    Raises ConfigurationError, which names the field, for a value of another type, and for text that nothing can take.
    """

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for setting in fields(self):
            value = _checked(setting, types[setting.name], getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)


def _checked(setting: Field[Any], kind: Any, value: Any) -> Any:
    """The value of a setting, as an instance of its type."""
    name = f"--{setting.name}" if "help" in setting.metadata else setting.name
    _check_text(name, value, empty=setting.metadata.get("empty", False))
    if setting.metadata.get("path") and isinstance(value, str | os.PathLike):
        value = _expanded(os.fspath(value))
    try:
        return _converted(kind, value)
    except (TypeError, OverflowError) as error:
        given = f"{shortened(value)} ({type(value).__name__})"
        raise ConfigurationError(f"{name}: must be {_expected(kind)}, but {given} was given.") from error


def _expanded(text: str) -> str:
    """A path with ~ as the home folder; text with braces is a template, and stays as it is."""
    return text if "{" in text else os.path.expanduser(text)


@dataclass(frozen=True)
class ModelSource(_Settings):
    """The model and how it is loaded."""

    model_id: str = _setting("google/gemma-7b-it", "Hub id, folder, GGUF file, or demo", metavar="ID", path=True)
    dtype: str = _setting("auto", "bfloat16, float16, float32 or auto: bfloat16 where the device is fast with it")
    device: str = _setting("auto", "cuda, mps, cpu or auto (offloads weights that do not fit)")
    quantization: str | None = _setting(None, "4bit or 8bit: quantise the weights (bitsandbytes)", metavar="BITS")
    revision: str | None = _setting(None, "branch, tag or commit of a Hub id", metavar="NAME")
    adapter: str | None = _setting(None, "PEFT adapter for the model: Hub id or folder", metavar="ID", path=True)
    trust_remote_code: bool = _setting(False, "run Python code that comes with the model")
    allow_pickle: bool = _setting(False, "load weights that are not in safetensors format")
    chat_template: str | None = _setting(None, "Jinja chat template, or a file with one", metavar="FILE", path=True)
    system_prompt: str | None = _setting(None, "system message, if the template takes one", metavar="TEXT", empty=True)
    thinking: bool = _setting(False, "let a reasoning model think before it answers")
    gguf_file: str | None = _setting(None, "which GGUF file of the folder or Hub id", metavar="NAME", path=True)


@dataclass(frozen=True)
class PromptSource(_Settings):
    """The prompts and how many are drawn."""

    harmful: Path | None = _setting(
        None,
        "your harmful prompts: .json, .jsonl, .csv, .parquet, .txt",
        metavar="FILE",
        vision_metavar="FOLDER",
        vision_help="your harmful prompts: images with metadata.jsonl",
    )
    harmless: Path | None = _setting(
        None, "your harmless prompts, in the same formats", metavar="FILE", vision_metavar="FOLDER"
    )
    data_dir: Path = _setting(Path("data"), "folder of the published prompts")
    n_train: int = _setting(128, "prompts of each kind for the directions")
    n_val: int = _setting(32, "prompts of each kind for the scores")
    n_test: int = _setting(100, "prompts of each kind held out, at most")
    seed: int = _setting(42, "seed of the draw")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, n_train=self.n_train, n_val=self.n_val)
        _at_least(0, n_test=self.n_test)


@dataclass(frozen=True)
class Thresholds(_Settings):
    """The conditions that a candidate must meet (paper, section 2.3 and appendix C)."""

    kl_threshold: float = _setting(0.1, "discard candidates with a larger mean KL divergence")
    induce_threshold: float = _setting(0.0, "discard candidates with a smaller mean steering score")
    prune_layers: float = _setting(0.2, "discard candidates from this last fraction of the layers")
    top_k_candidates: int | None = _setting(
        None, "consider only this many candidates, those of lowest KL", metavar="K", vision_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kl_threshold", "induce_threshold"):
            _require(not math.isnan(getattr(self, name)), name, getattr(self, name), "a number")
        _require(0 <= self.prune_layers < 1, "prune_layers", self.prune_layers, "at least 0 and below 1")
        _at_least(1, top_k_candidates=self.top_k_candidates)


@dataclass(frozen=True)
class Rules(_Settings):
    """The differences between the method for text and the one for images with text (docs/method.md)."""

    images: bool
    """Whether prompts are pairs of an image and a question."""
    positions: int | None
    """Number of final tokens that give candidates; None for the end-of-instruction tokens."""
    minimum_prompts: int
    """Minimum prompts per set after filtering, capped at the number requested."""
    keep_most_fitting: bool
    """Whether to fall back to the most fitting prompts, with a warning, where the filter leaves fewer than the minimum."""
    relaxing: bool
    """Whether conditions that no candidate meets are dropped, with a warning; `induce_threshold` then counts from the
    baseline's mean score."""
    searches: tuple[str, ...]
    """Available searches; the first is the default."""
    top_k_candidates: int | None
    """The default of `Thresholds.top_k_candidates`."""


TEXT = Rules(
    images=False,
    positions=None,
    minimum_prompts=4,
    keep_most_fitting=False,
    relaxing=False,
    searches=("exhaustive", "pruned"),
    top_k_candidates=None,
)
VISION = Rules(
    images=True,
    positions=3,
    minimum_prompts=8,
    keep_most_fitting=True,
    relaxing=True,
    searches=("kl_first", "exhaustive", "pruned"),
    top_k_candidates=15,
)


@dataclass(frozen=True)
class Config(_Settings):
    """All settings of one run.

    Raises ConfigurationError, as its parts do, for invalid values.
    """

    rules: Rules = TEXT
    model: ModelSource = field(default_factory=ModelSource)
    prompts: PromptSource = field(default_factory=PromptSource)
    thresholds: Thresholds = field(default_factory=Thresholds)
    methods: tuple[str, ...] = (DIFFERENCE_OF_MEANS,)
    """Names of the methods that make candidate directions (`refusal_direction.methods`)."""
    batch_size: int | None = _setting(
        None, "most rows through a layer at once (default: by free memory)", metavar="ROWS", group="model"
    )
    memory_budget: int | None = _setting(
        None, "most memory beside the model, as 512MiB or 4GB", metavar="SIZE", group="model", size=True
    )
    skip_filter: bool = _setting(False, "keep prompts whatever their baseline refusal score", group="prompts")
    no_refill: bool = _setting(False, "draw no further prompts where fewer than half pass the filter", group="prompts")
    refusal_tokens: tuple[str | int, ...] = _setting(
        (), "first tokens of a refusal: text or ids", metavar="TOKEN", group="method"
    )
    calibrate_refusal: bool = _setting(False, "find them in the model's own replies", group="method")
    select: str = _setting(
        "best",
        "where no candidate meets every condition: best selects none, nearest the one that misses by least",
        choices=("best", "nearest"),
        group="method",
    )
    search: str | None = _setting(
        None,
        "exhaustive scores every candidate; pruned selects the same candidate with less work",
        vision_help="kl_first measures the KL of every candidate and the rest for those of lowest KL; exhaustive scores "
        "every candidate; pruned selects the same candidate as kl_first with less work",
        group="method",
    )
    output_dir: Path = _setting(Path("artifacts"), "folder of the results", group="output")
    keep_activations: bool = _setting(False, "also store the activations of the training prompts", group="output")
    resume: bool = _setting(False, "continue an interrupted run from its last checkpoint", group="output")
    sanity: bool = _setting(False, "show a few baseline, ablated, steered completions", group="output")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, batch_size=self.batch_size, memory_budget=self.memory_budget)
        if not self.methods:
            raise ConfigurationError("methods: it is empty. Give at least one name of a method.")
        for token in self.refusal_tokens:
            _require(isinstance(token, str) or token >= 0, "refusal_tokens", token, "text, or an id of at least 0")
        _require(self.select in ("best", "nearest"), "select", self.select, "best or nearest")
        if self.refusal_tokens and self.calibrate_refusal:
            raise ConfigurationError("--refusal_tokens and --calibrate_refusal exclude each other: give one.")
        if self.thresholds.top_k_candidates is not None and not self.rules.images:
            raise ConfigurationError("top_k_candidates is a condition for images with text alone. Leave it out.")
        if self.thresholds.top_k_candidates is None:
            own = replace(self.thresholds, top_k_candidates=self.rules.top_k_candidates)
            object.__setattr__(self, "thresholds", own)


def search_name(config: Config) -> str:
    """The search that a configuration asks for.

    Raises ConfigurationError where the rules have no such search.
    """
    name = config.search or config.rules.searches[0]
    if name not in config.rules.searches:
        raise ConfigurationError(f"--search {name}: must be one of {', '.join(config.rules.searches)}.")
    return name


VISION_CONFIG = Config(
    rules=VISION,
    model=ModelSource("google/paligemma2-10b-mix-448"),
    output_dir=Path("artifacts") / "vlm",
    batch_size=8,
)
"""The defaults of the vision-language pipeline."""
