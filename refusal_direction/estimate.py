"""What a run would do, before it is started: where the residual stream is written, and what the run would cost here.

The cost is measured, not looked up: a few rows go through the engine as the run's would, twice as many again, and the
difference is what a token costs in a layer. What the first ones cost beyond that is paid once a pass, as reading weights
from disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median_low

import torch
from torch import Tensor

from refusal_direction.candidates import Candidates
from refusal_direction.config import Config
from refusal_direction.directions import in_own_dtype
from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.placement import execution_device
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.pipeline import Prepared, prepare
from refusal_direction.prompts.sets import PromptSets
from refusal_direction.runtime.memory import peak_bytes
from refusal_direction.scoring.metrics import Measure, kl_divergence, refusal_score
from refusal_direction.scoring.scores import ALL, intervention_rows
from refusal_direction.selection.searches import search_name

__all__ = ["Cost", "Inspection", "inspect", "token_layers"]

_MICROBATCHES = (2, 6)


@dataclass(frozen=True)
class Cost:
    """What the run is estimated to take on this machine."""

    load_seconds: float
    """Measured: the model has been loaded."""
    sweep_seconds: dict[str, float]
    """Estimated, of each sweep over the weights."""
    memory: int
    """Estimated peak in bytes, the weights included where they are held in memory."""

    @property
    def seconds(self) -> float:
        return self.load_seconds + sum(self.sweep_seconds.values())


@dataclass(frozen=True)
class Inspection:
    """What was found out about a model without running the method on it."""

    config: Config
    chat: ChatModel
    prompts: PromptSets
    tokens: RefusalTokens
    engine: str
    writes: tuple[tuple[tuple[str, ...], int], ...]
    """Submodules of a layer whose outputs are added to the stream, and in how many layers it is these."""
    n_layers: int
    d_model: int
    shared: int
    """Tokens with which all prompts begin, run once for each intervention."""
    rows: dict[str, int]
    """Rows of each sweep, if the filter keeps every prompt."""
    cost: Cost

    @property
    def n_candidates(self) -> int:
        return self.chat.n_positions * self.n_layers


@in_own_dtype()
def inspect(config: Config) -> Inspection:
    """Load the model, look at it, and time a few rows.

    Raises RefusalDirectionError where a run would, before its first sweep.
    """
    ready = prepare(config)
    ready.engine.rehearse()
    stream = ready.engine.stream
    sites = Counter(tuple(site.module for site in layer) for layer in stream.writes)
    sweeps = _sweeps(ready, config)
    return Inspection(
        config=config,
        chat=ready.chat,
        prompts=ready.prompts,
        tokens=ready.tokens,
        engine=ready.engine.name,
        writes=tuple(sites.most_common()),
        n_layers=len(stream.layers),
        d_model=stream.skeleton.d_model,
        shared=ready.engine.shared,
        rows={name: len(rows) for name, rows in sweeps.items()},
        cost=_cost(ready, sweeps, sum(ready.seconds.values())),
    )


def _stand_ins(ready: Prepared) -> Candidates:
    """Directions in place of the candidates: what they are does not matter to what they cost."""
    n_layers, d_model = len(ready.engine.stream.layers), ready.engine.stream.skeleton.d_model
    generator = torch.Generator().manual_seed(0)
    return Candidates.from_grid(torch.randn(ready.chat.n_positions, n_layers, d_model, generator=generator), "random")


def _sweeps(ready: Prepared, config: Config) -> dict[str, list[Row]]:
    """The rows of each sweep, as if every prompt passed the filter (and, with images, a middling layer every test)."""
    indices, candidates = ready.prompts.indices(), _stand_ins(ready)
    rows = partial(intervention_rows, candidates, harmful=indices["harmful_val"], harmless=indices["harmless_val"])
    search, n_layers = search_name(config), len(ready.engine.stream.layers)
    top_k = config.rules.top_k if search == "kl_first" else None
    among = None if top_k is None else [n_layers // 2] * min(top_k, len(candidates.layers))
    kl, rest = rows(measures=frozenset({Measure.KL})), rows(measures=ALL - {Measure.KL}, among=among)
    baseline = [Row(prompt) for prompt in range(len(ready.prompts.everything))]
    if config.rules.relative_steering and search != "pruned":
        return {"baseline": baseline, "KL divergence": kl, "ablation and steering": rest}
    return {
        "baseline": baseline,
        "interventions, at most": kl + rest,
    }  # candidates of length zero, often layer 0's, are not run


def token_layers(engine: Engine, rows: Sequence[Row], candidates: Candidates) -> int:
    """How many (token, layer) pairs are run for these rows, with what steered rows branch off and what rows share."""
    branching = (
        {row.prompt for row in rows if row.kind is Intervention.STEERING} if engine.name == "layer-major" else set()
    )
    branch_points = branching - {row.prompt for row in rows if row.kind is Intervention.BASELINE}
    own = sum(engine.costs([*rows, *map(Row, branch_points)], candidates))
    interventions = {(row.kind, row.candidate): row for row in rows}.values()
    leads = sum(engine.depth(row, candidates) for row in interventions) + len(engine.stream.layers) * bool(
        branch_points
    )
    return own + engine.shared * leads


def _sample(ready: Prepared, candidates: Candidates, count: int) -> list[Row]:
    """Rows on one prompt of each kind, of middling length, by candidates from all layers."""
    indices = ready.prompts.indices()

    def middling(name: str) -> int:
        def length(prompt: int) -> int:
            return ready.engine.prompts[prompt]["input_ids"].shape[-1]

        wanted = median_low(map(length, indices[name]))
        return next(prompt for prompt in indices[name] if length(prompt) == wanted)

    harmful, harmless = middling("harmful_val"), middling("harmless_val")
    order = torch.randperm(len(candidates.layers), generator=torch.Generator().manual_seed(1)).tolist()
    every = [
        row
        for candidate in order
        for row in (
            Row(harmful, Intervention.ABLATION, candidate),
            Row(harmless, Intervention.ABLATION, candidate),
            Row(harmless, Intervention.STEERING, candidate),
        )
    ]
    return list(islice(cycle(every), count))


def _cost(ready: Prepared, sweeps: dict[str, list[Row]], load_seconds: float) -> Cost:
    engine, candidates = ready.engine, _stand_ins(ready)
    longest = max(inputs["input_ids"].shape[-1] for inputs in engine.prompts)
    at_once = engine.budget.rows(longest - engine.shared)
    samples = [_sample(ready, candidates, times * 2 * at_once) for times in (1, *_MICROBATCHES)]
    _timed(ready, samples[0], candidates)  # the first pass pays for much that no other does
    (few, many), (short, long) = (
        [token_layers(engine, sample, candidates) for sample in samples[1:]],
        [_timed(ready, sample, candidates) for sample in samples[1:]],
    )
    each = max(0.0, long - short) / (many - few)
    once = max(0.0, short - each * few)
    estimated = {}
    held = 0
    for name, rows in sweeps.items():
        sizes = engine.row_bytes(rows)
        passes = sum(1 for _ in engine.budget.chunks(rows, sizes))
        estimated[name] = once * passes + each * token_layers(engine, rows, candidates)
        held = max(held, min(engine.budget.hidden_bytes, sum(sizes)))
    return Cost(
        load_seconds, estimated, peak_bytes(execution_device(ready.chat.model)) + held + engine.budget.reserved_bytes
    )


def _timed(ready: Prepared, rows: Sequence[Row], candidates: Candidates) -> float:
    """Seconds for rows to go through the engine and be scored."""

    def consume(rows: list[Row], logits: Tensor) -> None:
        refusal_score(logits, ready.tokens.ids)
        if rows[0].kind is Intervention.ABLATION:
            kl_divergence(logits, logits)

    begin = time.perf_counter()
    ready.engine.intervene(rows, candidates, consume)
    return time.perf_counter() - begin
