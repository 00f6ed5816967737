"""Exhaustive and pruned search against the naive way, side by side in one process, on a trained model made wide.

    python benchmarks/search.py [--model demo] [--times 7] [--n_val 32] [--skip naive]
    python benchmarks/search.py --vlm

Random weights have no structure to prune, so the model is the demo's (or any trained Gemma), the same function with a decoder
of 7 times as many channels, heads and hidden units (wide.py). Prompts are those of the demo; with --data_dir, the published
ones. All ways must select the same direction.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import vision
from scoring import Naive
from torch import Tensor
from transformers import PreTrainedModel
from wide import widened

from refusal_direction import ChatModel, extract, load_chat_model
from refusal_direction.config import DEMO_MODEL, VISION_CONFIG, Config, ModelSource, PromptSource
from refusal_direction.models.loading import load
from refusal_direction.pipeline import Extraction
from refusal_direction.prompts import PromptSets, gather
from refusal_direction.scoring import Measure
from refusal_direction.selection import CandidateScore, select


@dataclass(frozen=True)
class VisionCase:
    """What the naive way for images with text is given."""

    model: PreTrainedModel
    harmful: vision.Prompts
    harmless: vision.Prompts
    n_train: int


@dataclass
class Run:
    """What one way took."""

    name: str
    seconds: float
    processor: float
    """Time that processors worked for it: the same on a busy machine, where the clock's is not."""
    selected: int = -1


@contextmanager
def timed(name: str, runs: list[Run]) -> Iterator[None]:
    begin, worked = time.perf_counter(), time.process_time()
    yield
    runs.append(Run(name, time.perf_counter() - begin, time.process_time() - worked))


def show(run: Run, account: str = "") -> None:
    print(f"{run.name:10s} {run.seconds:7.1f} s, of processors {run.processor:7.1f} s   {account}", flush=True)


def setting(options: argparse.Namespace) -> tuple[ChatModel, PromptSets, Config]:
    sizes = PromptSource(n_train=options.n_train, n_val=options.n_val)
    if options.vlm:
        config = replace(VISION_CONFIG, model=ModelSource(DEMO_MODEL), prompts=sizes, batch_size=None, skip_filter=True)
        chat = load(config)
    else:
        source = sizes if options.data_dir is None else replace(sizes, data_dir=options.data_dir)
        config = Config(model=ModelSource(DEMO_MODEL if options.data_dir is None else options.model), prompts=source)
        chat = load_chat_model(options.model)
    sets = gather(config)
    more = {"tower": 11, "words": 8} if options.vlm else {"words": 4}
    wide = replace(chat, model=widened(chat.model, times=options.times, **more))
    print(proportions(wide, sets), flush=True)
    before, after = (one.complete(list(sets.harmful_val[:4]), 8) for one in (chat, wide))
    print(f"{wide.model.num_parameters() / 1e6:.0f}M parameters; completions unchanged: {before == after}", flush=True)
    return wide, sets, config


def proportions(chat: ChatModel, sets: PromptSets) -> str:
    """What head and vision tower cost where they run on every token and image, relative to the decoder's layers."""

    def size(module: torch.nn.Module) -> int:
        return sum(weight.numel() for weight in module.parameters())

    inputs = [chat.inputs(prompt) for prompt in sets.everything]
    tokens = sum(one["input_ids"].shape[1] for one in inputs) / len(inputs)
    layers, head = size(chat.model.get_decoder().layers), size(chat.model.get_output_embeddings())
    said = f"{tokens:.0f} tokens a prompt; the head takes {head / layers:.0%} of the layers' work"
    tower = getattr(chat.model.base_model, "vision_tower", None)
    if tower is None:
        return said + " (Gemma 7B: 10%)"
    patches = chat.model.config.vision_config.image_size // chat.model.config.vision_config.patch_size
    share = size(tower) * patches**2 / (layers * tokens)
    return f"{said} (PaliGemma 2 3B: 29%), the vision tower {share:.0%} (20%)"


def naive(found: Extraction) -> tuple[int, dict[str, Tensor]]:
    """The candidate that the published loop selects, on the prompts that the filter kept, and mean scores of all."""
    chat, everything = found.chat, found.prompts.everything
    sets = PromptSets(**{name: tuple(everything[place] for place in members) for name, members in found.kept.items()})
    scores = {name: values.mean(1) for name, values in Naive(chat, sets).run().items()}
    n_layers = found.candidates.shape[1]
    columns = zip(*(scores[name].tolist() for name in ("ablation", "steering", "kl")), strict=True)
    means = [CandidateScore(0, index % n_layers, *values) for index, values in enumerate(columns)]
    null = [index for index, vector in enumerate(found.candidates.flatten(0, 1)) if vector.norm() <= 1e-12]
    return select(means, n_layers, found.config.thresholds, null).index, scores


def naive_vision(found: Extraction) -> tuple[int, dict[str, Tensor]]:
    """Likewise for images with text: KL first, 15 survivors."""
    inputs = {name: [found.chat.inputs(prompt) for prompt in getattr(found.prompts, name)] for name in found.kept}
    harmful, harmless = (inputs[f"{kind}_train"] + inputs[f"{kind}_val"] for kind in ("harmful", "harmless"))
    case: Any = VisionCase(found.chat.model, harmful, harmless, len(found.prompts.harmful_train))
    result = vision.Naive(case, found.tokens, found.config.thresholds).run()
    return result["selected"], {name: result[name].mean(1) for name in ("ablation", "steering", "kl")}


def account(found: Extraction) -> str:
    """Prompt evaluations, and the layers that they go through: a steered row starts at its candidate's."""
    choice, n_layers = found.choice, found.candidates.shape[1]
    steered = choice.measured[Measure.STEERING]
    skipped = int((torch.arange(len(steered)) % n_layers * steered).sum())
    return json.dumps(
        {
            "prompt evaluations": choice.evaluations,
            "times layers": n_layers * choice.evaluations - skipped,
            "sweeps": choice.sweeps,
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
    arguments.add_argument("--skip", nargs="*", default=(), choices=("naive", "exhaustive"))
    options = arguments.parse_args()
    chat, sets, config = setting(options)
    runs: list[Run] = []
    found: Extraction | None = None
    for search in ("pruned", config.rules.searches[0])[: 1 if "exhaustive" in options.skip else 2]:
        with timed(search, runs):
            found = extract(chat, replace(config, search=search), prompts=sets)
        runs[-1].selected = found.selection.index
        show(runs[-1], account(found))
    if "naive" not in options.skip and found is not None:
        with timed("naive", runs):
            selected, _ = (naive_vision if options.vlm else naive)(found)
        runs[-1].selected = selected
        show(runs[-1])
    print(f"same selection: {len({run.selected for run in runs}) == 1}")
    for run in runs[1:]:
        clock, processor = run.seconds / runs[0].seconds, run.processor / runs[0].processor
        print(f"ratio {run.name} / pruned: {clock:.1f}   by processor time: {processor:.1f}")


if __name__ == "__main__":
    main()
