"""The pipeline: from a chat model and prompts to the refusal direction, one line a stage."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from refusal_direction import prompts as prompt_sources
from refusal_direction.candidates import Candidates
from refusal_direction.config import VISION_CONFIG, Config, search_name
from refusal_direction.directions import in_own_dtype
from refusal_direction.engine import Engine, Tick
from refusal_direction.engine.interventions import ResidualStream, eagerly, intervened
from refusal_direction.errors import (
    ConfigurationError,
    PromptError,
    TooFewPromptsError,
)
from refusal_direction.fingerprint import fingerprint
from refusal_direction.methods import check_methods, make_candidates
from refusal_direction.models import refusal_tokens
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.inputs import check_finite, inputs_of
from refusal_direction.models.loading import check_access, load
from refusal_direction.models.placement import execution_device
from refusal_direction.models.refusal_tokens import ProbabilityQuartiles, RefusalTokens
from refusal_direction.models.vision import VisionChatModel
from refusal_direction.prompts.sets import Kind, PromptSets, Split
from refusal_direction.records import (
    eoi_tokens,
    model_record,
    prompt_records,
    refusal_probability,
    train_activations,
    versions,
)
from refusal_direction.results import EngineRecord, RunResult
from refusal_direction.runtime import processes
from refusal_direction.runtime.checkpoints import Checkpoints
from refusal_direction.runtime.log import RunLog, StageTimer, recorded_warnings
from refusal_direction.runtime.memory import peak_bytes
from refusal_direction.runtime.store import NO_CHECKPOINTS, CheckpointStore, Scoped
from refusal_direction.scoring.baseline import Baseline, baseline_bytes, measure_baseline
from refusal_direction.scoring.passes import Progress
from refusal_direction.scoring.requests import ScoringContext
from refusal_direction.selection.conditions import check_layers
from refusal_direction.selection.filter import filter_prompts, warn_few
from refusal_direction.selection.refill import refill
from refusal_direction.selection.searches import select_direction

if TYPE_CHECKING:
    pass

__all__ = ["Prepared", "Progress", "extract", "prepared", "run"]

log = logging.getLogger(__name__)


def _silent(description: str, total: int) -> AbstractContextManager[Tick]:
    return nullcontext(lambda done: None)


def extract(
    model: str | os.PathLike[str] | ChatModel,
    config: Config | None = None,
    *,
    prompts: PromptSets | None = None,
    progress: Progress | None = None,
    checkpoint_dir: str | Path | None = None,
) -> RunResult:
    """Find the refusal direction of a chat model.

    Args:
        model: a Hub id, a folder or "demo"; or a loaded chat model.
        config: every other setting; None for the defaults.
        prompts: the prompts to use; None gathers those of the configuration.
        progress: called once for each pass over the weights; None shows nothing.
        checkpoint_dir: a folder for checkpoints, which `Config.resume` uses and `runtime.checkpoints.forget` removes; None
            keeps none.

    Where no candidate meets every condition, the result has every score but no direction; asking for it raises NoCandidateError
    with the nearest misses.

    Raises RefusalDirectionError: see refusal_direction.errors for every case.
    """
    with prepared(model, config, prompts=prompts, progress=progress is not None) as ready:
        return run(ready, progress=progress, checkpoint_dir=checkpoint_dir)


@dataclass(frozen=True)
class Prepared:
    """Inputs of the first pass."""

    config: Config
    chat: ChatModel
    prompts: PromptSets
    tokens: RefusalTokens
    engine: Engine
    hash_weights: bool
    """Whether the model was given in memory, so that only its weights tell it from others."""
    seconds: dict[str, float] = field(repr=False)
    """Wall time of gathering prompts and of loading the model."""
    warnings: list[str] = field(repr=False)
    """The warnings of this and all later stages, in the order logged."""


@contextmanager
def prepared(
    model: str | os.PathLike[str] | ChatModel,
    config: Config | None = None,
    *,
    prompts: PromptSets | None = None,
    progress: bool = False,
) -> Iterator[Prepared]:
    """Gather prompts, load the model, and find its residual stream and its refusal tokens.

    Within the context the processes of the run are joined, warnings are recorded, and a model given in memory runs in eval
    mode, uncompiled.

    Args:
        model: as for `extract`.
        config: as for `extract`.
        prompts: as for `extract`.
        progress: whether downloads show bars.

    Raises ConfigurationError, PromptError, ModelError, OutOfMemoryError.
    """
    config, chat = _resolve(model, config)
    search_name(config)  # raises before the work, not after it
    check_methods(config.methods)
    with ExitStack() as contexts:
        contexts.enter_context(processes.joined())
        warnings = contexts.enter_context(recorded_warnings())
        contexts.enter_context(_eval_mode(chat))
        contexts.enter_context(in_own_dtype())
        yield _prepare(config, chat, prompts, progress, warnings)


def run(ready: Prepared, *, progress: Progress | None = None, checkpoint_dir: str | Path | None = None) -> RunResult:
    """Run the method on prepared inputs; the arguments are those of `extract`.

    Raises ConfigurationError, TooFewPromptsError, UnsupportedModelError, OutOfMemoryError.
    """
    config, timer = ready.config, RunLog(dict(ready.seconds))
    asked = {which: len(members) for which, members in ready.prompts.indices().items()}
    if config.resume and checkpoint_dir is None:
        raise ConfigurationError("resume needs checkpoint_dir: the folder with the checkpoints of the interrupted run.")
    progress = progress or _silent
    store = NO_CHECKPOINTS if checkpoint_dir is None else _checkpoints(Path(checkpoint_dir), ready)
    with timer("baseline"):
        baseline = _baseline(ready, progress, store, timer)
        check_finite(baseline.refusal, ready.chat)
        ready, baseline, store = _refilled(ready, baseline, progress, store, timer)
        probability = _diagnosed(baseline, ready)
        sets = ready.prompts.indices()
        kept = filter_prompts(
            baseline.refusal,
            sets,
            skip=config.skip_filter,
            rules=config.rules,
            asked=asked,
            calibrated=config.calibrate_refusal,
        )
        warn_few(kept, sets, asked)
    engine = ready.engine
    candidates = make_candidates(config.methods, *(baseline.activations_at(kept[kind, Split.TRAIN]) for kind in Kind))
    context = ScoringContext(engine, ready.tokens.ids, candidates, baseline, kept, store, timer)
    with timer("interventions"):
        selection, scores = select_direction(context, config, progress=progress)
    leak = processes.all_max(max(engine.leak, timer.leak))
    for message in processes.gather_warnings(ready.warnings):
        log.warning("%s", message)
    return RunResult(
        config=config,
        model=model_record(ready.chat, n_layers=len(engine.stream.layers), d_model=engine.stream.skeleton.d_model),
        template=ready.chat.template_settings,
        eoi_tokens=eoi_tokens(ready.chat),
        refusal_tokens=ready.tokens,
        refusal_probability=probability,
        prompts=prompt_records(ready.prompts, kept, baseline, asked=asked),
        candidates=Candidates(candidates.vectors.float().cpu(), candidates.labels),
        scores=scores,
        selection=selection,
        engine=EngineRecord(engine.name, leak, processes.size()),
        warnings=tuple(dict.fromkeys(ready.warnings)),
        seconds=timer.seconds,
        peak_memory_bytes=peak_bytes(execution_device(ready.chat.model)),
        versions=versions(),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        activations=train_activations(baseline, ready.prompts) if config.keep_activations else None,
    )


def _prepare(
    config: Config, chat: ChatModel | None, prompts: PromptSets | None, progress: bool, warnings: list[str]
) -> Prepared:
    """Check access to the model before downloading prompts."""
    timer, given = StageTimer(), chat is not None
    if not isinstance(prompts, PromptSets | None):
        raise PromptError(f"prompts must be PromptSets(harmful_train=..., ...), not a {type(prompts).__name__}.")
    if chat is None:
        with timer("model"):
            check_access(config.model)
    with timer("prompts"):
        prompts = prompts or prompt_sources.gather(config, progress=progress)
        if config.skip_filter or config.no_refill:
            prompts = replace(prompts, reserves={})
    if not all(prompts.indices().values()):
        raise TooFewPromptsError("A set of prompts is empty. Each train and validation set needs at least one.")
    with timer("model"):
        chat = chat or load(config)
        stream = ResidualStream(chat.model)
        check_layers(config, len(stream.layers))
        tokens = _tokens(config, chat, prompts)
        engine = _engine(config, chat, prompts, stream)
    return Prepared(config, chat, prompts, tokens, engine, given, timer.seconds, warnings)


def _engine(config: Config, chat: ChatModel, prompts: PromptSets, stream: ResidualStream) -> Engine:
    n_train = sum(len(prompts[kind, Split.TRAIN]) for kind in Kind)
    n_logits = len(prompts[Kind.HARMLESS, Split.VALIDATION])
    return Engine(
        stream,
        inputs_of(chat, prompts),
        batch_size=config.batch_size,
        memory=config.memory_budget,
        reserved_bytes=baseline_bytes(stream, n_activations=n_train, n_positions=chat.n_positions, n_logits=n_logits),
        observed_tokens=chat.n_positions,
        keep=search_name(config) != "exhaustive",
    )


def _resolve(model: str | os.PathLike[str] | ChatModel, config: Config | None) -> tuple[Config, ChatModel | None]:
    """The whole configuration, and the model if it is loaded.

    Raises ConfigurationError if the configuration is for models of the other kind.
    """
    if not isinstance(model, str | os.PathLike | ChatModel):
        raise ConfigurationError(
            f"extract needs a chat model or a model's id, not a {type(model).__name__}. Load it by load_chat_model or "
            "load_vision_model, or make a ChatModel(model, tokenizer, model_id)."
        )
    if not isinstance(config, Config | None):
        raise ConfigurationError(
            f"extract needs a Config, not a {type(config).__name__}: extract(model, Config(search='pruned'))."
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
def _eval_mode(chat: ChatModel | None) -> Iterator[None]:
    """Run the model in eval mode, uncompiled; restore it on exit.

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


