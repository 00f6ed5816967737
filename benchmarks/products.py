"""A layer's large products by oneDNN against MKL, whichever the engine would choose: whole runs of it, side by side.

    python benchmarks/products.py [--data_dir data] [--times 2]

On random weights in float32 of two shapes: the model of scoring.py, and two layers as wide as those of Gemma 2B, whose lanes
have few rows. Each run has a process of its own, one of each kind after the other.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import geometric_mean
from unittest import mock

import psutil
import torch
from apart import apart
from scoring import matrix_rates, ours, products, setting

from refusal_direction.engine.shortcuts import products as onednn
from refusal_direction.runtime.memory import peak_bytes

SHAPES = {
    "55M, 12 layers": {"layers": 12},
    "as Gemma 2B, 2 layers": {
        "layers": 2,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "initializer_range": 0.02,
    },
}


def measured(name: str, blocked: bool, options: argparse.Namespace) -> tuple[float, float, int]:
    """Seconds, FLOP/s of the layers' products relative to the best plain product, and peak memory above the model."""
    sizes = dict(SHAPES[name])
    chat, sets = setting(argparse.Namespace(**{**vars(options), "layers": sizes.pop("layers")}), **sizes)
    best, before = max(matrix_rates()), psutil.Process().memory_info().rss
    begin = time.perf_counter()
    chosen = mock.patch.object(onednn, "available", return_value=blocked)
    with chosen, products(chat.model.model.layers) as flops:
        ours(chat, sets)
    seconds = time.perf_counter() - begin
    return seconds, sum(flops) / seconds / best, peak_bytes(torch.device("cpu")) - before


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data_dir", type=Path, default=Path("data"))
    arguments.add_argument("--n_train", type=int, default=32)
    arguments.add_argument("--n_val", type=int, default=32)
    arguments.add_argument("--times", type=int, default=2)
    options = arguments.parse_args()
    options.tokenizer = None
    if not torch.backends.mkldnn.is_available():
        raise SystemExit("This torch has no oneDNN.")
    onednn.keep_few_kernels()  # as the command line does
    print(f"On this machine the engine takes {'oneDNN' if onednn.available() else 'MKL'}.")
    for name in SHAPES:
        ratios = []
        for _ in range(options.times):
            seconds = {}
            for way, blocked in (("MKL", False), ("oneDNN", True)):
                seconds[way], share, memory = apart(measured, name, blocked, options)
                print(
                    f"{name}: {way:6s} {seconds[way]:6.1f} s   {share:.0%} of the best plain product   "
                    f"{memory / 2**20:.0f} MiB above the model",
                    flush=True,
                )
            ratios.append(seconds["MKL"] / seconds["oneDNN"])
        print(f"{name}: ratio MKL / oneDNN {geometric_mean(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main()
