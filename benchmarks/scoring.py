"""This engine against the naive way, side by side in one run: time, scores, peak memory, share of the machine's own rate.

    python benchmarks/scoring.py [--data_dir data] [--layers 12] [--n_train 128] [--n_val 32]
    python benchmarks/scoring.py --vlm

The naive way is the published loop: a candidate at a time, batches of 32 prompts padded to the longest, hooks on every
layer, logits of all positions. Both run on a random 55M-parameter Gemma in float32 with the published prompts (the demo's, if
they have not been downloaded); see vision.py for --vlm. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
import psutil
import torch
import vision
from apart import apart
from measuring import context_of, with_measured
from torch import Tensor
from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerBase

from refusal_direction import demo
from refusal_direction.config import DEMO_MODEL, Config, ModelSource, PromptSource
from refusal_direction.directions import unit
from refusal_direction.engine import Engine
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.refusal_tokens import resolve
from refusal_direction.prompts import Kind, PromptSets, Split, gather
from refusal_direction.runtime.memory import peak_bytes
from refusal_direction.scoring.baseline import measure_baseline
from refusal_direction.scoring.metrics import kl_divergence, refusal_score
from refusal_direction.scoring.requests import request_all

BATCH = 32
VOCABULARY = 8192


def random_gemma(n_layers: int, **others: Any) -> GemmaForCausalLM:
    """Random weights, with 55M parameters at 12 layers; `others` replace what its configuration says."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "initializer_range": 0.05,
    }
    return GemmaForCausalLM(GemmaConfig(**{**sizes, **others})).eval()


def tokenizer_for(data_dir: Path, folder: str | None = None) -> PreTrainedTokenizerBase:
    """The one asked for; else as many tokens as the model has, learnt from the published prompts in the demo's template.

    Prompts are then as long as for real models. Without the published prompts: the demo's own.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder or demo.MODEL_DIR)
    splits = [data_dir / f"{name}.json" for name in ("harmful_train", "harmless_train")]
    if folder or not all(path.exists() for path in splits):
        return tokenizer
    chat = ChatModel(random_gemma(1), tokenizer, "to render prompts")
    texts = [chat.render(entry["instruction"]) for path in splits for entry in json.loads(path.read_text())[:9000]]
    return tokenizer.train_new_from_iterator(texts, VOCABULARY, show_progress=False)


def setting(options: argparse.Namespace, **others: Any) -> tuple[ChatModel, PromptSets]:
    chat = ChatModel(
        random_gemma(options.layers, **others), tokenizer_for(options.data_dir, options.tokenizer), "random Gemma"
    )
    return chat, prompt_sets(options)


def prompt_sets(options: argparse.Namespace) -> PromptSets:
    """The published ones; the demo's, if they have not been downloaded."""
    source = PromptSource(n_train=options.n_train, n_val=options.n_val, n_test=0, data_dir=options.data_dir)
    published = (options.data_dir / "harmful_train.json").exists()
    return gather(Config(model=ModelSource("random" if published else DEMO_MODEL), prompts=source))


def ours(chat: ChatModel, sets: PromptSets) -> dict[str, Tensor]:
    tokens, indices = resolve(chat, ("I",)).ids, sets.indices()
    inputs = [chat.inputs(prompt) for prompt in sets.for_selection]
    engine = Engine(ResidualStream(chat.model), inputs, observed_tokens=chat.n_positions)
    baseline = measure_baseline(
        engine,
        tokens,
        n_positions=chat.n_positions,
        activations_of=indices[Kind.HARMFUL, Split.TRAIN] + indices[Kind.HARMLESS, Split.TRAIN],
        logits_of=indices[Kind.HARMLESS, Split.VALIDATION],
    )
    context = context_of(engine, tokens, baseline, indices)
    scores = with_measured(context.unmeasured(), context, request_all(context))
    return {"ablation": scores.ablation, "steering": scores.steering, "kl": scores.kl}


