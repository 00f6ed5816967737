"""The model's inputs for a run's prompts, and its logits, checked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.errors import PromptError, TokenizerError, UnsupportedModelError
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.layers import n_embeddings
from refusal_direction.models.placement import not_finite
from refusal_direction.prompts.sets import PromptSets

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["check_finite", "inputs_of"]

log = logging.getLogger(__name__)


def inputs_of(chat: ChatModel, prompts: PromptSets) -> list[dict[str, Tensor]]:
    """The model's inputs for every train and validation prompt.

    Raises PromptError for a prompt that has more tokens than the model has positions, or does not end in the end-of-instruction
    tokens; TokenizerError for one with a token that the model does not have.
    """
    inputs, eoi = [], list(chat.eoi_tokens)
    _warn_of_control_tokens(chat, prompts)
    for prompt in prompts.for_selection:
        inputs.append(chat.inputs(prompt))
        ids = inputs[-1]["input_ids"]
        if ids.shape[1] > chat.most_tokens:
            raise PromptError(
                f"{prompt.id} has {ids.shape[1]} tokens, but {chat.model_id} takes {chat.most_tokens}. Leave it out, or shorten it."
            )
        if eoi and ids[0, -len(eoi) :].tolist() != eoi:
            raise PromptError(
                f"The end of {prompt.id} and the text that the chat template puts after it become tokens together, so that it "
                "lacks the end-of-instruction tokens of the others. Take white space off its end, or leave it out."
            )
        if int(ids.max()) >= n_embeddings(chat.model):
            raise TokenizerError(
                f"The tokenizer of {chat.model_id} has tokens that the model does not know ({int(ids.max())}). They do not "
                "belong together: get both from the same place."
            )
    for warning in chat.template_warnings(inputs[0]["input_ids"][0].tolist()):
        log.warning("%s", warning)
    return inputs


def _warn_of_control_tokens(chat: ChatModel, prompts: PromptSets) -> None:
    found = {prompt.id: tokens for prompt in prompts.for_selection if (tokens := chat.control_tokens(prompt.text))}
    if found:
        log.warning(
            "%d of the prompts hold special tokens of %s (%s), which it reads as its own turns: %s. Take them out of these prompts.",
            len(found),
            chat.model_id,
            ", ".join(dict.fromkeys(token for tokens in found.values() for token in tokens)),
            ", ".join(list(found)[:10]) + (", ..." if len(found) > 10 else ""),
        )


def check_finite(refusal: Float[Tensor, "prompt"], chat: ChatModel) -> None:
    """Raise UnsupportedModelError if the model's own logits are not numbers, with a remedy that can help."""
    if not refusal.isnan().any():
        return
    what = (
        f"The logits of {chat.model_id} are not numbers for {int(refusal.isnan().sum())} of {len(refusal)} "
        "prompts, without any intervention."
    )
    if damaged := not_finite(chat.model):
        raise UnsupportedModelError(
            f"{what} {len(damaged)} of its weights are not finite ({', '.join(damaged[:3])}): the model's files are damaged, or "
            "it was saved so. Download it again, or use another model."
        )
    raise UnsupportedModelError(
        f"{what} " + ("Use another model." if chat.model.dtype == torch.float32 else "Try --dtype float32.")
    )
