"""Prompts, and the sets that the method needs: one for each kind and split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from hashlib import sha256
from itertools import product
from typing import TYPE_CHECKING

from refusal_direction.errors import PromptError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SETS", "SETS_FOR_SELECTION", "Kind", "Prompt", "PromptSet", "PromptSets", "Split", "encodable", "set_name"]


class Kind(Enum):
    """The two kinds of prompts."""

    HARMFUL = "harmful"
    HARMLESS = "harmless"


class Split(Enum):
    """Prompts by use."""

    TRAIN = "train"
    """For the directions."""
    VALIDATION = "val"
    """For the scores by which one of them is selected."""
    TEST = "test"
    """For nothing but the final measurement."""


PromptSet = tuple[Kind, Split]
"""The key of a set of prompts."""

SETS: tuple[PromptSet, ...] = tuple((kind, split) for split, kind in product(Split, Kind))
"""All sets, in the order in which they are drawn."""
SETS_FOR_SELECTION: tuple[PromptSet, ...] = tuple((kind, split) for kind, split in SETS if split is not Split.TEST)
"""The sets that directions are made from and selected by."""


def set_name(which: PromptSet) -> str:
    """The name of a set in files and messages, for instance "harmful_train"."""
    kind, split = which
    return f"{kind.value}_{split.value}"


@dataclass(frozen=True)
class Prompt:
    """A request to the model."""

    id: str
    """Its source: the stem of a file and the index in it, for instance "harmful_train/17"."""
    text: str
    image: Image | None = None
    """The image that goes with the text, in RGB."""

    @cached_property
    def content(self) -> tuple[str, bytes | None]:
        """The text without white space around it, and a digest of the image: equal for prompts that ask the same."""
        image = None if self.image is None else sha256(f"{self.image.size}".encode() + self.image.tobytes()).digest()
        return self.text.strip(), image


@dataclass(frozen=True)
class PromptSets:
    """Harmful and harmless prompts: to compute the direction (train), to select it (val), and to test it.

    Each set is any sequence of prompts; a string counts as a prompt with that text. The test sets may be empty.

    Raises PromptError where a set holds anything else, or two sets hold the same prompt.
    """

    harmful_train: tuple[Prompt, ...]
    harmless_train: tuple[Prompt, ...]
    harmful_val: tuple[Prompt, ...]
    harmless_val: tuple[Prompt, ...]
    harmful_test: tuple[Prompt, ...] = ()
    harmless_test: tuple[Prompt, ...] = ()
    reserves: Mapping[PromptSet, tuple[Prompt, ...]] = field(default_factory=dict, repr=False, compare=False)
    """Further prompts of train and validation sets, in the order in which they are drawn if too few pass the filter."""

    def __post_init__(self) -> None:
        for name in map(set_name, SETS):
            object.__setattr__(self, name, tuple(_prompts(name, getattr(self, name))))
        _check_disjoint({set_name(which): self[which] for which in SETS})

    @classmethod
    def of(
        cls, sets: Mapping[PromptSet, Iterable[Prompt]], reserves: Mapping[PromptSet, tuple[Prompt, ...]] | None = None
    ) -> PromptSets:
        """The sets by their keys; those that are absent are empty."""
        named = {set_name(which): tuple(sets.get(which, ())) for which in SETS}
        return cls(**named, reserves=reserves or {})

    def __getitem__(self, which: PromptSet) -> tuple[Prompt, ...]:
        return tuple(getattr(self, set_name(which)))

    def reserved(self, counts: Mapping[PromptSet, int]) -> PromptSets:
        """The first prompts of each reserve, this many."""
        return PromptSets.of({which: self.reserves.get(which, ())[:count] for which, count in counts.items()})

    def extended(self, counts: Mapping[PromptSet, int]) -> PromptSets:
        """The sets with the first prompts of their reserves, this many, after their own."""
        further = self.reserved(counts)
        left = {which: members[counts.get(which, 0) :] for which, members in self.reserves.items()}
        return PromptSets.of({which: (*self[which], *further[which]) for which in SETS}, left)

    @property
    def for_selection(self) -> tuple[Prompt, ...]:
        """The train and validation prompts, set after set."""
        return tuple(prompt for which in SETS_FOR_SELECTION for prompt in self[which])

    def indices(self) -> dict[PromptSet, list[int]]:
        """For each train and validation set, the indices of its prompts in `for_selection`."""
        indices: dict[PromptSet, list[int]] = {}
        begin = 0
        for which in SETS_FOR_SELECTION:
            indices[which] = list(range(begin, begin + len(self[which])))
            begin += len(self[which])
        return indices

    def digest(self, which: PromptSet) -> str:
        """SHA-256 of the texts of a set and then of its images."""
        content = sha256("\0".join(prompt.text for prompt in self[which]).encode())
        for prompt in self[which]:
            if prompt.image is not None:
                content.update(f"{prompt.image.size}".encode() + prompt.image.tobytes())
        return content.hexdigest()


def encodable(text: str) -> bool:
    """Whether a string can be encoded: Python strings and JSON escapes can also hold half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _prompts(name: str, given: Iterable[Prompt | str]) -> Iterator[Prompt]:
    if not isinstance(given, Iterable) or isinstance(given, Mapping | Set):
        raise PromptError(f"{name}: a {type(given).__name__} is not a sequence of prompts. Give a list.")
    for index, one in enumerate([given] if isinstance(given, str) else given):
        if not isinstance(one, Prompt | str):
            raise PromptError(f"{name}: {one!r} is neither a string nor a Prompt.")
        prompt = Prompt(f"{name}/{index}", one) if isinstance(one, str) else one
        if problem := _problem(prompt):
            raise PromptError(f"{name}: prompt {index} {problem}")
        yield prompt


def _problem(prompt: Prompt) -> str | None:
    """Why a prompt cannot be used, or None."""
    for part, text in (("id", prompt.id), ("text", prompt.text)):
        if not isinstance(text, str):
            return f"has the {part} {text!r}. Give a string."
        if not encodable(text):
            return "holds half of a surrogate pair, which cannot be encoded as text."
    if not prompt.text.strip():
        return "is empty. Leave it out."
    if prompt.image is not None and not hasattr(prompt.image, "tobytes"):
        return f"has a {type(prompt.image).__name__} for its image. Open it with Pillow: PIL.Image.open(...)."
    return None


def _check_disjoint(sets: Mapping[str, Iterable[Prompt]]) -> None:
    """Raise PromptError if a prompt is in two sets: it would be measured by a direction that was made from it."""
    found: dict[object, tuple[str, Prompt]] = {}
    shared: dict[object, str] = {}
    for name, prompts in sets.items():
        for prompt in prompts:
            other, first = found.setdefault(prompt.content, (name, prompt))
            if other != name:
                shared.setdefault(prompt.content, f"{first.id!r} of {other} is {prompt.id!r} of {name}")
    if shared:
        count = f"{len(shared)} prompts are in two sets" if len(shared) > 1 else "A prompt is in two sets"
        raise PromptError(f"{count}: {next(iter(shared.values()))}. Leave each in one of them.")
