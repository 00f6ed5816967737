"""The steps of a run and its cost on this machine, before it is started.

The cost is measured, not looked up: a few rows go through the engine as the run's would, then three times as many, and the
difference gives the cost of a token in a layer. The rest of the first is paid once a pass, like reading weights from disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median_low

import torch
from torch import Tensor

from refusal_direction.candidates import Candidates
from refusal_direction.config import Config, search_name
from refusal_direction.engine import Engine, Intervention, Row
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.gguf import weight_type
from refusal_direction.models.placement import execution_device
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.pipeline import Prepared, prepared
from refusal_direction.prompts.sets import Kind, PromptSets, Split, set_name
from refusal_direction.runtime.memory import peak_bytes
from refusal_direction.scoring.metrics import Measure, kl_divergence, refusal_score
from refusal_direction.scoring.requests import MEASURED_ON

__all__ = ["Cost", "Inspection", "inspect", "token_layers"]

_MICROBATCHES = (2, 6)


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a run on this machine."""

    load_seconds: float
    """Measured: the model has been loaded."""
    pass_seconds: dict[str, float]
    """Estimated, for each pass over the weights."""
    memory: int
    """Estimated peak in bytes, including weights held in memory."""

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.load_seconds + sum(self.pass_seconds.values())


@dataclass(frozen=True)
class Inspection:
    """Facts about a model, and the cost of a run on it."""

    config: Config
    chat: ChatModel
    prompts: PromptSets
    tokens: RefusalTokens
    engine: str
    writes: tuple[tuple[tuple[str, ...], int], ...]
    """Submodules of a layer whose outputs are added to the stream, and the number of layers with this set."""
    n_layers: int
    d_model: int
    shared: int
    """Number of tokens with which all prompts begin, run once for each intervention."""
    rows: dict[str, int]
    """Rows of each pass, if the filter keeps every prompt."""
    cost: Cost

    @property
    def n_candidates(self) -> int:
        """Number of candidates of all methods."""
        return len(self.config.methods) * self.chat.n_positions * self.n_layers

    def __str__(self) -> str:
        return "\n".join(f"{name:16s} {text}" for name, text in _lines(self))


def inspect(config: Config) -> Inspection:
    """Load the model, look at it, and time a few rows.

    Raises every RefusalDirectionError that `extract` raises before the first pass.
    """
    with prepared(config.model.model_id, config) as ready:
        ready.engine.rehearse()
        stream = ready.engine.stream
        sites = Counter(tuple(site.module for site in layer) for layer in stream.writes)
        passes = _passes(ready)
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
            rows={name: len(rows) for name, rows in passes.items()},
            cost=_cost(ready, passes, sum(ready.seconds.values())),
        )


def _stand_ins(ready: Prepared) -> Candidates:
    """Random directions in place of the candidates, at the same cost."""
    shape = (ready.chat.n_positions, len(ready.engine.stream.layers), ready.engine.stream.skeleton.d_model)
    generator = torch.Generator().manual_seed(0)
    grids = [Candidates.from_grid(torch.randn(*shape, generator=generator), name) for name in ready.config.methods]
    return Candidates.concatenate(grids)


def _passes(ready: Prepared) -> dict[str, list[Row]]:
    """The rows of each pass, if every prompt passes the filter (and, for images, a middle layer every condition on KL)."""
    config, layers = ready.config, _stand_ins(ready).layers
    search, n_layers = search_name(config), len(ready.engine.stream.layers)
    everyone: Sequence[int] = range(len(layers))
    considered = everyone
    if search == "kl_first" and config.thresholds.top_k_candidates is not None:
        middle = layers.index(n_layers // 2)
        considered = [middle] * min(config.thresholds.top_k_candidates, len(layers))
    kl = _rows(ready, everyone, [Measure.KL])
    rest = _rows(ready, considered, [Measure.ABLATION, Measure.STEERING])
    baseline = [Row(prompt) for prompt in range(len(ready.engine.prompts))]
    if search == "kl_first":
        return {"baseline": baseline, "KL divergence": kl, "ablation and steering": rest}
    return {"baseline": baseline, "interventions, at most": kl + rest}  # candidates of length zero are not run


def _rows(ready: Prepared, candidates: Iterable[int], measures: Sequence[Measure]) -> list[Row]:
    indices = ready.prompts.indices()
    return [
        Row(prompt, Intervention.STEERING if measure is Measure.STEERING else Intervention.ABLATION, candidate)
        for candidate in candidates
        for measure in measures
        for prompt in indices[MEASURED_ON[measure], Split.VALIDATION]
    ]


def token_layers(engine: Engine, rows: Sequence[Row], candidates: Candidates) -> int:
    """Number of (token, layer) pairs that these rows run, including the baseline rows of steered ones and shared tokens."""
    steered = {row.prompt for row in rows if row.intervention is Intervention.STEERING}
    branching = steered if engine.name == "layer-major" else set()
    branch_points = branching - {row.prompt for row in rows if row.intervention is Intervention.BASELINE}
    own = sum(engine.costs([*rows, *map(Row, branch_points)], candidates))
    interventions = {(row.intervention, row.candidate): row for row in rows}.values()
    prefixes = sum(engine.depth(row, candidates) for row in interventions)
    return own + engine.shared * (prefixes + len(engine.stream.layers) * bool(branch_points))


def _sample(ready: Prepared, candidates: Candidates, count: int) -> list[Row]:
    """Rows on one prompt of each kind, of medium length, by candidates from all layers."""
    indices = ready.prompts.indices()

    def medium(kind: Kind) -> int:
        def length(prompt: int) -> int:
            return ready.engine.prompts[prompt]["input_ids"].shape[-1]

        members = indices[kind, Split.VALIDATION]
        wanted = median_low(map(length, members))
        return next(prompt for prompt in members if length(prompt) == wanted)

    harmful, harmless = map(medium, Kind)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(1)).tolist()
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


