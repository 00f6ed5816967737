"""Prompts: their sources, the sets by kind and split, and the draws."""

from __future__ import annotations

from refusal_direction import demo
from refusal_direction.config import DEMO_MODEL, Config, PromptSource
from refusal_direction.errors import ConfigurationError
from refusal_direction.prompts.files import read_prompts
from refusal_direction.prompts.published import published_splits
from refusal_direction.prompts.sampling import SampleSizes, sample_pairs, sample_pools, sample_splits
from refusal_direction.prompts.sets import SETS, Kind, Prompt, PromptSets, Split, set_name

__all__ = ["Kind", "Prompt", "PromptSets", "Split", "gather", "read_prompts"]


def gather(config: Config, *, progress: bool = False) -> PromptSets:
    """Draw the prompts of a run: from files if given, from the demo's prompts for the demo model, else from the published ones.

    Raises PromptError (a malformed file, a failed download, too few prompts), ConfigurationError.
    """
    source = config.prompts
    if (source.harmful is None) != (source.harmless is None):
        raise ConfigurationError("--harmful and --harmless go together: give both, or neither.")
    sizes = SampleSizes(source.n_train, source.n_val, source.n_test, source.seed)
    is_demo = config.model.model_id == DEMO_MODEL
    return _pairs(source, sizes, is_demo) if config.rules.images else _texts(source, sizes, is_demo, progress)


def _texts(source: PromptSource, sizes: SampleSizes, is_demo: bool, progress: bool) -> PromptSets:
    if source.harmful is not None and source.harmless is not None:
        return sample_pools(read_prompts(source.harmful), read_prompts(source.harmless), sizes)
    if is_demo:
        files = {which: demo.PROMPTS_DIR / f"{set_name(which)}.json" for which in SETS}
        return sample_splits({which: read_prompts(path) for which, path in files.items()}, sizes)
    return sample_splits(published_splits(source.data_dir, progress, test=sizes.n_test > 0), sizes)


def _pairs(source: PromptSource, sizes: SampleSizes, is_demo: bool) -> PromptSets:
    from refusal_direction.prompts import pairs  # imports `datasets`, which text does not need

    if source.harmful is not None and source.harmless is not None:
        return sample_pairs(pairs.read_folder(source.harmful), pairs.read_folder(source.harmless), sizes)
    if is_demo:
        test = {kind: pairs.demo_test_pairs(kind.value) for kind in Kind}
        return sample_pairs(pairs.demo_pairs("harmful"), pairs.demo_pairs("harmless"), sizes, test=test)
    return sample_pairs(pairs.harmful_pairs(), pairs.harmless_pairs(seed=source.seed), sizes)
