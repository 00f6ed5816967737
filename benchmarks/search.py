"""Exhaustive and pruned search against the naive way, one after the other in one run, on a trained model made wide.

    python benchmarks/search.py [--model demo] [--times 7] [--n_val 32] [--skip naive]
    python benchmarks/search.py --vlm --seeds 42 1 2 3 --skip exhaustive

Random weights have no structure to prune, so the model is the demo's (or any trained Gemma), the same function with a decoder
of 7 times as many channels, heads and hidden units (wide.py). Prompts are those of the demo; with --data_dir, the published
ones. All ways must select the same direction. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import vision
from apart import apart
from scoring import Naive
from torch import Tensor
from transformers import PreTrainedModel
from wide import widened

from refusal_direction import ChatModel, extract, load_chat_model
from refusal_direction.candidates import CandidateLabel
from refusal_direction.config import DEMO_MODEL, VISION_CONFIG, Config, ModelSource, PromptSource
from refusal_direction.models.loading import load
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.prompts import Kind, PromptSets, Split, gather
from refusal_direction.prompts.sets import SETS_FOR_SELECTION, PromptSet
from refusal_direction.results import RunResult
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.scores import CandidateScore
from refusal_direction.selection.conditions import Conditions
from refusal_direction.selection.decision import decide


@dataclass(frozen=True)
class VisionCase:
    """What the naive way for images with text is given."""

    model: PreTrainedModel
    harmful: vision.Prompts
    harmless: vision.Prompts
    n_train: int


@dataclass(frozen=True)
class Known:
    """What the naive way is told, so that it chooses among the same candidates on the same prompts."""

    kept: dict[PromptSet, tuple[int, ...]]
    """For each set, the prompts that the filter left."""
    tokens: RefusalTokens
    labels: tuple[CandidateLabel, ...]
    zero: list[bool]
    """Which candidates have length zero."""
    n_layers: int

    @classmethod
    def of(cls, found: RunResult) -> Known:
        kept = {which: found.prompts[which].kept for which in SETS_FOR_SELECTION}
        candidates = found.candidates
        return cls(kept, found.refusal_tokens, candidates.labels, candidates.zero.tolist(), found.model.n_layers)


@dataclass(frozen=True)
class Run:
    """What one way took, and found."""

    name: str
    seconds: float
    processor: float
    """Time that processors worked for it: the same on a busy machine, where the clock's is not."""
    selected: int
    account: str = ""
    known: Known | None = None


def measured(name: str, options: argparse.Namespace, known: Known | None) -> Run:
    """Run one way. Only the naive one is told something."""
    chat, sets, config = setting(options)
    begin, worked = time.perf_counter(), time.process_time()
    if known is None:
        found = extract(chat, replace(config, search=name), prompts=sets)
        selected, said, known = found.selection.index, account(found), Known.of(found)
    else:
        way = naive_vision if options.vlm else naive
        selected, said = way(chat, sets, config, known)[0], ""
    return Run(name, time.perf_counter() - begin, time.process_time() - worked, selected, said, known)


def show(run: Run) -> None:
    print(f"{run.name:10s} {run.seconds:7.1f} s, of processors {run.processor:7.1f} s   {run.account}", flush=True)


def loaded(options: argparse.Namespace) -> tuple[ChatModel, PromptSets, Config]:
    """The small model, before it is made wide."""
    sizes = PromptSource(n_train=options.n_train, n_val=options.n_val, n_test=0, seed=options.seed)
    if options.vlm:
        config = replace(VISION_CONFIG, model=ModelSource(DEMO_MODEL), prompts=sizes, batch_size=None, skip_filter=True)
        return load(config), gather(config), config
    source = sizes if options.data_dir is None else replace(sizes, data_dir=options.data_dir)
    config = Config(model=ModelSource(DEMO_MODEL if options.data_dir is None else options.model), prompts=source)
    return load_chat_model(options.model), gather(config), config


def setting(options: argparse.Namespace) -> tuple[ChatModel, PromptSets, Config]:
    small, sets, config = loaded(options)
    more = {"tower": 11, "words": 8} if options.vlm else {"words": 4}
    return replace(small, model=widened(small.model, times=options.times, **more)), sets, config


def describe(options: argparse.Namespace) -> str:
    """What the model is, and whether it says what the small one says."""
    (small, sets, _), (wide, _, _) = loaded(options), setting(options)
    before, after = (chat.complete(list(sets.harmful_val[:4]), 8) for chat in (small, wide))
    size = wide.model.num_parameters() / 1e6
    return f"{proportions(wide, sets)}\n{size:.0f}M parameters; completions unchanged: {before == after}"