class Naive:
    """The published loop, as plainly as it can be written."""

    def __init__(self, chat: ChatModel, sets: PromptSets) -> None:
        self.chat, self.model, self.sets = chat, chat.model, sets
        self.layers = chat.model.model.layers
        self.tokens = resolve(chat, ("I",)).ids

    def batches(self, prompts: tuple[Any, ...]) -> Iterator[dict[str, Tensor]]:
        for begin in range(0, len(prompts), BATCH):
            encoded = [self.chat.encode(prompt.text) for prompt in prompts[begin : begin + BATCH]]
            longest = max(map(len, encoded))
            padded = {
                "input_ids": [[0] * (longest - len(tokens)) + tokens for tokens in encoded],
                "attention_mask": [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in encoded],
            }
            yield {name: torch.tensor(rows, device=self.model.device) for name, rows in padded.items()}

    @torch.no_grad()
    def last_logits(self, prompts: tuple[Any, ...]) -> Tensor:
        return torch.cat([self.model(**batch, use_cache=False).logits[:, -1] for batch in self.batches(prompts)])

    @contextmanager
    def hooked(self, change: Callable[[Tensor], Tensor], layers: Any, outputs: bool) -> Iterator[None]:
        def on_input(module: Any, args: Any) -> Any:
            return (change(args[0]), *args[1:])

        def on_output(module: Any, args: Any, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        handles = [layer.register_forward_pre_hook(on_input) for layer in layers]
        if outputs:
            handles += [
                part.register_forward_hook(on_output) for layer in layers for part in (layer.self_attn, layer.mlp)
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def mean_activations(self, prompts: tuple[Any, ...], n_positions: int) -> Tensor:
        shape = (n_positions, len(self.layers), self.model.config.hidden_size)
        total = torch.zeros(shape, dtype=torch.float64, device=self.model.device)

        def hook(index: int) -> Callable[..., None]:
            def add(module: Any, args: Any) -> None:
                total[:, index] += args[0][:, -n_positions:].double().sum(0)

            return add

        handles = [layer.register_forward_pre_hook(hook(index)) for index, layer in enumerate(self.layers)]
        self.last_logits(prompts)
        for handle in handles:
            handle.remove()
        return total / len(prompts)

    def run(self) -> dict[str, Tensor]:
        n_positions = len(self.chat.eoi_tokens)
        harmful, harmless = self.sets.harmful_val, self.sets.harmless_val
        for prompts in (self.sets.harmful_train, self.sets.harmless_train, harmful):
            self.last_logits(prompts)  # the filter's scores
        before = self.last_logits(harmless)
        candidates = self.mean_activations(self.sets.harmful_train, n_positions)
        candidates -= self.mean_activations(self.sets.harmless_train, n_positions)
        found: dict[str, list[Tensor]] = {"ablation": [], "steering": [], "kl": []}
        for position in range(n_positions):
            for index, layer in enumerate(self.layers):
                r = candidates[position, index]
                u = unit(r).to(self.model.dtype)
                with self.hooked(lambda x, u=u: x - (x @ u).unsqueeze(-1) * u, self.layers, outputs=True):
                    found["ablation"].append(refusal_score(self.last_logits(harmful), self.tokens))
                    found["kl"].append(kl_divergence(before, self.last_logits(harmless)))
                with self.hooked(lambda x, r=r.to(u): x + r, [layer], outputs=False):
                    found["steering"].append(refusal_score(self.last_logits(harmless), self.tokens))
        return {name: torch.stack(values).cpu() for name, values in found.items()}


@contextmanager
def products(part: torch.nn.Module) -> Iterator[list[int]]:
    """Counts the floating-point operations of its matrix products with weights, as they are run."""
    counted: list[int] = []

    def count(module: Any, args: Any, output: Tensor) -> None:
        counted.append(2 * output.numel() * module.in_features)

    handles = [module.register_forward_hook(count) for module in part.modules() if isinstance(module, torch.nn.Linear)]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def matrix_rates(seconds: float = 5.0, size: int = 2048, like: Tensor | None = None) -> list[float]:
    """What plain matrix products reach, one after the other for so long, in FLOP/s: in float32 on the CPU, or as `like`."""
    a, b = (torch.randn(size, size).to(torch.empty(0) if like is None else like) for _ in range(2))
    times: list[float] = []
    while sum(times) < seconds:
        begin = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return [2 * size**3 / one for one in times]


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one of the two. The machine is shared, so what it sustains before and after is told beside its best."""
    rates = matrix_rates()
    if options.vlm:
        case = vision.Case(options.layers, options.n_train, options.n_val)
        model, layers = case.model, case.model.model.language_model.layers
        run = partial(vision.ours, case) if name == "ours" else vision.Naive(case).run
    else:
        chat, sets = setting(options)
        model, layers = chat.model, chat.model.model.layers
        run = partial(ours, chat, sets) if name == "ours" else Naive(chat, sets).run
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    with products(layers) as flops:
        scores = run()
    seconds = time.perf_counter() - begin
    memory = peak_bytes(torch.device("cpu")) - before
    rates += matrix_rates()
    return {
        "seconds": seconds,
        "best": max(rates),
        "sustained": harmonic_mean(rates),
        "memory": memory,
        "flops": sum(flops),
        "parameters": model.num_parameters(),
        "scores": {key: value.numpy() if isinstance(value, Tensor) else value for key, value in scores.items()},
    }


def show(name: str, run: dict[str, Any]) -> None:
    print(
        f"{name:6s} {run['seconds']:7.1f} s   peak memory above the model {run['memory'] / 2**20:6.0f} MiB", flush=True
    )
    for lap, seconds in run["scores"].get("laps", {}).items():
        print(f"         {seconds:7.1f} s   {lap}", flush=True)


def compare(runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Print how the two sides compare."""
    mine = [run for name, run in runs if name == "ours"]
    naive = [run for name, run in runs if name == "naive"]
    for name, run in runs:
        reached = run["flops"] / run["seconds"]
        print(
            f"{name} spends {run['flops'] / 1e12:.1f} TFLOP in the layers' products: {reached / 1e9:.0f} GFLOP/s in all, "
            f"{reached / run['best']:.0%} of the machine's {run['best'] / 1e9:.0f} on a plain matrix product at its best, "
            f"{reached / run['sustained']:.0%} of the {run['sustained'] / 1e9:.0f} that it sustains"
        )
    if mine and naive:
        ours, theirs = mine[0]["scores"], naive[0]["scores"]
        difference = max(float(np.nanmax(abs(ours[key] - theirs[key]))) for key in ("ablation", "steering", "kl"))
        ratio = naive[0]["seconds"] / (sum(run["seconds"] for run in mine) / len(mine))
        print(f"ratio naive / ours: {ratio:.2f}   largest score difference: {difference:.1e}")
        if "finalists" in ours:
            print(
                f"same survivors: {ours['finalists'] == theirs['finalists']}   "
                f"same selection: {ours['selected'] == theirs['selected']}"
            )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--vlm", action="store_true", help="the vision-language loop on a random PaliGemma 2")
    arguments.add_argument("--data_dir", type=Path, default=Path("data"))
    arguments.add_argument("--tokenizer", help="folder of a tokenizer with a chat template")
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--n_train", type=int, help="prompts of each kind (128; 8 with --vlm)")
    arguments.add_argument("--n_val", type=int, help="prompts of each kind (32; 4 with --vlm)")
    arguments.add_argument("--twice", action="store_true", help="this engine once more after the naive way")
    arguments.add_argument("--only", choices=("ours", "naive"), help="run one of them alone, to profile it")
    options = arguments.parse_args()
    options.n_train = options.n_train or (8 if options.vlm else 128)
    options.n_val = options.n_val or (4 if options.vlm else 32)
    runs = []
    for name in (options.only,) if options.only else ("ours", "naive", "ours")[: 2 + options.twice]:
        runs.append((name, apart(measured, name, options)))
        show(*runs[-1])
    compare(runs)
    shape = {"parameters": runs[0][1]["parameters"], "layers": options.layers, "torch": torch.__version__}
    print(json.dumps({**shape, "n_train": options.n_train, "n_val": options.n_val, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
