"""The parts of a run's record that are read off the model, the prompts and the environment."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from refusal_direction.models.chat import ChatModel
from refusal_direction.models.gguf import weight_type
from refusal_direction.models.placement import execution_device
from refusal_direction.models.refusal_tokens import ProbabilityQuartiles
from refusal_direction.prompts.sets import SETS, SETS_FOR_SELECTION, Kind, PromptSet, PromptSets, Split
from refusal_direction.results import ModelRecord, PromptRecord, Token
from refusal_direction.scoring.baseline import Baseline

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["eoi_tokens", "model_record", "prompt_records", "refusal_probability", "train_activations", "versions"]


def model_record(chat: ChatModel, *, n_layers: int, d_model: int) -> ModelRecord:
    """The record of a model."""
    return ModelRecord(
        model_id=chat.model_id,
        revision=chat.revision,
        architecture=type(chat.model).__name__,
        dtype=str(chat.model.dtype).removeprefix("torch."),
        device=str(execution_device(chat.model)),
        adapter=chat.adapter,
        quantization=_quantization(chat),
        n_layers=n_layers,
        n_positions=chat.n_positions,
        d_model=d_model,
    )


def _quantization(chat: ChatModel) -> dict[str, Any] | None:
    """The quantisation of the weights: by a checkpoint, while they were loaded, or in the GGUF file that they are from."""
    if chat.gguf_types is not None:
        return {"quant_method": "gguf", "weights": weight_type(chat.gguf_types), "types": dict(chat.gguf_types)}
    found = getattr(chat.model.config, "quantization_config", None)
    if found is None:
        return None
    plain: dict[str, Any] = json.loads(json.dumps(found if isinstance(found, dict) else found.to_dict(), default=str))
    return plain


def eoi_tokens(chat: ChatModel) -> tuple[Token, ...]:
    """The end-of-instruction tokens of a model."""
    return tuple(Token(token, chat.text_of(token)) for token in chat.eoi_tokens)


def prompt_records(
    prompts: PromptSets,
    kept: Mapping[PromptSet, Sequence[int]],
    baseline: Baseline,
    *,
    asked: Mapping[PromptSet, int],
) -> dict[PromptSet, PromptRecord]:
    """The records of all sets of prompts.

    Args:
        prompts: as drawn.
        kept: the prompts that the filter left.
        baseline: of the train and validation prompts.
        asked: the number of train and validation prompts drawn at first.
    """
    indices, records = prompts.indices(), {}
    for which in SETS:
        size = len(prompts[which])
        if which in SETS_FOR_SELECTION:
            own, left = indices[which], [index - indices[which][0] for index in kept[which]]
            refusal, probability = baseline.refusal[own], baseline.probability[own]
        else:
            left = list(range(size))
            refusal = probability = torch.full((size,), torch.nan, dtype=torch.float64)
        ids = tuple(prompt.id for prompt in prompts[which])
        further = size - asked.get(which, size)
        records[which] = PromptRecord(ids, tuple(left), prompts.digest(which), refusal, probability, further)
    return records


def refusal_probability(prompts: PromptSets, baseline: Baseline) -> dict[Kind, ProbabilityQuartiles]:
    """Quartiles of the refusal tokens' probability over the train and validation prompts of each kind."""
    indices = prompts.indices()
    members = {kind: indices[kind, Split.TRAIN] + indices[kind, Split.VALIDATION] for kind in Kind}
    return {kind: ProbabilityQuartiles.of(baseline.probability[own]) for kind, own in members.items()}


def train_activations(
    baseline: Baseline, prompts: PromptSets
) -> dict[Kind, Float[Tensor, "prompt position layer d_model"]]:
    """The activations of the training prompts drawn."""
    indices = prompts.indices()
    return {kind: baseline.activations_at(indices[kind, Split.TRAIN]) for kind in Kind}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that scores depend on; None for those not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("refusal-direction", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "gguf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout, or not installed
            found[name] = None
    return found
