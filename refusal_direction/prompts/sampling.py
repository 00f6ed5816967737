"""Drawing prompts. The order of the draws is that of the published runs; test prompts are drawn after them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from refusal_direction.errors import PromptError, TooFewPromptsError
from refusal_direction.prompts.sets import (
    SETS,
    SETS_FOR_SELECTION,
    Kind,
    Prompt,
    PromptSet,
    PromptSets,
    Split,
    set_name,
)

__all__ = ["SampleSizes", "sample_pairs", "sample_pools", "sample_splits"]


@dataclass(frozen=True)
class SampleSizes:
    """The number of prompts of each kind to draw for each split, and the seed.

    The test split takes what a pool has left, up to `n_test`.
    """

    n_train: int
    n_val: int
    n_test: int = 0
    seed: int = 42

    def of(self, split: Split) -> int:
        """The number of prompts of each kind asked for."""
        return {Split.TRAIN: self.n_train, Split.VALIDATION: self.n_val, Split.TEST: self.n_test}[split]


def _draw(rng: Random, pool: Sequence[Prompt], count: int, name: str, remedy: str) -> tuple[Prompt, ...]:
    if count < 1:
        raise TooFewPromptsError(f"{count} prompts of {name} were asked for. At least one is needed: {remedy}.")
    if len(pool) < count:
        raise TooFewPromptsError(
            f"{name} has {len(pool)} prompts, but {count} were asked for. Add prompts, or lower {remedy}."
        )
    return tuple(rng.sample(list(pool), count))


def _draw_test(rng: Random, pool: Sequence[Prompt], count: int) -> tuple[Prompt, ...]:
    return tuple(rng.sample(list(pool), min(count, len(pool))))


def _draw_rest(rng: Random, pool: Sequence[Prompt], used: Container[str]) -> tuple[Prompt, ...]:
    """Each text of a pool that is not used, once, in random order."""
    left = list({prompt.text: prompt for prompt in pool if prompt.text not in used}.values())
    return tuple(rng.sample(left, len(left)))


def _reserves(kind: Kind, rest: Sequence[Prompt], sizes: SampleSizes) -> dict[PromptSet, tuple[Prompt, ...]]:
    """The rest of a pool as reserves for train and validation, in the proportion of their sizes."""
    cut = round(len(rest) * sizes.n_train / (sizes.n_train + sizes.n_val))
    return {(kind, Split.TRAIN): tuple(rest[:cut]), (kind, Split.VALIDATION): tuple(rest[cut:])}


def sample_splits(splits: Mapping[PromptSet, Sequence[Prompt]], sizes: SampleSizes) -> PromptSets:
    """Draw from pools that are split already: one for each kind and split; those of the test split may be missing.

    Raises TooFewPromptsError where a train or validation pool has fewer prompts than asked for.
    """
    rng = Random(sizes.seed)
    drawn: dict[PromptSet, tuple[Prompt, ...]] = {}
    for which in SETS:
        split = which[1]
        if split is Split.TEST:
            drawn[which] = _draw_test(rng, splits.get(which, ()), sizes.n_test)
        else:
            drawn[which] = _draw(rng, splits[which], sizes.of(split), set_name(which), f"--n_{split.value}")
    used = {prompt.text for prompts in drawn.values() for prompt in prompts}
    reserves: dict[PromptSet, tuple[Prompt, ...]] = {}
    for which in SETS_FOR_SELECTION:
        reserves[which] = _draw_rest(rng, splits[which], used)
        used |= {prompt.text for prompt in reserves[which]}
    return PromptSets.of(drawn, reserves)


def sample_pools(harmful: Sequence[Prompt], harmless: Sequence[Prompt], sizes: SampleSizes) -> PromptSets:
    """Draw all splits, without overlap, from one pool of each kind; repeated texts count once.

    Raises TooFewPromptsError where a pool has fewer prompts than n_train + n_val, PromptError where a text is in both pools.
    """
    if common := {prompt.text for prompt in harmful} & {prompt.text for prompt in harmless}:
        example = next(prompt for prompt in harmful if prompt.text in common)
        raise PromptError(
            f"{len(common)} of the prompts are both harmful and harmless, for example {example.id}. Remove them from one of "
            "the files."
        )
    rng = Random(sizes.seed)
    n_train, n_val = sizes.n_train, sizes.n_val
    drawn: dict[PromptSet, tuple[Prompt, ...]] = {}
    left: dict[Kind, list[Prompt]] = {}
    for kind, pool in ((Kind.HARMFUL, harmful), (Kind.HARMLESS, harmless)):
        distinct = list({prompt.text: prompt for prompt in pool}.values())
        file = f"the {kind.value} prompt file" + (", counted without repetitions," if len(distinct) < len(pool) else "")
        both = _draw(rng, distinct, n_train + n_val, file, f"--n_train ({n_train}) or --n_val ({n_val})")
        drawn[kind, Split.TRAIN], drawn[kind, Split.VALIDATION] = both[:n_train], both[n_train:]
        texts = {prompt.text for prompt in both}
        left[kind] = [prompt for prompt in distinct if prompt.text not in texts]
    for kind in Kind:
        drawn[kind, Split.TEST] = _draw_test(rng, left[kind], sizes.n_test)
    reserves: dict[PromptSet, tuple[Prompt, ...]] = {}
    for kind in Kind:
        rest = _draw_rest(rng, left[kind], {prompt.text for prompt in drawn[kind, Split.TEST]})
        reserves |= _reserves(kind, rest, sizes)
    return PromptSets.of(drawn, reserves)


def sample_pairs(
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    sizes: SampleSizes,
    *,
    test: Mapping[Kind, Sequence[Prompt]] | None = None,
) -> PromptSets:
    """Shuffle each pool of image-question pairs with one generator, harmful first; the splits are taken from its head in turn.

    Args:
        harmful: the pool of harmful pairs.
        harmless: the pool of harmless pairs.
        sizes: the number of pairs for each split.
        test: pools of their own for the test split; None takes it from what the others leave.

    Raises TooFewPromptsError where a pool has fewer pairs than n_train + n_val.
    """
    rng = Random(sizes.seed)
    drawn: dict[PromptSet, Sequence[Prompt]] = {}
    reserves: dict[PromptSet, tuple[Prompt, ...]] = {}
    first, second = sizes.n_train, sizes.n_train + sizes.n_val
    for kind, given in ((Kind.HARMFUL, harmful), (Kind.HARMLESS, harmless)):
        pool = list(given)
        if len(pool) < second:
            raise TooFewPromptsError(
                f"There are {len(pool)} {kind.value} pairs, but {sizes.n_train} + {sizes.n_val} were asked for. Lower --n_train "
                "or --n_val (VLM_N_TRAIN, VLM_N_VAL), or add pairs."
            )
        rng.shuffle(pool)
        drawn[kind, Split.TRAIN], drawn[kind, Split.VALIDATION] = pool[:first], pool[first:second]
        drawn[kind, Split.TEST] = pool[second : second + sizes.n_test]
        reserves |= _reserves(kind, pool[second + (sizes.n_test if test is None else 0) :], sizes)
    if test is not None:
        for kind in Kind:
            drawn[kind, Split.TEST] = _draw_test(rng, test[kind], sizes.n_test)
    return PromptSets.of(drawn, reserves)
