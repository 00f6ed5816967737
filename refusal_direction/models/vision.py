"""Vision-language model: weights, processor, and the template that turns an image and a question into inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from refusal_direction.config import VISION
from refusal_direction.errors import ChatTemplateError, PromptError
from refusal_direction.models.chat import SYSTEM_SAMPLE, ChatModel
from refusal_direction.models.placement import execution_device
from refusal_direction.models.templates import closing, pinned
from refusal_direction.prompts.sets import Prompt

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RAW_PROMPTS", "VisionChatModel"]

RAW_PROMPTS = {"paligemma": "<image>answer en {question}"}
"""Prompt formats of families that were trained without a chat template, by model_type."""

_NOT_FOR_FORWARD = ("labels",)
_Content = list[dict[str, Any]]


@dataclass(frozen=True)
class VisionChatModel(ChatModel):
    """A loaded vision-language model with its processor."""

    processor: Any = None

    @property
    def eoi_tokens(self) -> tuple[int, ...]:
        """Empty: candidates come from the last tokens of the prompt, whatever these are."""
        return ()

    @property
    def n_positions(self) -> int:
        """Number of last tokens that give candidates."""
        assert VISION.positions is not None
        return VISION.positions

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """The processor's tensors for an image and a question: a batch of one, on the model's device, in its dtype.

        Raises ChatTemplateError if the processor has no usable chat template, PromptError if there is no image.
        """
        if prompt.image is None:
            raise PromptError(
                f"The prompt {prompt.text[:40]!r} has no image, which {self.model_id} needs: give Prompt(id, text, image). For "
                "text alone, use load_chat_model."
            )
        features = self._through_template(prompt) if self._raw_prompt is None else self._raw(self._raw_prompt, prompt)
        device, dtype = execution_device(self.model), self.model.dtype
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in features.items()
            if name not in _NOT_FOR_FORWARD
        }

    @property
    def _raw_prompt(self) -> str | None:
        return RAW_PROMPTS.get(self.model.config.model_type) if self.chat_template is None else None

    def _raw(self, template: str, prompt: Prompt) -> Any:
        text = template.format(question=self._plain(prompt.text))
        return self.processor(text=text, images=prompt.image, return_tensors="pt")

    def _plain(self, text: str) -> str:
        """Strip the brackets off image tokens in a question, so that they do not stand for images."""
        token = getattr(self.processor, "image_token", None)
        return text.replace(token, token.strip("<>|[]")) if token else text

    def control_tokens(self, request: str) -> list[str]:
        """Special tokens in a question, which the processor encodes as such."""
        return self._control.within(self._plain(request))

    def _through_template(self, prompt: Prompt) -> Any:
        content: _Content = [
            {"type": "image", "image": prompt.image},
            {"type": "text", "text": self._plain(prompt.text)},
        ]
        template = pinned(self._own_template(), self.thinking).removesuffix("\n")
        end = f"{{{{ {json.dumps(self._closing())} }}}}"
        return self._applied(
            content, tokenize=True, return_dict=True, return_tensors="pt", chat_template=template + end
        )

    def render(self, request: str) -> str:
        """Render a question with the template, as text, before the processor inserts the image."""
        if self._raw_prompt is not None:
            return self._raw_prompt.format(question=request)
        template = pinned(self._own_template(), self.thinking)
        return str(self._applied([{"type": "image"}, {"type": "text", "text": request}], chat_template=template))

    def _applied(self, content: _Content, *, system_as_text: bool | None = None, **settings: Any) -> Any:
        """Apply the processor's template to the user's message, after the system message if there is one."""
        messages = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            as_text = self._system_as_text if system_as_text is None else system_as_text
            parts = [{"type": "text", "text": self.system_prompt}]
            messages.insert(0, {"role": "system", "content": self.system_prompt if as_text else parts})
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, **settings)
        except (ValueError, TypeError, TemplateError) as error:
            raise ChatTemplateError(
                f"The chat template of {self.model_id}'s processor is missing or cannot be used ({error}). Use an instruction-"
                "tuned model, or pass --chat_template."
            ) from error

    @cached_property
    def _system_as_text(self) -> bool:
        """Whether the template renders a system message given as plain text; others need a list of parts."""
        try:
            rendered = replace(self, system_prompt=SYSTEM_SAMPLE)._applied(
                [{"type": "image"}, {"type": "text", "text": "Hello"}],
                system_as_text=True,
                chat_template=pinned(self._own_template()),
            )
        except ChatTemplateError:
            return False
        return SYSTEM_SAMPLE in rendered

    def _closing(self) -> str:
        return closing(self.render("Hello"), self.thinking)

    @cached_property
    def _ignores_generation_prompt(self) -> bool:
        """False: processors' templates begin the reply themselves."""
        return False

    def _own_template(self) -> str:
        if self._raw_prompt is not None:
            return self._raw_prompt
        own = getattr(self.processor, "chat_template", None)
        template = self.chat_template or (own.get("default") if isinstance(own, dict) else own)
        if not template:
            raise ChatTemplateError(
                f"The processor of {self.model_id} has no chat template. Use an instruction-tuned model, or pass --chat_template."
            )
        return str(template)

    def reply_tokens(self, reply: str) -> list[int]:
        """Token ids of a reply."""
        return list(self.tokenizer(reply, add_special_tokens=False)["input_ids"])