def _cost(ready: Prepared, passes: dict[str, list[Row]], load_seconds: float) -> Cost:
    engine, candidates = ready.engine, _stand_ins(ready)
    longest = max(inputs["input_ids"].shape[-1] for inputs in engine.prompts)
    at_once = engine.budget.rows(longest - engine.shared)
    samples = [_sample(ready, candidates, times * 2 * at_once) for times in (1, *_MICROBATCHES)]
    _timed(ready, samples[0], candidates)  # warm-up
    (few, many), (short, long) = (
        [token_layers(engine, sample, candidates) for sample in samples[1:]],
        [_timed(ready, sample, candidates) for sample in samples[1:]],
    )
    each = max(0.0, long - short) / (many - few)
    once = max(0.0, short - each * few)
    estimated = {}
    held = 0
    for name, rows in passes.items():
        sizes = engine.row_bytes(rows)
        n_passes = sum(1 for _ in engine.budget.passes(rows, sizes))
        estimated[name] = once * n_passes + each * token_layers(engine, rows, candidates)
        held = max(held, min(engine.budget.hidden_bytes, sum(sizes)))
    return Cost(
        load_seconds, estimated, peak_bytes(execution_device(ready.chat.model)) + held + engine.budget.reserved_bytes
    )


def _timed(ready: Prepared, rows: Sequence[Row], candidates: Candidates) -> float:
    """Seconds for rows to go through the engine and be scored."""

    def consume(rows: list[Row], logits: Tensor) -> None:
        refusal_score(logits, ready.tokens.ids)
        if rows[0].intervention is Intervention.ABLATION:
            kl_divergence(logits, logits)

    begin = time.perf_counter()
    ready.engine.intervene(rows, candidates, consume)
    return time.perf_counter() - begin


def _lines(found: Inspection) -> list[tuple[str, str]]:
    model, chat, cost = found.chat.model, found.chat, found.cost
    origin = f" ({weight_type(chat.gguf_types)})" if chat.gguf_types else ""
    writes = "; ".join(f"{' + '.join(sites)} ({count} layers)" for sites, count in found.writes)
    positions = (
        " ".join(repr(chat.text_of(token)) for token in chat.eoi_tokens) or f"the last {chat.n_positions} of the prompt"
    )
    sets = found.prompts.indices()
    methods = f"{len(found.config.methods)} methods x " if len(found.config.methods) > 1 else ""
    return [
        ("model", f"{chat.model_id}: {model.num_parameters() / 1e6:,.1f}M parameters, {str(model.dtype)[6:]}{origin}"),
        ("residual stream", f"{found.n_layers} layers, d_model {found.d_model}; {found.engine} engine"),
        ("written by", f"the embedding; {writes}"),
        ("positions", f"{positions}: {chat.n_positions} tokens"),
        ("refusal tokens", f"{', '.join(map(repr, found.tokens.texts))} ({found.tokens.source})"),
        ("prompts", ", ".join(f"{len(members)} {set_name(which)}" for which, members in sets.items())),
        ("shared opening", f"{found.shared} tokens"),
        ("candidates", f"{found.n_candidates} = {methods}{chat.n_positions} positions x {found.n_layers} layers"),
        ("rows", ", ".join(f"{count:,} {name}" for name, count in found.rows.items())),
        ("time", f"about {_duration(cost.seconds)}: loading {_duration(cost.load_seconds)} (measured)"),
        *(("", f"{name} {_duration(seconds)}") for name, seconds in cost.pass_seconds.items()),
        ("memory", f"about {cost.memory / 2**30:.1f} GiB at its peak"),
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
