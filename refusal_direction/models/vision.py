"""A vision-language model, and how an image and a question are put to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from refusal_direction.config import VISION
from refusal_direction.engine.residency import execution_device
from refusal_direction.errors import ChatTemplateError
from refusal_direction.models.chat import ChatModel, pinned
from refusal_direction.prompts.sets import Prompt

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RAW_PROMPTS", "VisionChatModel"]

RAW_PROMPTS = {"paligemma": "<image>answer en {question}"}
"""Families that were trained on prompts of their own instead of a chat template, by model_type."""

_NOT_FOR_FORWARD = ("labels",)


@dataclass(frozen=True)
class VisionChatModel(ChatModel):
    """A loaded vision-language model with its processor."""

    processor: Any = None

    @property
    def eoi_tokens(self) -> tuple[int, ...]:
        """None: the last tokens of the prompt are looked at, whatever they are."""
        return ()

    @property
    def n_positions(self) -> int:
        assert VISION.positions is not None
        return VISION.positions

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """The processor's tensors for an image and a question: a batch of one, on the model's device, in its dtype.

        Raises ChatTemplateError where the processor has no usable chat template.
        """
        raw = RAW_PROMPTS.get(self.model.config.model_type)
        features = self._raw(raw, prompt) if raw and self.chat_template is None else self._through_template(prompt)
        device, dtype = execution_device(self.model), self.model.dtype
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in features.items()
            if name not in _NOT_FOR_FORWARD
        }

    def _raw(self, template: str, prompt: Prompt) -> Any:
        text = template.format(question=self._plain(prompt.text))
        return self.processor(text=text, images=prompt.image, return_tensors="pt")

    def _plain(self, text: str) -> str:
        """A question that speaks of an image token does not stand for an image."""
        token = getattr(self.processor, "image_token", None)
        return text.replace(token, token.strip("<>|[]")) if token else text

    def _through_template(self, prompt: Prompt) -> Any:
        content: list[dict[str, Any]] = [{"type": "text", "text": self._plain(prompt.text)}]
        if prompt.image is not None:
            content.insert(0, {"type": "image", "image": prompt.image})
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
                chat_template=self._template(),
            )
        except (ValueError, TypeError, TemplateError) as error:
            raise ChatTemplateError(
                f"The chat template of {self.model_id}'s processor is missing or cannot be used ({error}). Use an instruction-"
                "tuned model, or pass --chat_template."
            ) from error

    def _template(self) -> str:
        own = getattr(self.processor, "chat_template", None)
        template = self.chat_template or (own.get("default") if isinstance(own, dict) else own)
        if not template:
            raise ChatTemplateError(
                f"The processor of {self.model_id} has no chat template. Use an instruction-tuned model, or pass --chat_template."
            )
        return pinned(template)

    def reply_tokens(self, reply: str) -> list[int]:
        """The tokens in which the model would write a reply."""
        return list(self.tokenizer(reply, add_special_tokens=False)["input_ids"])
