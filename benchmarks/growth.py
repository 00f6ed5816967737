"""How the cost grows: twice and four times the prompts, the candidates, the layers, against once, in one run.

    python benchmarks/growth.py [--plot growth.png]

Pass 2 on a random Gemma (d 256), float32. Each point is the best of three, taken in turn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import GemmaConfig, GemmaForCausalLM

from refusal_direction.candidates import CandidateLabel, Candidates
from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.engine.interventions import ResidualStream

TIMES = (1, 2, 4)
BASE = {"prompts": 8, "candidates": 16, "layers": 4}


def gemma(n_layers: int) -> GemmaForCausalLM:
    torch.manual_seed(0)
    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
        )
    ).eval()


def case(prompts: int, candidates: int, layers: int) -> tuple[Engine, Candidates]:
    """An engine that has been through its first pass, and the candidates."""
    generator = torch.Generator().manual_seed(0)
    opening = torch.tensor([[2, 3, 4, 5]])
    ids = [torch.cat([opening, torch.randint(9, 2000, (1, 24), generator=generator)], 1) for _ in range(2 * prompts)]
    inputs = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    engine = Engine(ResidualStream(gemma(layers)), inputs, observed_tokens=5)
    engine.baseline(lambda rows, logits: None, lambda layer, rows, hidden: None)
    vectors = torch.randn(candidates, 256, generator=generator)
    return engine, Candidates(
        vectors, tuple(CandidateLabel("random", index % layers, seed=index) for index in range(candidates))
    )


def seconds(engine: Engine, candidates: Candidates) -> float:
    half = len(engine.prompts) // 2
    harmful, harmless = range(half), range(half, len(engine.prompts))
    rows = [
        Row(prompt, intervention, candidate)
        for candidate in range(len(candidates))
        for intervention, prompts in (
            (Intervention.ABLATION, harmful),
            (Intervention.ABLATION, harmless),
            (Intervention.STEERING, harmless),
        )
        for prompt in prompts
    ]
    begin = time.perf_counter()
    engine.intervene(rows, candidates, lambda rows, logits: None)
    return time.perf_counter() - begin


def measured() -> dict[str, list[float]]:
    """For each quantity, seconds at each multiple."""
    cases = {(name, times): case(**{**BASE, name: times * BASE[name]}) for name in BASE for times in TIMES}
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(3):
        for which, (engine, candidates) in cases.items():
            best[which] = min(best[which], seconds(engine, candidates))
    return {name: [best[name, times] for times in TIMES] for name in BASE}


def plot(found: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for name, values in found.items():
        label = f"{name} ({BASE[name]}: {values[0]:.2f} s)"
        axes.plot(TIMES, [value / values[0] for value in values], marker="o", label=label)
    axes.plot(TIMES, TIMES, color="grey", linestyle="--", label="linear")
    title = f"How the cost of pass 2 grows\n(random Gemma, d 256; {torch.get_num_threads()} threads; 1x in brackets)"
    axes.set(xlabel="times as many", ylabel="times as long", xticks=TIMES, title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--plot", type=Path, help="draw it into this file (needs matplotlib)")
    options = arguments.parse_args()
    found = measured()
    print(f"once: {BASE['prompts']} prompts of each kind, {BASE['candidates']} candidates, {BASE['layers']} layers")
    for name, values in found.items():
        growth = "   ".join(
            f"{times}x {value:.2f} s (x{value / values[0]:.2f})" for times, value in zip(TIMES, values, strict=True)
        )
        print(f"{name:11s} {growth}")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
