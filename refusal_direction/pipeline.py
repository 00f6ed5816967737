"""The story: from a chat model and prompts to the refusal direction, one line a stage."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction import prompts as prompt_sources
from refusal_direction.config import VISION_CONFIG, Config
from refusal_direction.directions import in_own_dtype, mean_difference
from refusal_direction.engine import Engine
from refusal_direction.engine.interventions import ResidualStream, eagerly, intervened
from refusal_direction.errors import (
    ConfigurationError,
    PromptError,
    TokenizerError,
    TooFewPromptsError,
    UnsupportedModelError,
)
from refusal_direction.models import refusal_tokens
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.loading import check_access, load
from refusal_direction.models.placement import execution_device
from refusal_direction.models.refusal_tokens import ProbabilityQuartiles, RefusalTokens
from refusal_direction.models.vision import VisionChatModel
from refusal_direction.prompts.sets import PromptSets
from refusal_direction.runtime import processes
from refusal_direction.runtime.checkpoints import Checkpoints, fingerprint
from refusal_direction.runtime.log import StageTimer, recorded_warnings
from refusal_direction.runtime.memory import peak_bytes
from refusal_direction.runtime.store import NO_CHECKPOINTS, CheckpointStore
from refusal_direction.scoring.passes import Progress
from refusal_direction.scoring.scores import Baseline, Scores, ScoringContext, baseline_bytes, measure_baseline
from refusal_direction.selection.rules import CandidateScore, Selection, keep_fitting, layer_limit
from refusal_direction.selection.searches import SelectionResult, search_name, select_direction

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Direction", "RunResult", "Prepared", "Progress", "extract", "prepare"]

log = logging.getLogger(__name__)


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
class RunResult:
    """Everything a run found out."""

    config: Config
    chat: ChatModel = field(repr=False)
    prompts: PromptSets = field(repr=False)
    """All prompts drawn, before the filter."""
    kept: dict[str, list[int]] = field(repr=False)
    """For each set, the prompts that the filter left, as places in `prompts.everything`."""
    tokens: RefusalTokens
    mass: dict[str, ProbabilityQuartiles]
    """What probability the tokens hold on "harmful" and on "harmless" prompts."""
    baseline: Baseline = field(repr=False)
    candidates: Float[Tensor, "position layer d_model"] = field(repr=False)
    choice: SelectionResult = field(repr=False)
    """Which candidate was chosen, and the scores that it was chosen by."""
    engine: str
    """Which engine ran."""
    leak: float
    """Largest share of an ablated stream found along its direction."""
    warnings: tuple[str, ...]
    """What was warned of on the way, as where a condition was relaxed."""
    seconds: dict[str, float]
    """Wall time of each stage."""
    peak_memory: int
    """Most memory held at once, in bytes."""

    def __str__(self) -> str:
        """The table that the command prints."""
        from refusal_direction.output.text import results

        return results(self)

    @property
    def scores(self) -> Scores:
        return self.choice.scores

    @property
    def means(self) -> tuple[CandidateScore, ...]:
        """Mean scores in (position, layer) order."""
        return self.choice.means

    @property
    def selection(self) -> Selection:
        return self.choice.selection

    @property
    def direction(self) -> Direction:
        chosen = self.selection.score
        vector = self.candidates[chosen.position, chosen.layer].float().clone()
        return Direction(vector, chosen.layer, chosen.position, self.chat.model_id)


def _silent(description: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    return nullcontext(lambda done: None)


def extract(
    model: str | os.PathLike[str] | ChatModel,
    config: Config | None = None,
    *,
    prompts: PromptSets | None = None,
    progress: Progress | None = None,
    unfinished: str | Path | None = None,
) -> RunResult:
    """Find the refusal direction of a chat model.

    Args:
        model: a Hub id, a folder or "demo"; or a loaded chat model.
        config: every other setting; None for the defaults.
        prompts: the prompts to use; None gathers those of the configuration.
        progress: called once for each pass over the weights; None shows nothing.
        unfinished: a folder to keep finished parts in, for `Config.resume`, until `checkpoints.forget` removes them; None keeps
            nothing.

    Raises RefusalDirectionError: see refusal_direction.errors for every case.
    """
    config, chat = _resolve(model, config)
    given = chat is not None
    search_name(config)  # an unknown search is found out before the work
    with processes.joined(), recorded_warnings() as warnings, _left_alone(chat), in_own_dtype():
        ready = prepare(config, chat=chat, prompts=prompts, progress=progress is not None)
        clock = StageTimer(dict(ready.seconds))
        progress = progress or _silent
        chat, prompts, tokens, engine = ready.chat, ready.prompts, ready.tokens, ready.engine
        _check_layers(config, len(engine.stream.layers))
        store = NO_CHECKPOINTS if unfinished is None else _checkpoints(Path(unfinished), config, ready, given=given)
        with clock("baseline"):
            baseline = _baseline(ready, progress, store)
            _check_finite(baseline, chat)
            mass = _mass(baseline, prompts, tokens)
            kept = keep_fitting(baseline.refusal, prompts.indices(), skip=config.skip_filter, rules=config.rules)
        candidates = _candidates(baseline, kept)
        with clock("interventions"):
            choice = select_direction(
                ScoringContext(engine, tokens, candidates, baseline, kept, store), config, progress=progress
            )
        leak = processes.all_max(engine.leak)
        for message in processes.gather_warnings(warnings):
            log.warning("%s", message)
    return RunResult(
        config=config,
        chat=chat,
        prompts=prompts,
        kept=kept,
        tokens=tokens,
        mass=mass,
        baseline=replace(baseline, activations=torch.empty(0), logits={}),
        candidates=candidates,
        choice=choice,
        engine=engine.name,
        leak=leak,
        warnings=tuple(warnings),
        seconds=clock.seconds,
        peak_memory=peak_bytes(execution_device(chat.model)),
    )


@dataclass(frozen=True)
class Prepared:
    """All that is needed before the first sweep."""

    chat: ChatModel
    prompts: PromptSets
    tokens: RefusalTokens
    engine: Engine
    seconds: dict[str, float]
    """Wall time of gathering prompts, and of loading and looking at the model."""


def prepare(
    config: Config,
    *,
    chat: ChatModel | None = None,
    prompts: PromptSets | None = None,
    progress: bool = False,
) -> Prepared:
    """Gather prompts, load the model, find its residual stream and its refusal tokens.

    Whether the model can be had is found out first: prompts may be a long download, too.

    Args:
        config: names the model and the prompts.
        chat: the model, if it is loaded already.
        prompts: the prompts, likewise.
        progress: whether downloads show bars.
    """
    clock = StageTimer()
    if not isinstance(prompts, PromptSets | None):
        raise PromptError(f"prompts must be PromptSets(harmful_train=..., ...), not a {type(prompts).__name__}.")
    if chat is None:
        with clock("model"):
            check_access(config.model)
    with clock("prompts"):
        prompts = prompts or prompt_sources.gather(config, progress=progress)
    if not all(prompts.indices().values()):
        raise TooFewPromptsError("A set of prompts is empty. Each of the four needs at least one.")
    with clock("model"):
        chat = chat or load(config)
        stream = ResidualStream(chat.model)
        tokens = _tokens(config, chat, prompts)
        reserved = baseline_bytes(
            stream,
            n_activations=len(prompts.harmful_train) + len(prompts.harmless_train),
            n_positions=chat.n_positions,
            n_logits=len(prompts.harmless_val),
        )
        engine = Engine(
            stream,
            _inputs(chat, prompts),
            batch_size=config.batch_size,
            memory=config.memory_budget,
            reserved_bytes=reserved,
            observed_tokens=chat.n_positions,
        )
    return Prepared(chat, prompts, tokens, engine, clock.seconds)


def _resolve(model: str | os.PathLike[str] | ChatModel, config: Config | None) -> tuple[Config, ChatModel | None]:
    """The whole configuration, and the model if it is loaded.

    Raises ConfigurationError where the configuration is for models of the other kind.
    """
    if not isinstance(model, str | os.PathLike | ChatModel):
        raise ConfigurationError(
            f"extract needs a chat model or a model's id, not a {type(model).__name__}. Load it by load_chat_model or "
            "load_vision_model, or make a ChatModel(model, tokenizer, model_id)."
        )
    if isinstance(model, str | os.PathLike):
        config = Config() if config is None else config
        return replace(config, model=replace(config.model, model_id=str(model))), None
    images = isinstance(model, VisionChatModel)
    config = config or (VISION_CONFIG if images else Config())
    if config.rules.images != images:
        raise ConfigurationError(
            "The configuration is for images with text, but the model was loaded by load_chat_model. Load it by "
            "load_vision_model."
            if config.rules.images
            else "The model was loaded by load_vision_model, but the configuration is for text. Derive it from "
            "refusal_direction.config.VISION_CONFIG: dataclasses.replace(VISION_CONFIG, ...)."
        )
    return replace(config, model=replace(config.model, model_id=model.model_id)), model


@contextmanager
def _left_alone(chat: ChatModel | None) -> Iterator[None]:
    """Within the context the model is as it answers: without dropout, not compiled. Afterwards it is as it was.

    Raises ConfigurationError inside of an intervention, whose effect would be measured as the model's own.
    """
    if chat is None:
        yield
        return
    if intervened(chat.model):
        raise ConfigurationError("extract was called within `ablated` or `steered`. End those contexts first.")
    training = [module for module in chat.model.modules() if module.training]
    chat.model.eval()
    try:
        with eagerly():
            yield
    finally:
        for module in training:
            module.training = True


def _inputs(chat: ChatModel, prompts: PromptSets) -> list[dict[str, Tensor]]:
    """What the model is given for each prompt.

    Raises PromptError where a prompt has more tokens than the model has positions, or does not end in the end-of-instruction
    tokens; TokenizerError where it has a token that the model does not have.
    """
    inputs, eoi = [], list(chat.eoi_tokens)
    for prompt in prompts.everything:
        inputs.append(chat.inputs(prompt))
        ids = inputs[-1]["input_ids"]
        if ids.shape[1] > chat.most_tokens:
            raise PromptError(
                f"{prompt.id} has {ids.shape[1]} tokens, but {chat.model_id} takes {chat.most_tokens}. Leave it out, or shorten it."
            )
        if eoi and ids[0, -len(eoi) :].tolist() != eoi:
            raise PromptError(
                f"The end of {prompt.id} and what the chat template puts after it become tokens together, so that it lacks the end-"
                "of-instruction tokens of the others. Take white space off its end, or leave it out."
            )
        if int(ids.max()) >= chat.model.get_input_embeddings().num_embeddings:
            raise TokenizerError(
                f"The tokenizer of {chat.model_id} has tokens that the model does not know ({int(ids.max())}). They do not "
                "belong together: get both from the same place."
            )
    return inputs


def _check_layers(config: Config, n_layers: int) -> None:
    """Raise ConfigurationError where no layer may be selected from; for images that condition is dropped if need be."""
    if layer_limit(n_layers, config.thresholds) < 1 and not config.rules.relative_steering:
        raise ConfigurationError(
            f"--prune_layers {config.thresholds.prune_layers:g} leaves none of {n_layers} layers to choose from. Lower it."
        )


def _check_finite(baseline: Baseline, chat: ChatModel) -> None:
    """Raise UnsupportedModelError where the model's own logits are not numbers."""
    if baseline.refusal.isnan().any():
        raise UnsupportedModelError(
            f"The logits of {chat.model_id} are not numbers for {int(baseline.refusal.isnan().sum())} of "
            f"{len(baseline.refusal)} prompts, without any intervention. Try --dtype float32."
        )