def proportions(chat: ChatModel, sets: PromptSets) -> str:
    """What head and vision tower cost where they run on every token and image, relative to the decoder's layers."""

    def size(module: torch.nn.Module) -> int:
        return sum(weight.numel() for weight in module.parameters())

    inputs = [chat.inputs(prompt) for prompt in sets.for_selection]
    tokens = sum(one["input_ids"].shape[1] for one in inputs) / len(inputs)
    layers, head = size(chat.model.get_decoder().layers), size(chat.model.get_output_embeddings())
    said = f"{tokens:.0f} tokens a prompt; the head takes {head / layers:.0%} of the layers' work"
    tower = getattr(chat.model.base_model, "vision_tower", None)
    if tower is None:
        return said + " (Gemma 7B: 10%)"
    patches = chat.model.config.vision_config.image_size // chat.model.config.vision_config.patch_size
    share = size(tower) * patches**2 / (layers * tokens)
    return f"{said} (PaliGemma 2 3B: 29%), the vision tower {share:.0%} (20%)"


def naive(chat: ChatModel, sets: PromptSets, config: Config, known: Known) -> tuple[int, dict[str, Tensor]]:
    """The candidate that the published loop selects, on the prompts that the filter kept, and mean scores of all."""
    kept = PromptSets.of({which: [sets[which][index] for index in members] for which, members in known.kept.items()})
    scores = {name: values.mean(1) for name, values in Naive(chat, kept).run().items()}
    columns = zip(*(scores[name].tolist() for name in ("ablation", "steering", "kl")), strict=True)
    means = [CandidateScore(label, *values) for label, values in zip(known.labels, columns, strict=True)]
    conditions = Conditions.of(config, known.n_layers, 0.0)  # of text they do not depend on the baseline
    selected = decide(means, conditions, known.zero).selected
    assert selected is not None, "the naive way selects nothing, where the engine does"
    return selected, scores


def naive_vision(chat: ChatModel, sets: PromptSets, config: Config, known: Known) -> tuple[int, dict[str, Tensor]]:
    """Likewise for images with text: KL first, then the 15 candidates of lowest KL."""
    inputs = {which: [chat.inputs(prompt) for prompt in sets[which]] for which in known.kept}
    harmful, harmless = (inputs[kind, Split.TRAIN] + inputs[kind, Split.VALIDATION] for kind in Kind)
    case: Any = VisionCase(chat.model, harmful, harmless, len(sets.harmful_train))
    result = vision.Naive(case, known.tokens, config).run()
    return result["selected"], {name: result[name].mean(1) for name in ("ablation", "steering", "kl")}


def account(found: RunResult) -> str:
    """Prompt evaluations, and the layers that they go through: a steered row starts at its candidate's."""
    selection, n_layers = found.selection, found.model.n_layers
    steered = zip(found.candidates.layers, selection.measured[Measure.STEERING], strict=True)
    skipped = sum(layer * count for layer, count in steered)
    return json.dumps(
        {
            "prompt evaluations": selection.evaluations,
            "times layers": n_layers * selection.evaluations - skipped,
            "passes": selection.n_passes,
            "seconds": {stage: round(seconds, 1) for stage, seconds in found.seconds.items()},
        }
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--vlm", action="store_true", help="images with text: the vision-language demo, KL first")
    arguments.add_argument("--model", default=DEMO_MODEL, help="a trained Gemma")
    arguments.add_argument("--times", type=int, default=7, help="how many times as wide it is made")
    arguments.add_argument("--data_dir", type=Path, help="the published prompts; by default the demo's are used")
    arguments.add_argument("--n_train", type=int, default=128)
    arguments.add_argument("--n_val", type=int, default=32)
    arguments.add_argument(
        "--seeds", type=int, nargs="+", default=[42], help="of the draws of prompts, one after the other"
    )
    arguments.add_argument("--skip", nargs="*", default=(), choices=("naive", "exhaustive"))
    options = arguments.parse_args()
    print(apart(describe, with_seed(options, options.seeds[0])), flush=True)
    draws = [compared(with_seed(options, seed)) for seed in options.seeds]
    for name in draws[0] if len(draws) > 1 else ():
        ratios = [draw[name] for draw in draws]
        print(
            f"ratio {name} / pruned, {len(draws)} draws: {min(ratios):.1f} to {max(ratios):.1f}, mean {geometric_mean(ratios):.1f}"
        )


def with_seed(options: argparse.Namespace, seed: int) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "seed": seed})


def compared(options: argparse.Namespace) -> dict[str, float]:
    """Run each way on one draw of prompts; how many times as long as pruned search the others take."""
    exhaustive = (VISION_CONFIG if options.vlm else Config()).rules.searches[0]
    ways = [exhaustive] * ("exhaustive" not in options.skip) + ["naive"] * ("naive" not in options.skip)
    pruned = apart(measured, "pruned", options, None)
    show(pruned)
    ratios = {}
    for name in ways:
        run = apart(measured, name, options, pruned.known if name == "naive" else None)
        show(run)
        ratios[name] = run.seconds / pruned.seconds
        print(
            f"ratio {name} / pruned: {ratios[name]:.1f}   by processor time: {run.processor / pruned.processor:.1f}   "
            f"same selection: {run.selected == pruned.selected}",
            flush=True,
        )
    return ratios


if __name__ == "__main__":
    main()
