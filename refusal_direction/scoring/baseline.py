"""Pass 1: the model without intervention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.engine import Engine, Row, Tick, silent
from refusal_direction.runtime.log import RunLog
from refusal_direction.runtime.processes import all_ranks, all_sum, merge_ranks, share
from refusal_direction.runtime.store import NO_CHECKPOINTS, CheckpointStore, Part
from refusal_direction.scoring.metrics import refusal_probability, refusal_score

if TYPE_CHECKING:
    from jaxtyping import Float

    from refusal_direction.engine.interventions import ResidualStream

__all__ = ["Baseline", "baseline_bytes", "measure_baseline"]


@dataclass(frozen=True, eq=False)
class Baseline:
    """The model's behaviour without intervention."""

    refusal: Float[Tensor, "prompt"]
    """Refusal scores, in float64."""
    probability: Float[Tensor, "prompt"]
    """Summed probability of the refusal tokens, in float64."""
    activations: Float[Tensor, "prompt position layer d_model"]
    """The residual stream at the input of each layer, at the last positions of the prompts that directions are made from."""
    activations_of: tuple[int, ...]
    """The prompts of the activations, in their order."""
    logits: Mapping[int, Float[Tensor, "vocab"]]
    """Last-position logits of the prompts that the KL divergence is measured on, by their index."""

    def activations_at(self, prompts: Sequence[int]) -> Float[Tensor, "prompt position layer d_model"]:
        """The activations of some of those prompts."""
        place = {prompt: index for index, prompt in enumerate(self.activations_of)}
        return self.activations[[place[prompt] for prompt in prompts]]

    def joined(self, other: Baseline) -> Baseline:
        """Both baselines as one, the other's prompts numbered after these."""
        begin = len(self.refusal)
        return Baseline(
            refusal=torch.cat([self.refusal, other.refusal]),
            probability=torch.cat([self.probability, other.probability]),
            activations=torch.cat([self.activations, other.activations]),
            activations_of=(*self.activations_of, *(begin + prompt for prompt in other.activations_of)),
            logits={**self.logits, **{begin + prompt: logits for prompt, logits in other.logits.items()}},
        )

    def renumbered(self, order: Sequence[int]) -> Baseline:
        """The baseline of these prompts alone, numbered as they stand in `order`."""
        numbered, place = list(enumerate(order)), {prompt: place for place, prompt in enumerate(self.activations_of)}
        return Baseline(
            refusal=self.refusal[list(order)],
            probability=self.probability[list(order)],
            activations=self.activations[[place[prompt] for _, prompt in numbered if prompt in place]],
            activations_of=tuple(number for number, prompt in numbered if prompt in place),
            logits={number: self.logits[prompt] for number, prompt in numbered if prompt in self.logits},
        )


def baseline_bytes(stream: ResidualStream, *, n_activations: int, n_positions: int, n_logits: int) -> int:
    """Bytes of a Baseline with the activations and the logits of this many prompts."""
    model = stream.skeleton.model
    activations = n_activations * n_positions * len(stream.layers) * stream.skeleton.d_model
    return (activations + n_logits * model.config.get_text_config().vocab_size) * model.dtype.itemsize


