"""What --memory_budget holds: peak memory beside the model against the budget, each in a process of its own.

    python benchmarks/memory.py [--budgets 512MiB 768MiB 1GiB] [--layers 2] [--n_val 128]

A random Gemma as in scoring.py on many long prompts, so that every budget is too little for all rows at once.
"""

from __future__ import annotations

import argparse

import psutil
import torch
from accelerate.utils.modeling import convert_file_size_to_int
from apart import apart
from scoring import random_gemma

from refusal_direction.candidates import Candidates
from refusal_direction.engine import Engine
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.prompts.sets import Kind, Split
from refusal_direction.runtime.memory import peak_bytes
from refusal_direction.scoring.baseline import baseline_bytes, measure_baseline
from refusal_direction.scoring.requests import ScoringContext, measure, request_all

N_POSITIONS = 5


def _run(budget: int | None, options: argparse.Namespace) -> tuple[int, int, int]:
    """Peak memory beside the model, passes, and what the hidden states of all rows take, in bytes."""
    model = random_gemma(options.layers)
    stream = ResidualStream(model)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 8000, (1, options.tokens + i % 8), generator=generator) for i in range(2 * options.n_val)]
    inputs = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    harmful, harmless = list(range(options.n_val)), list(range(options.n_val, 2 * options.n_val))
    reserved = baseline_bytes(stream, n_activations=len(inputs), n_positions=N_POSITIONS, n_logits=options.n_val)
    before = psutil.Process().memory_info().rss
    engine = Engine(stream, inputs, memory=budget, reserved_bytes=reserved, observed_tokens=N_POSITIONS)
    baseline = measure_baseline(
        engine, (7,), n_positions=N_POSITIONS, activations_of=range(len(inputs)), logits_of=harmless
    )
    candidates = Candidates.from_grid(
        torch.randn(2, options.layers, stream.skeleton.d_model, generator=generator), "random"
    )
    kept = {(Kind.HARMFUL, Split.VALIDATION): harmful, (Kind.HARMLESS, Split.VALIDATION): harmless}
    context = ScoringContext(engine, (7,), candidates, baseline, kept)
    requests = request_all(context)
    rows = [context.row(request) for request in requests]
    n_passes = len(list(engine.passes(rows)))
    measure(context, candidates, requests)
    return peak_bytes(torch.device("cpu")) - before, n_passes, sum(engine.row_bytes(rows))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--budgets", nargs="+", default=["512MiB", "768MiB", "1GiB"])
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=100)
    arguments.add_argument("--n_val", type=int, default=128)
    options = arguments.parse_args()
    print("budget        peak beside the model   of the budget   passes   hidden states of all rows")
    for name in options.budgets:
        budget = int(convert_file_size_to_int(name))
        peak, n_passes, needed = apart(_run, budget, options)
        print(
            f"{name:10s} {peak / 2**20:12.0f} MiB {peak / budget:18.0%} {n_passes:14d} {needed / 2**20:14.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
