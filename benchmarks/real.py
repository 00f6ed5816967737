"""Both searches against the published loop on a real chat model, one after the other in one run.

    python benchmarks/real.py Qwen/Qwen2.5-Coder-0.5B-Instruct [--data_dir data] [--skip_filter] [--published 3] [--skip pruned]

The published loop scores a sample of the candidates; its time for all of them is what it took for means and filter, plus the
sample's time for each candidate. Each way runs in a process of its own, from prompts and a loaded model to the result.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from apart import apart
from scoring import Naive
from torch import Tensor

from refusal_direction import load_chat_model
from refusal_direction.config import Config, ModelSource, PromptSource
from refusal_direction.directions import unit
from refusal_direction.pipeline import prepared
from refusal_direction.pipeline import run as run_prepared
from refusal_direction.prompts import Kind, PromptSets, Split, gather
from refusal_direction.results import RunResult
from refusal_direction.runtime.memory import peak_bytes
from refusal_direction.scoring.metrics import Measure, kl_divergence, refusal_score
from refusal_direction.scoring.scores import Scores


@dataclass(frozen=True)
class Way:
    """The time of one search, and what it found."""

    name: str
    load_seconds: float
    seconds: float
    memory: int
    result: RunResult

    def __str__(self) -> str:
        selection = self.result.selection
        label = "none" if selection.index is None else str(self.result.label)
        share = selection.evaluations / selection.exhaustive_evaluations
        return (
            f"{self.name:10s} {self.seconds:7.1f} s (loading {self.load_seconds:.1f} s)   peak memory "
            f"{self.memory / 2**20:5.0f} MiB   selected: {label}   {selection.evaluations} evaluations ({share:.0%}) in "
            f"{selection.n_passes} passes"
        )


@dataclass(frozen=True)
class Published:
    """The published loop on a sample of the candidates."""

    once: float
    """Seconds of the filter and the means."""
    each: float
    """Seconds a candidate, on average."""
    memory: int
    scores: dict[int, dict[Measure, Tensor]]
    """Scores per prompt of the sampled candidates."""


def config_of(options: argparse.Namespace, search: str) -> Config:
    return Config(
        model=ModelSource(options.model, dtype="float32"),
        prompts=PromptSource(n_train=options.n_train, n_val=options.n_val, n_test=0, data_dir=options.data_dir),
        skip_filter=options.skip_filter,
        no_refill=True,
        search=search,
    )


def searched(search: str, options: argparse.Namespace) -> Way:
    """One search, from prompts and a loaded model."""
    config = config_of(options, search)
    with prepared(options.model, config) as ready:
        begin = time.perf_counter()
        result = run_prepared(ready)
        seconds = time.perf_counter() - begin
    return Way(search, sum(ready.seconds.values()), seconds, peak_bytes(torch.device("cpu")), result)


def published(options: argparse.Namespace, found: RunResult) -> Published:
    """The published loop on some of the candidates of a run, on the prompts that its filter kept."""
    chat, sets = load_chat_model(options.model, dtype="float32"), gather(config_of(options, "exhaustive"))
    begin = time.perf_counter()
    naive = Naive(chat, sets)
    for which in sets.indices():
        naive.last_logits(sets[which])  # the filter's scores
    kept = PromptSets.of({which: [sets[which][i] for i in found.prompts[which].kept] for which in sets.indices()})
    positions = found.model.n_positions
    means = [naive.mean_activations(kept[kind, Split.TRAIN], positions) for kind in Kind]
    before = naive.last_logits(kept.harmless_val)
    once = time.perf_counter() - begin
    measured = [index for index, zero in enumerate(found.candidates.zero.tolist()) if not zero]
    sample = random.Random(0).sample(measured, options.published)
    tokens, scores = found.refusal_tokens.ids, {}
    begin = time.perf_counter()
    for index in sample:
        label = found.candidates.labels[index]
        assert label.position is not None
        r = (means[0] - means[1])[label.position, label.layer]
        u = unit(r).to(chat.model.dtype)
        with naive.hooked(lambda x, u=u: x - (x @ u).unsqueeze(-1) * u, naive.layers, outputs=True):
            ablation = refusal_score(naive.last_logits(kept.harmful_val), tokens)
            kl = kl_divergence(before, naive.last_logits(kept.harmless_val))
        with naive.hooked(lambda x, r=r.to(u): x + r, [naive.layers[label.layer]], outputs=False):
            steering = refusal_score(naive.last_logits(kept.harmless_val), tokens)
        scores[index] = {Measure.ABLATION: ablation, Measure.KL: kl, Measure.STEERING: steering}
    each = (time.perf_counter() - begin) / max(1, len(sample))
    return Published(once, each, peak_bytes(torch.device("cpu")), scores)


def difference(ours: Scores, theirs: Published) -> float:
    """The largest difference of a score per prompt."""
    return max(
        float((ours.of(measure)[index] - values.double()).abs().max())
        for index, by_measure in theirs.scores.items()
        for measure, values in by_measure.items()
    )


def known_difference(one: Scores, other: Scores) -> float:
    """The largest difference of the scores that both have measured."""
    pairs = ((one.of(measure) - other.of(measure)).abs() for measure in Measure)
    return max(float(pair.nan_to_num(0.0).max()) for pair in pairs)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", help="Hub id, folder or GGUF file of a chat model")
    arguments.add_argument("--data_dir", type=Path, default=Path("data"))
    arguments.add_argument("--n_train", type=int, default=128)
    arguments.add_argument("--n_val", type=int, default=32)
    arguments.add_argument("--skip_filter", action="store_true")
    arguments.add_argument(
        "--published", type=int, default=3, help="candidates for the published loop; 0: leave it out"
    )
    arguments.add_argument("--skip", nargs="*", default=(), choices=("exhaustive", "pruned"))
    options = arguments.parse_args()
    ways = [apart(searched, name, options) for name in ("exhaustive", "pruned") if name not in options.skip]
    for way in ways:
        print(way, flush=True)
    if len(ways) == 2:
        full, pruned = ways
        print(
            f"pruned is {full.seconds / pruned.seconds:.1f} times as fast; same selection: "
            f"{full.result.selection.index == pruned.result.selection.index}; largest score difference "
            f"{known_difference(full.result.scores, pruned.result.scores):.1e}"
        )
    if ways and options.published:
        first = ways[0]
        other = apart(published, options, replace(first.result, activations=None))
        n_candidates = int((~first.result.candidates.zero).sum())
        total = other.once + n_candidates * other.each
        print(
            f"published  {total:7.1f} s, estimated from {options.published} candidates of {n_candidates}: {other.once:.1f} s for "
            f"filter and means, {other.each:.1f} s a candidate   peak memory {other.memory / 2**20:5.0f} MiB"
        )
        for way in ways:
            print(f"{way.name} is {total / way.seconds:.1f} times as fast as the published loop")
        if first.name == "exhaustive":
            print(f"largest score difference: {difference(first.result.scores, other):.1e}")


if __name__ == "__main__":
    main()
