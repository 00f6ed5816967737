"""The steps of a run and its cost on this machine, before it is started.

The cost is measured, not looked up: a few rows go through the engine as the run's would, then four times as many, and so
on for a few seconds. The last two give the cost of a token in a layer, and what is paid once a pass, like reading weights
from disk. How many prompts the filter will keep is estimated from the baseline of a few, which makes the cost a range.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil, sqrt
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

__all__ = ["Cost", "Inspection", "Range", "inspect", "token_layers"]

_LONG_ENOUGH = 2.0
"""Seconds of the last sample that is timed, at least: the next one would be four times as long."""
_MOST_MICROBATCHES = 6
_SAMPLED_PROMPTS = 16
"""Prompts of each kind whose baseline shows how many the filter keeps."""
_Z = 1.28
"""Of the interval of that share: it covers 80%."""


@dataclass(frozen=True)
class Range:
    """An estimate between two bounds."""

    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a run on this machine."""

    load_seconds: float
    """Measured: the model has been loaded."""
    pass_seconds: dict[str, Range]
    """Estimated, for each pass over the weights: by how many prompts the filter keeps."""
    memory: int
    """Estimated peak in bytes, including weights held in memory."""

    @property
    def seconds(self) -> Range:
        """Of the whole run."""
        passes = self.pass_seconds.values()
        return Range(
            self.load_seconds + sum(each.low for each in passes), self.load_seconds + sum(each.high for each in passes)
        )


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
    """Rows of each pass, if the filter keeps as many prompts as it may."""
    kept: Mapping[Kind, Range]
    """Estimated number of validation prompts that the filter keeps."""
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
        kept = _kept(ready, _sampled_refusal(ready))
        stream = ready.engine.stream
        sites = Counter(tuple(site.module for site in layer) for layer in stream.writes)
        fewest, most = (
            _passes(ready, {kind: round(getattr(kept[kind], bound)) for kind in Kind}) for bound in ("low", "high")
        )
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
            rows={name: len(rows) for name, rows in most.items()},
            kept=kept,
            cost=_cost(ready, fewest, most, load_seconds=sum(ready.seconds.values())),
        )


def _sampled_refusal(ready: Prepared) -> dict[Kind, list[float]]:
    """Baseline refusal scores of a few prompts of each kind, spread over train and validation prompts.

    They run as the first pass would run them, which also shows which runner the model needs.
    """
    indices = ready.prompts.indices()
    sampled = {}
    for kind in Kind:
        members = [*indices[kind, Split.TRAIN], *indices[kind, Split.VALIDATION]]
        sampled[kind] = members[:: ceil(len(members) / _SAMPLED_PROMPTS)]
    found: dict[int, float] = {}

    def consume(rows: list[Row], logits: Tensor) -> None:
        scores = refusal_score(logits, ready.tokens.ids).tolist()
        found.update(zip((row.prompt for row in rows), scores, strict=True))

    prompts = [*dict.fromkeys([*sampled[Kind.HARMFUL], *sampled[Kind.HARMLESS], *ready.engine.same_shape(4)])]
    ready.engine.baseline(consume, lambda layer, rows, hidden: None, prompts=prompts)
    return {kind: [found[prompt] for prompt in members] for kind, members in sampled.items()}


def _kept(ready: Prepared, refusal: Mapping[Kind, Sequence[float]]) -> dict[Kind, Range]:
    """The number of validation prompts of each kind that the filter keeps, estimated from a few baseline scores."""
    kept = {}
    for kind, scores in refusal.items():
        asked = len(ready.prompts[kind, Split.VALIDATION])
        fitting = sum(score > 0 if kind is Kind.HARMFUL else score < 0 for score in scores)
        share = Range(1.0, 1.0) if ready.config.skip_filter else _wilson(fitting, len(scores))
        least = min(ready.config.rules.minimum_prompts, asked)
        kept[kind] = Range(max(least, asked * share.low), max(least, asked * share.high))
    return kept


def _wilson(successes: int, n: int) -> Range:
    """The Wilson score interval of a share."""
    share, z2 = successes / n, _Z**2
    middle, half = share + z2 / (2 * n), _Z * sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return Range((middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n))


def _stand_ins(ready: Prepared) -> Candidates:
    """Random directions in place of the candidates, at the same cost."""
    shape = (ready.chat.n_positions, len(ready.engine.stream.layers), ready.engine.stream.skeleton.d_model)
    generator = torch.Generator().manual_seed(0)
    grids = [Candidates.from_grid(torch.randn(*shape, generator=generator), name) for name in ready.config.methods]
    return Candidates.concatenate(grids)


