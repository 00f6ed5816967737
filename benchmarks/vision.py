"""The vision-language side of scoring.py: a random PaliGemma 2, this engine, and the published loop.

About 60M parameters with 256 image tokens. The shares of the vision tower and of the logits of all positions in a naive
forward are those of PaliGemma 2 3B (16% and 22%). Both sides ablate at Gemma 2's true residual writes, so that their
scores can be compared; published code hooks the modules before the norms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from measuring import METHOD, context_of, with_measured
from torch import Tensor
from transformers import Gemma2Config, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from refusal_direction.candidates import Candidates
from refusal_direction.config import VISION_CONFIG, Config, Thresholds
from refusal_direction.directions import unit
from refusal_direction.engine import Engine
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.prompts.sets import SETS_FOR_SELECTION, Kind, Split
from refusal_direction.scoring.baseline import measure_baseline
from refusal_direction.scoring.metrics import Measure, kl_divergence, refusal_score
from refusal_direction.scoring.requests import request_all
from refusal_direction.scoring.scores import Scores
from refusal_direction.selection.conditions import Conditions
from refusal_direction.selection.decision import decide, finalists, relax_layer_and_kl

POSITIONS = 3
BATCH = 8
IMAGE_TOKEN = 30_463
REFUSAL = RefusalTokens((7, 11), ("a", "b"), "the benchmark")
RANDOM = replace(VISION_CONFIG, thresholds=Thresholds(kl_threshold=1e9, top_k_candidates=15))
"""For random weights: let the KL rank, not exclude."""

Prompts = list[dict[str, Tensor]]


def random_paligemma(n_layers: int) -> PaliGemmaForConditionalGeneration:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=320,
        intermediate_size=1280,
        num_hidden_layers=8,
        num_attention_heads=5,
        image_size=224,
        patch_size=14,
        projection_dim=448,
    )
    text = Gemma2Config(
        vocab_size=30_464,
        hidden_size=448,
        intermediate_size=1792,
        num_hidden_layers=n_layers,
        num_attention_heads=7,
        num_key_value_heads=7,
        head_dim=64,
        query_pre_attn_scalar=64,
        initializer_range=0.05,
    )
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, projection_dim=448)
    return PaliGemmaForConditionalGeneration(config).eval()


def prompts(count: int, kind: int) -> Prompts:
    """Random images with questions of 6 to 13 tokens; the two kinds differ in brightness and vocabulary."""
    generator = torch.Generator().manual_seed(kind)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, 14, (1,), generator=generator))
        question = torch.randint(100 + 5000 * kind, 5000 + 5000 * kind, (1, length), generator=generator)
        ids = torch.cat([torch.full((1, 256), IMAGE_TOKEN), question], dim=1)
        made.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": torch.zeros_like(ids),
                "pixel_values": torch.randn(1, 3, 224, 224, generator=generator) + kind,
            }
        )
    return made


class Case:
    """The model, and prompts in the order harmful_train, harmless_train, harmful_val, harmless_val."""

    def __init__(self, n_layers: int, n_train: int, n_val: int) -> None:
        self.model = random_paligemma(n_layers)
        self.harmful, self.harmless = prompts(n_train + n_val, 0), prompts(n_train + n_val, 1)
        self.n_train, self.n_val = n_train, n_val


def ours(case: Case) -> dict[str, Any]:
    n_train, n_val = case.n_train, case.n_val
    everything = [
        *case.harmful[:n_train], *case.harmless[:n_train], *case.harmful[n_train:], *case.harmless[n_train:]
    ]  # fmt: skip
    sizes = (n_train, n_train, n_val, n_val)
    begins = (0, n_train, 2 * n_train, 2 * n_train + n_val)
    kept = {
        which: list(range(begin, begin + size))
        for which, begin, size in zip(SETS_FOR_SELECTION, begins, sizes, strict=True)
    }
    seconds = {}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        seconds[name] = time.perf_counter() - begin
        begin = time.perf_counter()

    engine = Engine(ResidualStream(case.model), everything)
    lap("vision tower and embedding merge, once a prompt")
    baseline = measure_baseline(
        engine,
        REFUSAL.ids,
        n_positions=POSITIONS,
        activations_of=range(2 * n_train),
        logits_of=kept[Kind.HARMLESS, Split.VALIDATION],
    )
    context = context_of(engine, REFUSAL.ids, baseline, kept)
    rules = Rules.of(RANDOM, context.candidates, float(context.refusal(Kind.HARMLESS).mean()))
    lap("pass 1, baseline")
    scores = with_measured(context.unmeasured(), context, request_all(context, [Measure.KL]))
    lap("pass 2, KL of every candidate")
    considered = rules.considered(scores)
    rest = request_all(context, [Measure.ABLATION, Measure.STEERING], considered)
    scores = with_measured(scores, context, rest)
    lap("pass 3, ablation and steering of those of lowest KL")
    return {**_result(scores, considered, rules), "laps": seconds}


@dataclass(frozen=True)
class Rules:
    """KL first, on these candidates."""

    candidates: Candidates
    conditions: Conditions

    @classmethod
    def of(cls, config: Config, candidates: Candidates, harmless_baseline: float) -> Rules:
        return cls(candidates, Conditions.of(config, max(candidates.layers) + 1, harmless_baseline))

    def considered(self, scores: Scores) -> list[int]:
        """The candidates of lowest KL."""
        means, zero = scores.means(self.candidates.labels), self.candidates.zero.tolist()
        return finalists(means, relax_layer_and_kl(means, self.conditions, zero), zero)

    def selected(self, scores: Scores) -> int | None:
        """The candidate that they select."""
        return decide(scores.means(self.candidates.labels), self.conditions, self.candidates.zero.tolist()).selected


def _result(scores: Scores, considered: list[int], rules: Rules) -> dict[str, Any]:
    by_name = {measure.name.lower(): scores.of(measure) for measure in Measure}
    return {**by_name, "finalists": considered, "selected": rules.selected(scores)}


class Naive:
    """The published loop: tower and logits of all positions for every candidate; KL first, then those of lowest KL."""

    def __init__(self, case: Case, tokens: RefusalTokens = REFUSAL, config: Config = RANDOM) -> None:
        self.case, self.model = case, case.model
        self.tokens, self.config = tokens.ids, config
        self.layers = case.model.model.language_model.layers

    @torch.no_grad()
    def last_logits(self, some: Prompts) -> Tensor:
        found = []
        for begin in range(0, len(some), BATCH):
            batch = some[begin : begin + BATCH]
            longest = max(one["input_ids"].shape[1] for one in batch)
            inputs = {name: torch.cat([_padded(one[name], longest, name) for one in batch]) for name in batch[0]}
            found.append(self.model(**inputs, use_cache=False).logits[:, -1])
        return torch.cat(found)

    @contextmanager
    def hooked(self, change: Callable[[Tensor], Tensor], layers: Any, outputs: bool) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:])) for layer in layers
        ]
        if outputs:
            handles += [
                part.register_forward_hook(lambda module, args, output: change(output))
                for layer in layers
                for part in (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def mean_activations(self, some: Prompts) -> Tensor:
        shape = (POSITIONS, len(self.layers), self.model.config.text_config.hidden_size)
        total = torch.zeros(shape, dtype=torch.float64, device=self.model.device)

        def adding(index: int) -> Callable[..., None]:
            def add(module: Any, args: Any) -> None:
                total[:, index] += args[0][:, -POSITIONS:].double().sum(0)

            return add

        handles = [layer.register_forward_pre_hook(adding(index)) for index, layer in enumerate(self.layers)]
        self.last_logits(some)
        for handle in handles:
            handle.remove()
        return total / len(some)

    def run(self) -> dict[str, Any]:
        n_train = self.case.n_train
        harmful, harmless = self.case.harmful[n_train:], self.case.harmless[n_train:]
        self.last_logits(harmful)
        before = self.last_logits(harmless)
        means = self.mean_activations(self.case.harmful[:n_train]) - self.mean_activations(self.case.harmless[:n_train])
        candidates, n_layers = Candidates.from_grid(means, METHOD), len(self.layers)
        rules = Rules.of(self.config, candidates, float(refusal_score(before, self.tokens).mean()))
        r = candidates.vectors
        u, added = unit(r).to(self.model.dtype), r.to(self.model.dtype)
        nothing = torch.full((len(r), len(harmless)), torch.nan, dtype=torch.float64)
        kl, ablation, steering = nothing.clone(), nothing.clone(), nothing.clone()

        def ablated(index: int) -> Any:
            return self.hooked(lambda x: x - (x @ u[index]).unsqueeze(-1) * u[index], self.layers, outputs=True)

        for index in range(len(r)):
            with ablated(index):
                kl[index] = kl_divergence(before, self.last_logits(harmless))
        scores = Scores(ablation, steering, kl)
        considered = rules.considered(scores)
        for index in considered:
            with ablated(index):
                ablation[index] = refusal_score(self.last_logits(harmful), self.tokens)
            with self.hooked(lambda x, i=index: x + added[i], [self.layers[index % n_layers]], outputs=False):
                steering[index] = refusal_score(self.last_logits(harmless), self.tokens)
        return _result(scores, considered, rules)


def _padded(tensor: Tensor, length: int, name: str) -> Tensor:
    """Padded on the left, as batches of prompts are."""
    if name == "pixel_values":
        return tensor
    return torch.nn.functional.pad(tensor, (length - tensor.shape[1], 0))