def _tokens(config: Config, chat: ChatModel, prompts: PromptSets) -> RefusalTokens:
    if config.calibrate_refusal:
        return refusal_tokens.calibrate(chat, prompts.harmful_train, config.rules, at_once=config.batch_size)
    return refusal_tokens.resolve(chat, config.refusal_tokens, config.rules)


def _checkpoints(folder: Path, ready: Prepared) -> Checkpoints:
    same = fingerprint(
        ready.config,
        ready.chat,
        ready.engine.prompts,
        ready.tokens,
        sets=ready.prompts.indices(),
        hash_weights=ready.hash_weights,
    )
    return Checkpoints(folder, same, resume=ready.config.resume)


def _refilled(
    ready: Prepared, baseline: Baseline, progress: Progress, store: CheckpointStore, timer: RunLog
) -> tuple[Prepared, Baseline, CheckpointStore]:
    """Draw further prompts where fewer than half of a set pass the filter, and make the engine of all."""
    latest = ready

    def measure(more: PromptSets) -> Baseline:
        nonlocal latest
        latest = _with_prompts(latest, more)
        key = f"baseline-{_prompts_key(store, latest.engine)}"
        found = _baseline(latest, progress, store, timer, name="Pass 1: further prompts", key=key)
        check_finite(found.refusal, ready.chat)
        return found

    refilled = refill(ready.prompts, baseline, measure)
    if latest is ready:
        return ready, baseline, store
    ready = _with_prompts(latest, refilled.prompts)
    return ready, refilled.baseline, Scoped(store, _prompts_key(store, ready.engine))


