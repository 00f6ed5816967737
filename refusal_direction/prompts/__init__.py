"""Prompts: where they come from, and how they are drawn."""

from __future__ import annotations

from refusal_direction import demo
from refusal_direction.config import DEMO_MODEL, PromptSource
from refusal_direction.errors import ConfigurationError
from refusal_direction.prompts.files import read_prompts
from refusal_direction.prompts.published import published_splits
from refusal_direction.prompts.sets import Prompt, PromptSets, sample_pools, sample_splits

__all__ = ["Prompt", "PromptSets", "gather", "read_prompts"]

_SPLITS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val")


def gather(source: PromptSource, model_id: str, *, progress: bool = False) -> PromptSets:
    """Draw the prompts of a run: own files if given, the demo's own with the demo model, else the published splits.

    Raises PromptError (a file or download that is not as it should be, too few prompts), ConfigurationError.
    """
    counts = {"n_train": source.n_train, "n_val": source.n_val, "seed": source.seed}
    if source.harmful is not None and source.harmless is not None:
        return sample_pools(read_prompts(source.harmful), read_prompts(source.harmless), **counts)
    if source.harmful is not None or source.harmless is not None:
        raise ConfigurationError("--harmful and --harmless go together: give both files, or neither.")
    if model_id == DEMO_MODEL:
        return sample_splits({name: read_prompts(demo.PROMPTS_DIR / f"{name}.json") for name in _SPLITS}, **counts)
    return sample_splits(published_splits(source.data_dir, progress), **counts)
