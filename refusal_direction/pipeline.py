"""The story: from a chat model and prompts to the refusal direction, one line a stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction import prompts as prompt_sources
from refusal_direction.config import Config
from refusal_direction.directions import mean_difference
from refusal_direction.engine import Candidates, Engine
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.residency import execution_device
from refusal_direction.memory import peak_bytes
from refusal_direction.models import refusal_tokens
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.loading import load_chat_model
from refusal_direction.models.refusal_tokens import RefusalTokens
from refusal_direction.prompts.sets import PromptSets
from refusal_direction.scoring import Baseline, Scores, intervention_rows, measure_baseline, score_candidates
from refusal_direction.selection import CandidateScore, Selection, keep_fitting, select

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Direction", "Extraction", "Progress", "extract"]

log = logging.getLogger(__name__)

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Given a description and a total, a context whose value is called with each bit of work done."""


@dataclass(frozen=True)
class Direction:
    """A refusal direction."""

    vector: Float[Tensor, "d_model"]
    """The difference of means r, not normalised, in float32."""
    layer: int
    """The layer at whose input it was measured, and is added."""
    position: int
    """The token position at which it was measured; -1 is the last of the prompt."""
    model_id: str


@dataclass(frozen=True)
class Extraction:
    """Everything a run found out."""

    config: Config
    chat: ChatModel = field(repr=False)
    prompts: PromptSets = field(repr=False)
    """All prompts drawn, before the filter."""
    kept: dict[str, list[int]] = field(repr=False)
    """For each set, the prompts that the filter left, as places in `prompts.everything`."""
    tokens: RefusalTokens
    baseline: Baseline = field(repr=False)
    candidates: Float[Tensor, "position layer d_model"] = field(repr=False)
    scores: Scores = field(repr=False)
    means: tuple[CandidateScore, ...] = field(repr=False)
    """Mean scores in (position, layer) order."""
    selection: Selection
    engine: str
    """Which engine ran."""
    leak: float
    """Largest share of an ablated stream found along its direction."""
    seconds: dict[str, float]
    """Wall time of each stage."""
    peak_memory: int
    """Most memory held at once, in bytes."""

    @property
    def direction(self) -> Direction:
        chosen = self.selection.score
        vector = self.candidates[chosen.position, chosen.layer].float().clone()
        return Direction(vector, chosen.layer, chosen.position, self.chat.model_id)


def _silent(description: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    return nullcontext(lambda done: None)


def extract(
    model: str | ChatModel | Config = Config(), *, prompts: PromptSets | None = None, progress: Progress = _silent
) -> Extraction:
    """Find the refusal direction of a chat model.

    Args:
        model: a Hub id, a folder or "demo"; a loaded chat model; or a whole configuration.
        prompts: the prompts to use; None gathers those of the configuration.
        progress: called once for each pass over the weights.

    Raises RefusalDirectionError: see refusal_direction.errors for every case.
    """
    config, chat = _resolve(model)
    clock = _Clock()
    with clock("prompts"):
        prompts = prompts or prompt_sources.gather(
            config.prompts, config.model.model_id, progress=progress is not _silent
        )
    with clock("model"):
        chat = chat or load_chat_model(config.model)
        stream = ResidualStream(chat.model)
        tokens = _tokens(config, chat, prompts)
        engine = Engine(stream, [chat.inputs(prompt.text) for prompt in prompts.everything], config.batch_size)
    with clock("baseline"):
        baseline = _baseline(engine, chat, tokens, prompts, progress)
        kept = keep_fitting(baseline.refusal, prompts.indices(), skip=config.skip_filter)
    candidates = _candidates(baseline, kept)
    with clock("interventions"):
        scores = _scores(engine, tokens, candidates, baseline, kept, progress)
    means = _means(scores, *candidates.shape[:2])
    return Extraction(
        config=config,
        chat=chat,
        prompts=prompts,
        kept=kept,
        tokens=tokens,
        baseline=replace(baseline, activations=torch.empty(0), logits={}),
        candidates=candidates,
        scores=scores,
        means=means,
        selection=select(means, candidates.shape[1], config.thresholds),
        engine=engine.name,
        leak=engine.leak,
        seconds=clock.seconds,
        peak_memory=peak_bytes(execution_device(chat.model)),
    )


def _resolve(model: str | ChatModel | Config) -> tuple[Config, ChatModel | None]:
    if isinstance(model, Config):
        return model, None
    model_id = model if isinstance(model, str) else model.model_id
    config = Config()
    return replace(config, model=replace(config.model, model_id=model_id)), None if isinstance(model, str) else model


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begin


def _tokens(config: Config, chat: ChatModel, prompts: PromptSets) -> RefusalTokens:
    if config.calibrate_refusal:
        return refusal_tokens.calibrated(chat, [prompt.text for prompt in prompts.harmful_train])
    return refusal_tokens.chosen(chat, config.refusal_tokens)


def _baseline(
    engine: Engine, chat: ChatModel, tokens: RefusalTokens, prompts: PromptSets, progress: Progress
) -> Baseline:
    indices = prompts.indices()
    total = len(prompts.everything) * len(engine.stream.layers)
    with progress("Sweep 1 of 2: baseline", total) as tick:
        return measure_baseline(
            engine,
            tokens,
            len(chat.eoi_tokens),
            observed=indices["harmful_train"] + indices["harmless_train"],
            kept=indices["harmless_val"],
            tick=tick,
        )


def _candidates(baseline: Baseline, kept: dict[str, list[int]]) -> Float[Tensor, "position layer d_model"]:
    return mean_difference(baseline.activations[kept["harmful_train"]], baseline.activations[kept["harmless_train"]])


def _scores(
    engine: Engine,
    tokens: RefusalTokens,
    candidates: Float[Tensor, "position layer d_model"],
    baseline: Baseline,
    kept: dict[str, list[int]],
    progress: Progress,
) -> Scores:
    n_positions, n_layers, _ = candidates.shape
    flat = Candidates(candidates.flatten(0, 1), tuple(range(n_layers)) * n_positions)
    rows = intervention_rows(flat, harmful=kept["harmful_val"], harmless=kept["harmless_val"])
    with progress("Sweep 2 of 2: interventions", engine.work(rows, flat)) as tick:
        return score_candidates(engine, tokens, flat, rows, baseline, kept, tick)


def _means(scores: Scores, n_positions: int, n_layers: int) -> tuple[CandidateScore, ...]:
    columns = [part.mean(dim=1).tolist() for part in (scores.ablation, scores.steering, scores.kl)]
    return tuple(
        CandidateScore(position - n_positions, layer, *(column[position * n_layers + layer] for column in columns))
        for position in range(n_positions)
        for layer in range(n_layers)
    )
