"""Settings of a run. Every default stands here, once; the command line is made from these fields (flags.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    """A field that is also a flag; its help text documents both."""
    return field(default=default, metadata={"help": help, **flag})


def _require(holds: bool, name: str, value: object, condition: str) -> None:
    """Raise ConfigurationError in terms of the command line, whose flags have the fields' names."""
    if not holds:
        raise ConfigurationError(f"--{name} {value}: must be {condition}.")


def _at_least(minimum: int, **counts: int | None) -> None:
    for name, count in counts.items():
        _require(count is None or count >= minimum, name, count, f"at least {minimum}")


@dataclass(frozen=True)
class ModelSource:
    """The model and how it is loaded."""

    model_id: str = _setting("google/gemma-7b-it", "Hub id, folder, GGUF file, or demo", metavar="ID")
    dtype: str = _setting("auto", "bfloat16, float16, float32 or auto: bfloat16 where the device is fast with it")
    device: str = _setting("auto", "cuda, mps, cpu or auto (offloads weights that do not fit)")
    quantization: str | None = _setting(None, "4bit or 8bit: quantise the weights (bitsandbytes)", metavar="BITS")
    revision: str | None = _setting(None, "branch, tag or commit of a Hub id", metavar="NAME")
    adapter: str | None = _setting(None, "PEFT adapter for the model: Hub id or folder", metavar="ID")
    trust_remote_code: bool = _setting(False, "run Python code that comes with the model")
    allow_pickle: bool = _setting(False, "load weights that are not in safetensors format")
    chat_template: str | None = _setting(None, "Jinja chat template, or a file with one", metavar="FILE")
    system_prompt: str | None = _setting(None, "system message, if the template takes one", metavar="TEXT")
    thinking: bool = _setting(False, "let a reasoning model think before it answers")
    gguf_file: str | None = _setting(None, "which GGUF file of the folder or Hub id", metavar="NAME")

    def __post_init__(self) -> None:
        for name in ("model_id", "gguf_file", "adapter", "chat_template"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else str(value))  # a path is accepted too


@dataclass(frozen=True)
class PromptSource:
    """The prompts and how many are drawn."""

    harmful: Path | None = _setting(
        None,
        "your harmful prompts: .json, .jsonl, .csv, .txt",
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
        _at_least(1, n_train=self.n_train, n_val=self.n_val)
        _at_least(0, n_test=self.n_test)
        for name in ("data_dir", "harmful", "harmless"):
            path = getattr(self, name)
            if path is not None:  # a string is accepted too
                object.__setattr__(self, name, Path(path))


@dataclass(frozen=True)
class Thresholds:
    """The conditions that a candidate must meet (paper, section 2.3 and appendix C)."""

    kl_threshold: float = _setting(0.1, "discard candidates with a larger mean KL divergence")
    induce_threshold: float = _setting(0.0, "discard candidates with a smaller mean steering score")
    prune_layers: float = _setting(0.2, "discard candidates from this last fraction of the layers")
    top_k_candidates: int | None = _setting(
        None, "consider only this many candidates, those of lowest KL", metavar="K", vision_only=True
    )

    def __post_init__(self) -> None:
        for name in ("kl_threshold", "induce_threshold", "prune_layers"):
            object.__setattr__(self, name, float(getattr(self, name)))  # a whole number is accepted too
        for name in ("kl_threshold", "induce_threshold"):
            _require(not math.isnan(getattr(self, name)), name, getattr(self, name), "a number")
        _require(0 <= self.prune_layers < 1, "prune_layers", self.prune_layers, "at least 0 and below 1")
        _at_least(1, top_k_candidates=self.top_k_candidates)


@dataclass(frozen=True)
class Rules:
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
class Config:
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
        _at_least(1, batch_size=self.batch_size, memory_budget=self.memory_budget)
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        if isinstance(self.refusal_tokens, str | int):
            raise ConfigurationError(f"refusal_tokens: give a tuple of tokens, as ({self.refusal_tokens!r},).")
        if isinstance(self.methods, str) or not self.methods:
            raise ConfigurationError(f"methods: give a tuple of names of methods, not {self.methods!r}.")
        for name in ("refusal_tokens", "methods"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list is accepted too
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
