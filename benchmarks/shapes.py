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
from functools import partial
from pathlib import Path
from typing import TypeVar

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
from refusal_direction.prompts import PromptSets, gather
from refusal_direction.results import RunResult
from refusal_direction.scoring.metrics import Measure

NO_THRESHOLDS = Thresholds(kl_threshold=1e9, induce_threshold=-1e9)
_T = TypeVar("_T")


def decoder(
    d_model: int, hidden: int, heads: int, key_value_heads: int, vocabulary: int, narrower: int
) -> dict[str, int]:
    """A Gemma's sizes; as many heads and words as in the real one, even if it is made narrower."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": d_model // narrower,
        "intermediate_size": hidden // narrower,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 256 // narrower,
    }


def gemma_7b(layers: int | None, narrower: int) -> PreTrainedModel:
    sizes = decoder(3072, 24_576, 16, 16, 256_000, narrower)
    return GemmaForCausalLM(GemmaConfig(**sizes, num_hidden_layers=layers or 28))


def paligemma2_3b(layers: int | None, narrower: int) -> PreTrainedModel:
    tower = SiglipVisionConfig(
        hidden_size=1152 // narrower,
        intermediate_size=4304 // narrower,
        num_hidden_layers=layers or 27,
        num_attention_heads=16 if narrower == 1 else 4,
        image_size=448,
        patch_size=14,
        projection_dim=2304 // narrower,
    )
    sizes = decoder(2304, 9216, 8, 4, 257_216, narrower)
    text = Gemma2Config(**sizes, num_hidden_layers=layers or 26, query_pre_attn_scalar=sizes["head_dim"])
    image = load_vision_model(DEMO_MODEL).model.config.image_token_index  # prompts are made by the demo's processor
    config = PaliGemmaConfig(
        vision_config=tower, text_config=text, image_token_index=image, projection_dim=tower.projection_dim
    )
    return PaliGemmaForConditionalGeneration(config)


SHAPES = {"gemma-7b": gemma_7b, "paligemma2-3b": paligemma2_3b}


def built(options: argparse.Namespace) -> PreTrainedModel:
    """Built on the device and in the dtype, so that a machine's own memory need not hold it."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            return SHAPES[options.shape](options.layers, options.narrower).eval()
    finally:
        torch.set_default_dtype(before)


def setting(options: argparse.Namespace) -> tuple[ChatModel, PromptSets, Config]:
    model, sizes = built(options), PromptSource(n_train=options.n_train, n_val=options.n_val, n_test=0)
    common = {"prompts": sizes, "skip_filter": True, "thresholds": NO_THRESHOLDS, "batch_size": None}
    if isinstance(model, GemmaForCausalLM):
        chat = ChatModel(model, tokenizer_for(options.data_dir), options.shape)
        return chat, prompt_sets(options), Config(**common)
    demo = load_vision_model(DEMO_MODEL)
    images, tower = demo.processor.image_processor, model.config.vision_config
    images.size = {"height": tower.image_size, "width": tower.image_size}
    demo.processor.image_seq_length = images.image_seq_length = (tower.image_size // tower.patch_size) ** 2
    common["thresholds"] = replace(NO_THRESHOLDS, top_k_candidates=VISION_CONFIG.thresholds.top_k_candidates)
    config = replace(VISION_CONFIG, model=ModelSource(DEMO_MODEL), **common)
    return replace(demo, model=model), gather(config), config


@dataclass(frozen=True)
class Cost:
    """What one way took."""

    seconds: float
    flops: int
    memory: int
    """Peak on a CUDA device, in bytes; 0 where there is none."""


def measured(model: PreTrainedModel, way: Callable[[], _T]) -> tuple[_T, Cost]:
    """What one way gives, and what it took."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with products(model) as flops:
        result = way()
    seconds = time.perf_counter() - begin
    return result, Cost(seconds, sum(flops), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def show(name: str, cost: Cost, selected: int, rate: float) -> None:
    reached = cost.flops / cost.seconds
    memory = f"peak {cost.memory / 2**30:5.1f} GiB   " if cost.memory else ""
    print(
        f"{name:10s} {cost.seconds:8.1f} s   {memory}{cost.flops / 1e12:8.1f} TFLOP: {reached / 1e12:6.2f} TFLOP/s, "
        f"{reached / rate:.0%} of a plain product   selects {selected}",
        flush=True,
    )


def differences(found: RunResult, scores: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of mean scores, of any candidate that both ways have scored."""
    ours = {measure.name.lower(): found.scores.of(measure).mean(1) for measure in Measure}
    return {name: float((ours[name] - scores[name]).abs().nan_to_num().max()) for name in ours}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shape", choices=SHAPES)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments.add_argument("--data_dir", type=Path, default=Path("data"))
    arguments.add_argument("--layers", type=int, help="as many as the real one by default")
    arguments.add_argument("--narrower", type=int, default=1, help="how many times narrower than the real one")
    arguments.add_argument("--n_train", type=int, default=128)
    arguments.add_argument("--n_val", type=int, default=32)
    options = arguments.parse_args()
    like = torch.empty(0, dtype=getattr(torch, options.dtype), device=options.device)
    rate = max(matrix_rates(5.0, 8192 if like.is_cuda else 2048, like))
    chat, sets, config = setting(options)
    seconds: dict[str, float] = {}
    for search in ("pruned", config.rules.searches[0]):
        way = partial(extract, chat, replace(config, search=search), prompts=sets)
        found, cost = measured(chat.model, way)
        seconds[search] = cost.seconds
        show(search, cost, found.selection.index, rate)
    plain = naive_vision if config.rules.images else naive
    (selected, scores), cost = measured(chat.model, partial(plain, chat, sets, config, Known.of(found)))
    show("naive", cost, selected, rate)
    print(f"largest difference of a mean score between {search} and naive: {json.dumps(differences(found, scores))}")
    for search, took in seconds.items():
        print(f"ratio naive / {search}: {cost.seconds / took:.1f}")
    device = torch.cuda.get_device_name() if like.is_cuda else "CPU"
    about = {"parameters": chat.model.num_parameters(), "device": device, "dtype": options.dtype}
    print(json.dumps({**about, "plain product, TFLOP/s": round(rate / 1e12, 2), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
