"""Prompts: where they come from, and how they are drawn."""

from __future__ import annotations

from refusal_direction import demo
from refusal_direction.config import DEMO_MODEL, Config
from refusal_direction.errors import ConfigurationError
from refusal_direction.prompts.files import read_prompts
from refusal_direction.prompts.published import published_splits
from refusal_direction.prompts.sets import Prompt, PromptSets, sample_pools, sample_splits

__all__ = ["Prompt", "PromptSets", "gather", "read_prompts"]

_SPLITS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val")


def gather(config: Config, *, progress: bool = False) -> PromptSets:
    """Draw the prompts of a run: own ones if given, the demo's own with the demo model, else the published ones.

    Raises PromptError (a file or download that is not as it should be, too few prompts), ConfigurationError.
    """
    source = config.prompts
    if (source.harmful is None) != (source.harmless is None):
        raise ConfigurationError("--harmful and --harmless go together: give both, or neither.")
    counts = {"n_train": source.n_train, "n_val": source.n_val, "seed": source.seed}
    return _pairs(config, counts) if config.rules.images else _texts(config, counts, progress)


def _texts(config: Config, counts: dict[str, int], progress: bool) -> PromptSets:
    source = config.prompts
    if source.harmful is not None and source.harmless is not None:
        return sample_pools(read_prompts(source.harmful), read_prompts(source.harmless), **counts)
    if config.model.model_id == DEMO_MODEL:
        return sample_splits({name: read_prompts(demo.PROMPTS_DIR / f"{name}.json") for name in _SPLITS}, **counts)
    return sample_splits(published_splits(source.data_dir, progress), **counts)


def _pairs(config: Config, counts: dict[str, int]) -> PromptSets:
    from refusal_direction.prompts import pairs  # brings `datasets`, which text does not need

    source = config.prompts
    if source.harmful is not None and source.harmless is not None:
        return pairs.shuffled(pairs.read_folder(source.harmful), pairs.read_folder(source.harmless), **counts)
    if config.model.model_id == DEMO_MODEL:
        from refusal_direction.prompts.pairs import demo_pairs

        return pairs.shuffled(demo_pairs("harmful"), demo_pairs("harmless"), **counts)
    return pairs.shuffled(pairs.harmful_pairs(), pairs.harmless_pairs(seed=source.seed), **counts)
