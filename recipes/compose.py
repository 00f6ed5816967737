"""Composes the text demo's prompt files from the vocabulary: `python -m recipes.compose`.

The files in `refusal_direction/demo/prompts` ship with the package; another run writes the same bytes. Each core is in
one split only. The words of a held-out core also occur in train cores, in *other* combinations: the test is whether the
model understands a new combination of words, not a word that it has never seen.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.vocabulary import FRAMES, KINDS, Core, content_words, fill, jaccard, load_cores, word_sets
from refusal_direction.demo import PROMPTS_DIR

__all__ = ["SplitSizes", "compose", "split_cores", "write_prompts"]

MAX_JACCARD = 0.6  # prompts of different splits share a smaller part of their words


@dataclass(frozen=True)
class SplitSizes:
    """Numbers of held-out cores of each kind; the rest are for training."""

    held_out: dict[str, dict[str, int]] = field(
        default_factory=lambda: {"harmful": {"val": 60, "test": 60}, "harmless": {"val": 80, "test": 100}}
    )
    min_train_uses: int = 2  # times that train cores of the same kind use each content word of a held-out core
    seed: int = 20261124


def _can_be_held_out(core: Core, uses: Counter[str], cores: Iterable[Core], minimum: int) -> bool:
    """Whether a core can be held out: train cores still use its words often enough, and no other core resembles it."""
    words = content_words(core.text)
    if any(uses[word] <= minimum for word in words):
        return False
    return all(other is core or jaccard(words, content_words(other.text)) < MAX_JACCARD for other in cores)


def split_cores(sizes: SplitSizes) -> dict[str, dict[str, list[Core]]]:
    """kind -> split -> cores. No core of either kind has a near-duplicate in another split."""
    rng = random.Random(sizes.seed)
    splits: dict[str, dict[str, list[Core]]] = {k: {"train": load_cores(k), "val": [], "test": []} for k in KINDS}
    for kind in KINDS:
        train = splits[kind]["train"]
        uses = Counter(word for core in train for word in content_words(core.text))
        queue = [split for split, count in sizes.held_out[kind].items() for _ in range(count)]
        rng.shuffle(queue)
        for core in rng.sample(train, len(train)):
            all_cores = [other for groups in splits.values() for cores in groups.values() for other in cores]
            if queue and _can_be_held_out(core, uses, all_cores, sizes.min_train_uses):
                train.remove(core)
                uses.subtract(content_words(core.text))
                splits[kind][queue.pop()].append(core)
    return splits


def _choose_sentence(core: Core, others: Sequence[tuple[frozenset[str], ...]], rng: random.Random) -> str:
    """The core in a random frame that does not make it a near-duplicate of a prompt in another split."""
    for frame in rng.sample(FRAMES, len(FRAMES)):
        sentence = fill(frame, core)
        mine = word_sets(sentence)
        if all(jaccard(*pair) < MAX_JACCARD for other in others for pair in zip(mine, other, strict=True)):
            return sentence
    raise ValueError(f"every frame makes {core.text!r} a near-duplicate of a prompt in another split")


def compose(sizes: SplitSizes | None = None) -> dict[tuple[str, str], list[dict[str, str]]]:
    """(kind, split) -> prompts in shuffled order, each `{"instruction": ..., "category": ...}`."""
    sizes = sizes or SplitSizes()
    rng = random.Random(sizes.seed + 1)
    placed: dict[str, list[tuple[frozenset[str], ...]]] = {"train": [], "val": [], "test": []}
    files = {}
    for kind, groups in split_cores(sizes).items():
        for split, cores in groups.items():
            prompts = []
            for core in rng.sample(cores, len(cores)):
                others = [words for other, sets in placed.items() if other != split for words in sets]
                sentence = _choose_sentence(core, others, rng)
                placed[split].append(word_sets(sentence))
                prompts.append({"instruction": sentence, "category": core.category})
            files[kind, split] = prompts
    return files


def write_prompts(folder: Path = PROMPTS_DIR) -> list[Path]:
    """Write `{kind}_{split}.json` for every kind and split, one prompt a line, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (kind, split), prompts in compose().items():
        paths.append(folder / f"{kind}_{split}.json")
        lines = ",\n".join("  " + json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
        paths[-1].write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return paths


if __name__ == "__main__":
    write_prompts()
