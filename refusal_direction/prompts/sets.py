"""Prompts, and the four sets of them that the method needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from refusal_direction.errors import PromptError, TooFewPromptsError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Prompt", "PromptSets", "encodable", "sample_pools", "sample_splits"]

_SETS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val")


@dataclass(frozen=True)
class Prompt:
    """A request to the model."""

    id: str
    """Where it comes from: the file's stem and the place in it, as in "harmful_train/17"."""
    text: str
    image: Image | None = None
    """The image that goes with it, in RGB."""


@dataclass(frozen=True)
class PromptSets:
    """Harmful and harmless prompts, to compute the direction (train) and to score it (val).

    Any sequences of prompts will do; a string is a prompt of that text.

    Raises PromptError where there is something else in one.
    """

    harmful_train: tuple[Prompt, ...]
    harmless_train: tuple[Prompt, ...]
    harmful_val: tuple[Prompt, ...]
    harmless_val: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        for name in _SETS:
            object.__setattr__(self, name, tuple(_prompts(name, getattr(self, name))))

    @property
    def everything(self) -> tuple[Prompt, ...]:
        return self.harmful_train + self.harmless_train + self.harmful_val + self.harmless_val

    def indices(self) -> dict[str, list[int]]:
        """For each set, the places of its prompts in `everything`."""
        places: dict[str, list[int]] = {}
        begin = 0
        for name in _SETS:
            size = len(getattr(self, name))
            places[name] = list(range(begin, begin + size))
            begin += size
        return places


def encodable(text: str) -> bool:
    """Whether it is text: Python's strings, and JSON's escapes, can also spell half of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _prompts(name: str, given: Iterable[Prompt | str]) -> Iterator[Prompt]:
    if not isinstance(given, Iterable):
        raise PromptError(f"{name}: {given!r} is no sequence of prompts.")
    for place, one in enumerate([given] if isinstance(given, str) else given):
        if not isinstance(one, Prompt | str):
            raise PromptError(f"{name}: {one!r} is neither a string nor a Prompt.")
        if not encodable(one if isinstance(one, str) else one.text):
            raise PromptError(f"{name}: prompt {place} holds half of a surrogate pair, which no text does.")
        yield Prompt(f"{name}/{place}", one) if isinstance(one, str) else one


def _draw(rng: Random, pool: Sequence[Prompt], count: int, name: str, remedy: str) -> tuple[Prompt, ...]:
    if count < 1:
        raise TooFewPromptsError(f"{count} prompts of {name} were asked for. At least one is needed: {remedy}.")
    if len(pool) < count:
        raise TooFewPromptsError(
            f"{name} has {len(pool)} prompts, but {count} were asked for. Add prompts, or lower {remedy}."
        )
    return tuple(rng.sample(list(pool), count))


def sample_splits(splits: Mapping[str, Sequence[Prompt]], *, n_train: int, n_val: int, seed: int) -> PromptSets:
    """Draw from splits that are already apart. The order of the four draws is that of the published runs.

    Raises TooFewPromptsError where a split has fewer prompts than asked for.
    """
    rng = Random(seed)
    drawn = {}
    for part, count in (("train", n_train), ("val", n_val)):
        for name in (f"harmful_{part}", f"harmless_{part}"):
            drawn[name] = _draw(rng, splits[name], count, name, f"--n_{part}")
    return PromptSets(**drawn)


def sample_pools(
    harmful: Sequence[Prompt], harmless: Sequence[Prompt], *, n_train: int, n_val: int, seed: int
) -> PromptSets:
    """Draw train and validation prompts, without overlap, from one pool of each kind; repeated texts count once.

    Raises TooFewPromptsError where a pool has fewer prompts than n_train + n_val, PromptError where one is in both.
    """
    if common := {prompt.text for prompt in harmful} & {prompt.text for prompt in harmless}:
        some = next(prompt for prompt in harmful if prompt.text in common)
        raise PromptError(
            f"{len(common)} of the prompts are both harmful and harmless, {some.id} among them. Leave them out of one of the files."
        )
    rng = Random(seed)
    drawn = {}
    for name, pool in (("harmful", harmful), ("harmless", harmless)):
        distinct = list({prompt.text: prompt for prompt in pool}.values())
        file = f"the {name} prompt file" + (", counted without repetitions," if len(distinct) < len(pool) else "")
        both = _draw(rng, distinct, n_train + n_val, file, f"--n_train ({n_train}) or --n_val ({n_val})")
        drawn[f"{name}_train"], drawn[f"{name}_val"] = both[:n_train], both[n_train:]
    return PromptSets(**drawn)