def _tokens(config: Config, chat: ChatModel, prompts: PromptSets) -> RefusalTokens:
    if config.calibrate_refusal:
        return refusal_tokens.calibrate(chat, prompts.harmful_train, config.rules, at_once=config.batch_size)
    return refusal_tokens.resolve(chat, config.refusal_tokens, config.rules)


def _checkpoints(folder: Path, config: Config, ready: Prepared, *, given: bool) -> Checkpoints:
    sets = ready.prompts.indices()
    same = fingerprint(config, ready.chat, ready.engine.prompts, ready.tokens, sets=sets, given=given)
    return Checkpoints(folder, same, resume=config.resume)


def _baseline(ready: Prepared, progress: Progress, store: CheckpointStore) -> Baseline:
    indices, engine = ready.prompts.indices(), ready.engine
    total = len(ready.prompts.everything) * len(engine.stream.layers)
    with progress("Sweep 1: baseline", total) as tick:
        return measure_baseline(
            engine,
            ready.tokens,
            n_positions=ready.chat.n_positions,
            activations_of=indices["harmful_train"] + indices["harmless_train"],
            logits_of=indices["harmless_val"],
            tick=tick,
            store=store,
        )


def _mass(baseline: Baseline, prompts: PromptSets, tokens: RefusalTokens) -> dict[str, ProbabilityQuartiles]:
    """What probability the refusal tokens hold on each kind of prompts; warns where it says that they are the wrong ones."""
    places = prompts.indices()
    kinds = {
        kind: ProbabilityQuartiles.of(baseline.mass[places[f"{kind}_train"] + places[f"{kind}_val"]])
        for kind in ("harmful", "harmless")
    }
    if doubted := refusal_tokens.diagnose(tokens, **kinds):
        log.warning("%s", doubted)
    return kinds


def _candidates(baseline: Baseline, kept: dict[str, list[int]]) -> Float[Tensor, "position layer d_model"]:
    return mean_difference(baseline.activations[kept["harmful_train"]], baseline.activations[kept["harmless_train"]])