def _with_prompts(ready: Prepared, prompts: PromptSets) -> Prepared:
    """The same inputs with other prompts, and an engine for them that runs as the engine before."""
    engine = _engine(ready.config, ready.chat, prompts, ready.engine.stream)
    engine.adopt(ready.engine.name)
    return replace(ready, prompts=prompts, engine=engine)


def _prompts_key(store: CheckpointStore, engine: Engine) -> str:
    return store.key(*(tensor for inputs in engine.prompts for _, tensor in sorted(inputs.items())))


def _baseline(
    ready: Prepared,
    progress: Progress,
    store: CheckpointStore,
    timer: RunLog,
    *,
    name: str = "Pass 1: baseline",
    key: str = "baseline",
) -> Baseline:
    indices, engine = ready.prompts.indices(), ready.engine
    with progress(name, len(engine.prompts) * len(engine.stream.layers)) as tick:
        return measure_baseline(
            engine,
            ready.tokens.ids,
            n_positions=ready.chat.n_positions,
            activations_of=indices[Kind.HARMFUL, Split.TRAIN] + indices[Kind.HARMLESS, Split.TRAIN],
            logits_of=indices[Kind.HARMLESS, Split.VALIDATION],
            tick=tick,
            store=store,
            key=key,
            log=timer,
        )


def _diagnosed(baseline: Baseline, ready: Prepared) -> dict[Kind, ProbabilityQuartiles]:
    """Quartiles of the refusal tokens' probability; warns if they suggest that the tokens are the wrong ones."""
    quartiles = refusal_probability(ready.prompts, baseline)
    by_name = {kind.value: found for kind, found in quartiles.items()}
    if diagnosis := refusal_tokens.diagnose(ready.tokens, **by_name, calibrated=ready.config.calibrate_refusal):
        log.warning("%s", diagnosis)
    return quartiles