class _Collector:
    """Receives logits and activations of the baseline rows, batch by batch."""

    def __init__(
        self,
        engine: Engine,
        tokens: Sequence[int],
        *,
        n_positions: int,
        activations_of: Sequence[int],
        logits_of: Sequence[int],
    ) -> None:
        skeleton = engine.stream.skeleton
        shape = (len(activations_of), n_positions, len(engine.stream.layers), skeleton.d_model)
        self._tokens, self._n_positions, self._logits_of = tuple(tokens), n_positions, set(logits_of)
        self._place = {prompt: index for index, prompt in enumerate(activations_of)}
        self.activations = torch.zeros(shape, dtype=skeleton.model.dtype)
        """Zero for the prompts of other processes."""
        self.scores: dict[int, tuple[float, float]] = {}
        """Refusal score and probability of each prompt."""
        self.logits: dict[int, Tensor] = {}

    def consume(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Read the scores off the logits [row, vocab]."""
        refusal, probability = (read(logits, self._tokens).tolist() for read in (refusal_score, refusal_probability))
        for index, row in enumerate(rows):
            self.scores[row.prompt] = (refusal[index], probability[index])
            if row.prompt in self._logits_of:
                self.logits[row.prompt] = logits[index].clone()

    def observe(self, layer: int, rows: Sequence[Row], hidden: Tensor) -> None:
        """Keep the last positions of the stream [row, token, d_model] at the input of a layer."""
        wanted = [index for index, row in enumerate(rows) if row.prompt in self._place]
        places = [self._place[rows[index].prompt] for index in wanted]
        self.activations[places, :, layer] = hidden[wanted, -self._n_positions :].to(self.activations)


def measure_baseline(
    engine: Engine,
    tokens: Sequence[int],
    *,
    n_positions: int,
    activations_of: Sequence[int],
    logits_of: Sequence[int],
    tick: Tick = silent,
    store: CheckpointStore = NO_CHECKPOINTS,
    key: str = "baseline",
    log: RunLog | None = None,
) -> Baseline:
    """Run every prompt of the engine once.

    Args:
        engine: holds the prompts.
        tokens: ids of the refusal tokens.
        n_positions: number of final positions to keep activations of.
        activations_of: the prompts whose activations are kept, in this order.
        logits_of: the prompts whose logits are kept for the KL divergence.
        tick: receives progress.
        store: holds the result of an interrupted run, and receives this one's.
        key: of the result in the store.
        log: receives the times and warnings of a resumed run.
    """
    log = log or RunLog()
    stored = store.load(key)
    if all_ranks(stored is not None) and stored is not None:
        log.resume(stored)
        engine.adopt("hooked" if stored.tensors["hooked"] else "layer-major")
        return _baseline(stored.tensors, activations_of, logits_of)
    with log.part() as part:
        collector = _Collector(
            engine, tokens, n_positions=n_positions, activations_of=activations_of, logits_of=logits_of
        )
        tensors = _run(engine, collector, logits_of, tick)
    store.save(key, Part(tensors, part.seconds, engine.leak, tuple(part.warnings)))
    return _baseline(tensors, activations_of, logits_of)


def _run(engine: Engine, collector: _Collector, logits_of: Sequence[int], tick: Tick) -> dict[str, Tensor]:
    everyone = range(len(engine.prompts))
    mine = share(everyone, engine.costs([Row(prompt) for prompt in everyone], None))
    if mine:
        engine.baseline(collector.consume, collector.observe, tick, prompts=mine)
    if not all_ranks(engine.name == "layer-major"):
        engine.adopt("hooked", "Run layer by layer, the model's results were wrong in another process.")
    scores, logits = merge_ranks(collector.scores), merge_ranks(collector.logits)
    refusal, probability = torch.tensor([scores[prompt] for prompt in everyone], dtype=torch.float64).unbind(1)
    nothing = not collector.activations.numel()
    (activations,) = (collector.activations,) if nothing else all_sum(collector.activations)
    return {
        "refusal": refusal,
        "probability": probability,
        "activations": activations,
        "logits": torch.stack([logits[prompt] for prompt in logits_of]) if logits_of else torch.zeros(0, 0),
        "hooked": torch.tensor(engine.name == "hooked"),
    }


def _baseline(tensors: Mapping[str, Tensor], activations_of: Sequence[int], logits_of: Sequence[int]) -> Baseline:
    return Baseline(
        refusal=tensors["refusal"],
        probability=tensors["probability"],
        activations=tensors["activations"],
        activations_of=tuple(activations_of),
        logits=dict(zip(logits_of, tensors["logits"], strict=True)),
    )
