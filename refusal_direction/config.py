"""What a run is asked to do. Every default stands here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from refusal_direction.errors import ConfigurationError

__all__ = [
    "DEMO_MODEL",
    "TEXT",
    "UNFINISHED",
    "VISION",
    "VISION_CONFIG",
    "Config",
    "ModelSource",
    "PromptSource",
    "Rules",
    "Thresholds",
]

UNFINISHED = ".unfinished"
"""The folder, in that of the results, that keeps the finished parts of a run that has not ended."""

DEMO_MODEL = "demo"
"""The model id of the small model that ships with the project; its prompts come with it."""


def _require(holds: bool, name: str, value: object, what: str) -> None:
    """Raise ConfigurationError in terms of the command line, whose flags have the fields' names."""
    if not holds:
        raise ConfigurationError(f"--{name} {value}: must be {what}.")


def _at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        _require(count is None or count >= 1, name, count, "at least 1")


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is loaded."""

    model_id: str = "google/gemma-7b-it"
    """A Hub id, a folder, or "demo"."""
    revision: str | None = None
    """A branch, tag or commit of the Hub's; None is the main branch."""
    adapter: str | None = None
    """A PEFT adapter on top of it: a Hub id or a folder."""
    quantization: str | None = None
    """4bit or 8bit quantises the weights as they are loaded (bitsandbytes)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    allow_pickle: bool = False
    """Take weights that are not in safetensors format."""
    dtype: str = "auto"
    """bfloat16, float16, float32, or auto: bfloat16 where the device does it well."""
    device: str = "auto"
    """cuda, mps, cpu, or auto: the best there is, with what does not fit offloaded to CPU memory and disk."""
    chat_template: str | None = None
    """A Jinja chat template, or a file that holds one; None uses the tokenizer's own."""
    system_prompt: str | None = None
    """What the system message says; None leaves it to the template."""
    thinking: bool = False
    """Let a reasoning model think before it answers."""


@dataclass(frozen=True)
class PromptSource:
    """Which prompts, and how many are drawn."""

    n_train: int = 128
    n_val: int = 32
    seed: int = 42
    data_dir: Path = Path("data")
    """Where the published splits are kept."""
    harmful: Path | None = None
    """Own harmful prompts, instead of the published splits."""
    harmless: Path | None = None

    def __post_init__(self) -> None:
        _at_least_one(n_train=self.n_train, n_val=self.n_val)
        for name in ("data_dir", "harmful", "harmless"):
            path = getattr(self, name)
            if path is not None:  # a string will do
                object.__setattr__(self, name, Path(path))


@dataclass(frozen=True)
class Thresholds:
    """The conditions of the selection (paper, section 2.3 and appendix C)."""

    kl: float = 0.1
    """Discard candidates whose mean KL divergence is larger."""
    induce: float = 0.0
    """Discard candidates whose mean steering score is smaller."""
    prune_layers: float = 0.2
    """Discard candidates from this last fraction of the layers."""

    def __post_init__(self) -> None:
        _require(not math.isnan(self.kl), "kl_threshold", self.kl, "a number")
        _require(not math.isnan(self.induce), "induce_threshold", self.induce, "a number")
        _require(0 <= self.prune_layers < 1, "prune_layers", self.prune_layers, "at least 0 and below 1")


@dataclass(frozen=True)
class Rules:
    """Where the method for text and the one for images with text differ (docs/method.md)."""

    images: bool
    """Whether prompts are pairs of an image and a question."""
    positions: int | None
    """How many of the last tokens give candidates; None: the end-of-instruction tokens."""
    least_prompts: int
    """The filter must leave so many prompts of each kind, or what was asked for if that is less."""
    refill: bool
    """Where it leaves fewer, take the most fitting of the others instead of giving up."""
    top_k: int | None
    """Consider only so many candidates, those of lowest KL; None, or an exhaustive search: all."""
    relative_steering: bool
    """The steering threshold counts from the baseline's mean, and is waived where no candidate reaches it."""
    searches: tuple[str, ...]
    """How the selected candidate can be found, the default first."""

    def __post_init__(self) -> None:
        _at_least_one(top_k_candidates=self.top_k)


TEXT = Rules(
    images=False,
    positions=None,
    least_prompts=4,
    refill=False,
    top_k=None,
    relative_steering=False,
    searches=("exhaustive", "pruned"),
)
VISION = Rules(
    images=True,
    positions=3,
    least_prompts=8,
    refill=True,
    top_k=15,
    relative_steering=True,
    searches=("kl_first", "exhaustive", "pruned"),
)


@dataclass(frozen=True)
class Config:
    """One run.

    Raises ConfigurationError, as its parts do, where a value makes no sense.
    """

    rules: Rules = TEXT
    model: ModelSource = field(default_factory=ModelSource)
    prompts: PromptSource = field(default_factory=PromptSource)
    thresholds: Thresholds = field(default_factory=Thresholds)
    search: str | None = None
    """exhaustive: score every candidate. kl_first (images with text): KL of all, the rest for those of lowest KL. pruned:
    find the same candidate with a fraction of the work. None: the first of the rules' `searches`."""
    output_dir: Path = Path("artifacts")
    batch_size: int | None = None
    """At most so many rows go through a layer at once; None derives it from free memory."""
    memory_budget: int | None = None
    """At most so many bytes are held beside the model; None: as much as pays."""
    skip_filter: bool = False
    """Keep prompts whatever their baseline refusal score."""
    refusal_tokens: tuple[str | int, ...] = ()
    """Tokens, as text or ids, that begin a refusal; none: the table's for the model's family."""
    calibrate_refusal: bool = False
    """Find the refusal tokens from what the model itself says."""
    resume: bool = False
    """Go on from what an earlier run of the same kind had finished."""
    sanity: bool = False
    """Show completions under the baseline, ablation and steering at the end."""

    def __post_init__(self) -> None:
        _at_least_one(batch_size=self.batch_size, memory_budget=self.memory_budget)
        if isinstance(self.refusal_tokens, str | int):
            raise ConfigurationError(f"refusal_tokens: give a tuple of tokens, as ({self.refusal_tokens!r},).")
        if self.refusal_tokens and self.calibrate_refusal:
            raise ConfigurationError("--refusal_tokens and --calibrate_refusal exclude each other: give one.")


VISION_CONFIG = Config(
    rules=VISION,
    model=ModelSource("google/paligemma2-10b-mix-448"),
    output_dir=Path("artifacts") / "vlm",
    batch_size=8,
)
"""The defaults of the vision-language pipeline."""
