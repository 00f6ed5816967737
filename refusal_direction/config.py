"""What a run is asked to do. Every default stands here, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["DEMO_MODEL", "LEAST_PROMPTS", "Config", "ModelSource", "PromptSource", "Thresholds"]

DEMO_MODEL = "demo"
"""The model id of the small model that ships with the project; its prompts come with it."""

LEAST_PROMPTS = 4
"""The filter must leave so many prompts of each kind, or what was asked for if that is less."""


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is loaded."""

    model_id: str = "google/gemma-7b-it"
    """A Hub id, a folder, or "demo"."""
    dtype: str = "auto"
    """bfloat16, float16, float32, or auto: bfloat16 where the device does it well."""
    device: str = "auto"
    """cuda, mps, cpu, or auto: the best there is, with what does not fit offloaded to CPU memory and disk."""
    chat_template: str | None = None
    """A Jinja chat template, or a file that holds one; None uses the tokenizer's own."""


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


@dataclass(frozen=True)
class Thresholds:
    """The conditions of the selection (paper, section 2.3 and appendix C)."""

    kl: float = 0.1
    """Discard candidates whose mean KL divergence is larger."""
    induce: float = 0.0
    """Discard candidates whose mean steering score is smaller."""
    prune_layers: float = 0.2
    """Discard candidates from this last fraction of the layers."""


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelSource = field(default_factory=ModelSource)
    prompts: PromptSource = field(default_factory=PromptSource)
    thresholds: Thresholds = field(default_factory=Thresholds)
    output_dir: Path = Path("artifacts")
    batch_size: int | None = None
    """At most so many rows go through a layer at once; None derives it from free memory."""
    skip_filter: bool = False
    """Keep prompts whatever their baseline refusal score."""
    refusal_tokens: tuple[str, ...] = ()
    """Tokens, as text or ids, that begin a refusal; none: the table's for the model's family."""
    calibrate_refusal: bool = False
    """Find the refusal tokens from what the model itself says."""
    sanity: bool = False
    """Show completions under the baseline, ablation and steering at the end."""