def _passes(ready: Prepared, kept: Mapping[Kind, int]) -> dict[str, list[Row]]:
    """The rows of each pass, if the filter keeps so many validation prompts (and, for images, a middle layer meets every
    condition on KL)."""
    config, layers = ready.config, _stand_ins(ready).layers
    search, n_layers = search_name(config), len(ready.engine.stream.layers)
    everyone: Sequence[int] = range(len(layers))
    considered = everyone
    if search == "kl_first" and config.thresholds.top_k_candidates is not None:
        middle = layers.index(n_layers // 2)
        considered = [middle] * min(config.thresholds.top_k_candidates, len(layers))
    kl = _rows(ready, kept, everyone, [Measure.KL])
    rest = _rows(ready, kept, considered, [Measure.ABLATION, Measure.STEERING])
    baseline = [Row(prompt) for prompt in range(len(ready.engine.prompts))]
    if search == "kl_first":
        return {"baseline": baseline, "KL divergence": kl, "ablation and steering": rest}
    return {"baseline": baseline, "interventions, at most": kl + rest}  # candidates of length zero are not run


def _rows(
    ready: Prepared, kept: Mapping[Kind, int], candidates: Iterable[int], measures: Sequence[Measure]
) -> list[Row]:
    indices = ready.prompts.indices()
    return [
        Row(prompt, Intervention.STEERING if measure is Measure.STEERING else Intervention.ABLATION, candidate)
        for candidate in candidates
        for measure in measures
        for prompt in indices[MEASURED_ON[measure], Split.VALIDATION][: kept[MEASURED_ON[measure]]]
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


def _cost(
    ready: Prepared, fewest: Mapping[str, list[Row]], most: Mapping[str, list[Row]], *, load_seconds: float
) -> Cost:
    """The cost of a run whose passes have between the fewest and the most rows."""
    engine, candidates = ready.engine, _stand_ins(ready)
    once, each = _rates(ready, candidates)

    def seconds(rows: list[Row]) -> float:
        n_passes = sum(1 for _ in engine.budget.passes(rows, engine.row_bytes(rows)))
        return once * n_passes + each * token_layers(engine, rows, candidates)

    held = max(min(engine.budget.hidden_bytes, sum(engine.row_bytes(rows))) for rows in most.values())
    return Cost(
        load_seconds,
        {name: Range(seconds(fewest[name]), seconds(rows)) for name, rows in most.items()},
        peak_bytes(execution_device(ready.chat.model)) + held + engine.budget.reserved_bytes,
    )


def _rates(ready: Prepared, candidates: Candidates) -> tuple[float, float]:
    """Seconds once a pass, and for each token in each layer."""
    engine = ready.engine
    longest = max(inputs["input_ids"].shape[-1] for inputs in engine.prompts)
    largest = _MOST_MICROBATCHES * engine.budget.rows(longest - engine.shared)
    timed: list[tuple[int, float]] = []
    count = 3
    _timed(ready, _sample(ready, candidates, count), candidates)  # warm-up
    while len(timed) < 2 or (timed[-1][1] < _LONG_ENOUGH and count <= largest):
        sample = _sample(ready, candidates, count)
        timed.append((token_layers(engine, sample, candidates), _timed(ready, sample, candidates)))
        count *= 4
    (few, short), (many, long) = timed[-2:]
    each = max(0.0, long - short) / (many - few)
    return max(0.0, short - each * few), each


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
        ("filter", _filter(found)),
        ("rows", ", ".join(f"{count:,} {name}" for name, count in found.rows.items())),
        ("time", f"about {_durations(cost.seconds)}: loading {_duration(cost.load_seconds)} (measured)"),
        *(("", f"{name} {_durations(seconds)}") for name, seconds in cost.pass_seconds.items()),
        ("memory", f"about {cost.memory / 2**30:.1f} GiB at its peak"),
    ]


def _filter(found: Inspection) -> str:
    if found.config.skip_filter:
        return "skipped"
    counts = (
        f"{_span(f'{kept.low:.0f}', f'{kept.high:.0f}')} of {len(found.prompts[kind, Split.VALIDATION])} {kind.value}"
        for kind, kept in found.kept.items()
    )
    return f"keeps about {', '.join(counts)} validation prompts"


def _durations(seconds: Range) -> str:
    low, high = _duration(seconds.low), _duration(seconds.high)
    (low_number, low_unit), (_, high_unit) = low.split(), high.split()
    return _span(low_number if low_unit == high_unit and low != high else low, high)


def _span(low: str, high: str) -> str:
    return high if low == high else f"{low} to {high}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
