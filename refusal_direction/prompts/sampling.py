"""Drawing prompts. The order of the draws is that of the published runs; test prompts are drawn after them."""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)


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


def _draw_rest(rng: Random, pool: Sequence[Prompt], used: Container[object]) -> tuple[Prompt, ...]:
    """Each prompt of a pool whose content is not used, once, in random order."""
    left = list({prompt.content: prompt for prompt in pool if prompt.content not in used}.values())
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
    used = {prompt.content for prompts in drawn.values() for prompt in prompts}
    reserves: dict[PromptSet, tuple[Prompt, ...]] = {}
    for which in SETS_FOR_SELECTION:
        reserves[which] = _draw_rest(rng, splits[which], used)
        used |= {prompt.content for prompt in reserves[which]}
    return PromptSets.of(drawn, reserves)


def _check_kinds(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> None:
    """Raise PromptError if a prompt is in both pools."""
    others = {prompt.content for prompt in harmless}
    common = {prompt.content: prompt.id for prompt in harmful if prompt.content in others}
    if common:
        raise PromptError(
            f"{len(common)} of the prompts are both harmful and harmless, for example {next(iter(common.values()))}. Remove them "
            "from one of the two."
        )


def _distinct(pool: Sequence[Prompt], kind: Kind) -> list[Prompt]:
    """The pool with each prompt once; a warning counts the others."""
    distinct: dict[object, Prompt] = {}
    for prompt in pool:
        distinct.setdefault(prompt.content, prompt)
    if len(distinct) < len(pool):
        log.warning(
            "%d of %d %s prompts repeat others. Each counts once, which leaves %d.",
            len(pool) - len(distinct),
            len(pool),
            kind.value,
            len(distinct),
        )
    return list(distinct.values())


def sample_pools(harmful: Sequence[Prompt], harmless: Sequence[Prompt], sizes: SampleSizes) -> PromptSets:
    """Draw all splits, without overlap, from one pool of each kind; repeated prompts count once, with a warning.

    Raises TooFewPromptsError where a pool has fewer prompts than n_train + n_val, PromptError where a prompt is in both pools.
    """
    _check_kinds(harmful, harmless)
    rng = Random(sizes.seed)
    n_train, n_val = sizes.n_train, sizes.n_val
    drawn: dict[PromptSet, tuple[Prompt, ...]] = {}
    left: dict[Kind, list[Prompt]] = {}
    for kind, pool in ((Kind.HARMFUL, harmful), (Kind.HARMLESS, harmless)):
        distinct = _distinct(pool, kind)
        file = f"the {kind.value} prompt file" + (", counted without repetitions," if len(distinct) < len(pool) else "")
        both = _draw(rng, distinct, n_train + n_val, file, f"--n_train ({n_train}) or --n_val ({n_val})")
        drawn[kind, Split.TRAIN], drawn[kind, Split.VALIDATION] = both[:n_train], both[n_train:]
        contents = {prompt.content for prompt in both}
        left[kind] = [prompt for prompt in distinct if prompt.content not in contents]
    for kind in Kind:
        drawn[kind, Split.TEST] = _draw_test(rng, left[kind], sizes.n_test)
    reserves: dict[PromptSet, tuple[Prompt, ...]] = {}
    for kind in Kind:
        rest = _draw_rest(rng, left[kind], {prompt.content for prompt in drawn[kind, Split.TEST]})
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

    Repeated pairs count once, with a warning.

    Args:
        harmful: the pool of harmful pairs.
        harmless: the pool of harmless pairs.
        sizes: the number of pairs for each split.
        test: pools of their own for the test split; None takes it from what the others leave.

    Raises TooFewPromptsError where a pool has fewer pairs than n_train + n_val, PromptError where a pair is in both pools.
    """
    _check_kinds(harmful, harmless)
    rng = Random(sizes.seed)
    drawn: dict[PromptSet, Sequence[Prompt]] = {}
    reserves: dict[PromptSet, tuple[Prompt, ...]] = {}
    first, second = sizes.n_train, sizes.n_train + sizes.n_val
    for kind, given in ((Kind.HARMFUL, harmful), (Kind.HARMLESS, harmless)):
        pool = _distinct(given, kind)
        if len(pool) < second:
            repeated = f" (of {len(given)}; the others are equal to one of them)" if len(pool) < len(given) else ""
            raise TooFewPromptsError(
                f"There are {len(pool)} {kind.value} pairs{repeated}, but {sizes.n_train} + {sizes.n_val} were asked for. Lower "
                "--n_train or --n_val (VLM_N_TRAIN, VLM_N_VAL), or add pairs."
            )
        rng.shuffle(pool)
        drawn[kind, Split.TRAIN], drawn[kind, Split.VALIDATION] = pool[:first], pool[first:second]
        drawn[kind, Split.TEST] = pool[second : second + sizes.n_test]
        reserves |= _reserves(kind, pool[second + (sizes.n_test if test is None else 0) :], sizes)
    if test is not None:
        for kind in Kind:
            drawn[kind, Split.TEST] = _draw_test(rng, test[kind], sizes.n_test)
    return PromptSets.of(drawn, reserves)
