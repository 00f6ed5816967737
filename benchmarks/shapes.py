"""The naive way, exhaustive and pruned search in one run on random weights of a real model's shape, built where it computes.

    python benchmarks/shapes.py gemma-7b [--data_dir data]
    python benchmarks/shapes.py paligemma2-3b
    python benchmarks/shapes.py gemma-7b --narrower 16 --layers 4 --n_train 8 --n_val 4 --dtype float32     # on a laptop

Seconds, peak memory on the device, and the share of the device's own rate of matrix products. Gemma 7B has 140 candidates here
(5 positions, 28 layers), PaliGemma 2 3B has 78 and 1024 image tokens. Random weights refuse nothing, so no candidate is held
to a threshold; and they have no structure to prune, so see search.py for what pruning spares.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scoring import matrix_rates, products, prompt_sets, tokenizer_for
from search import Known, naive, naive_vision
from torch import Tensor
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GemmaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from refusal_direction import ChatModel, extract, load_vision_model
from refusal_direction.config import DEMO_MODEL, VISION_CONFIG, Config, ModelSource, PromptSource, Thresholds
from refusal_direction.pipeline import Extraction
from refusal_direction.prompts import PromptSets, gather
from refusal_direction.scoring import Measure

NO_THRESHOLDS = Thresholds(kl=1e9, induce=-1e9)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """How large a model is, and how to make one of random weights."""

    layers: int
    config: Callable[[int, int], Any]
    """Given how many layers, and how many times narrower than the real one."""
    model: Callable[[Any], PreTrainedModel]


def gemma_7b(layers: int, narrower: int) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=256_000,
        hidden_size=3072 // narrower,
        intermediate_size=24_576 // narrower,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256 // narrower,
    )


def paligemma2_3b(layers: int, narrower: int) -> PaliGemmaConfig:
    tower = SiglipVisionConfig(
        hidden_size=1152 // narrower,
        intermediate_size=4304 // narrower,
        num_hidden_layers=min(27, layers + 1),
        num_attention_heads=4 if narrower > 1 else 16,
        image_size=448,
        patch_size=14,
        projection_dim=2304 // narrower,
    )
    text = Gemma2Config(
        vocab_size=257_216,
        hidden_size=2304 // narrower,
        intermediate_size=9216 // narrower,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256 // narrower,
        query_pre_attn_scalar=256 // narrower,
    )
    tokens: Any = load_vision_model(DEMO_MODEL).model.config
    return PaliGemmaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokens.image_token_index,
        projection_dim=2304 // narrower,
    )


SHAPES = {
    "gemma-7b": Shape(28, gemma_7b, GemmaForCausalLM._from_config),
    "paligemma2-3b": Shape(26, paligemma2_3b, PaliGemmaForConditionalGeneration._from_config),
}


def built(options: argparse.Namespace) -> PreTrainedModel:
    """Built on the device, so that a machine's own memory need not hold it."""
    shape = SHAPES[options.shape]
    torch.manual_seed(0)
    config = shape.config(options.layers or shape.layers, options.narrower)
    with torch.device(options.device):
        return shape.model(config, dtype=DTYPES[options.dtype]).eval()  # type: ignore[call-arg]


def setting(options: argparse.Namespace) -> tuple[ChatModel, PromptSets, Config]:
    model, sizes = built(options), PromptSource(n_train=options.n_train, n_val=options.n_val)
    common = {"prompts": sizes, "skip_filter": True, "thresholds": NO_THRESHOLDS, "batch_size": None}
    if options.shape == "gemma-7b":
        chat = ChatModel(model, tokenizer_for(options.data_dir), options.shape)
        return chat, prompt_sets(options), Config(**common)
    demo = load_vision_model(DEMO_MODEL)
    images, side = demo.processor.image_processor, model.config.vision_config.image_size
    images.size = {"height": side, "width": side}
    demo.processor.image_seq_length = images.image_seq_length = (side // model.config.vision_config.patch_size) ** 2
    config = replace(VISION_CONFIG, model=ModelSource(DEMO_MODEL), **common)
    return replace(demo, model=model), gather(config), config


@dataclass(frozen=True)
class Result:
    """What one way gave and took."""

    name: str
    seconds: float
    flops: float
    memory: int
    selected: int
    scores: dict[str, Tensor]


def measured(name: str, chat: ChatModel, way: Callable[[], tuple[int, dict[str, Tensor]]]) -> Result:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with products(chat.model) as flops:
        selected, scores = way()
    seconds = time.perf_counter() - begin
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Result(name, seconds, float(sum(flops)), memory, selected, scores)


def show(result: Result, rate: float) -> None:
    reached = result.flops / result.seconds
    memory = f"peak {result.memory / 2**30:5.1f} GiB   " if result.memory else ""
    print(
        f"{result.name:10s} {result.seconds:8.1f} s   {memory}{result.flops / 1e12:8.1f} TFLOP: {reached / 1e12:6.2f} TFLOP/s, "
        f"{reached / rate:.0%} of a plain product   selects {result.selected}",
        flush=True,
    )


def scores_of(found: Extraction) -> dict[str, Tensor]:
    return {measure.value: found.scores.of(measure).mean(1) for measure in Measure}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """The largest of any candidate that both have scored."""
    return {name: float((one[name] - other[name]).abs().nan_to_num().max()) for name in one}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments.add_argument("--data_dir", type=Path, default=Path("data"))
    arguments.add_argument("--layers", type=int, help="as many as the real one by default")
    arguments.add_argument("--narrower", type=int, default=1, help="how many times narrower than the real one")
    arguments.add_argument("--n_train", type=int, default=128)
    arguments.add_argument("--n_val", type=int, default=32)
    arguments.add_argument("--skip", nargs="*", default=(), choices=("naive", "pruned"))
    options = arguments.parse_args()
    like = torch.empty(0, dtype=DTYPES[options.dtype], device=options.device)
    rate = max(matrix_rates(5.0, 8192 if like.is_cuda else 2048, like))
    chat, sets, config = setting(options)
    results: list[Result] = []
    found: Extraction | None = None

    def ours(search: str) -> Callable[[], tuple[int, dict[str, Tensor]]]:
        def way() -> tuple[int, dict[str, Tensor]]:
            nonlocal found
            found = extract(chat, replace(config, search=search), prompts=sets)
            return found.selection.index, scores_of(found)

        return way

    for search in ("pruned", config.rules.searches[0])["pruned" in options.skip :]:
        results.append(measured(search, chat, ours(search)))
        show(results[-1], rate)
    if "naive" not in options.skip and found is not None:
        plain, known = naive if options.shape == "gemma-7b" else naive_vision, Known.of(found)
        results.append(measured("naive", chat, lambda: plain(chat, sets, config, known)))
        show(results[-1], rate)
        off = differences(results[-2].scores, results[-1].scores)
        print(f"largest difference of a mean score between {results[-2].name} and naive: {json.dumps(off)}")
    for result in results[:-1]:
        print(f"ratio {results[-1].name} / {result.name}: {results[-1].seconds / result.seconds:.1f}")
    device = torch.cuda.get_device_name() if like.is_cuda else "CPU"
    about = {"parameters": chat.model.num_parameters(), "device": device, "dtype": options.dtype}
    print(json.dumps({**about, "plain product, TFLOP/s": round(rate / 1e12, 2), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
