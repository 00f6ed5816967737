"""Chat model: weights, tokenizer, and the chat template that turns a request into tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from refusal_direction.errors import ChatTemplateError, OutOfMemoryError, PromptError, TokenizerError
from refusal_direction.models.control_tokens import ControlTokens
from refusal_direction.models.layers import unwrapped
from refusal_direction.models.placement import execution_device
from refusal_direction.models.templates import begins_oddly, closing, left_open, pinned, settings
from refusal_direction.prompts.sets import Prompt

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SYSTEM_SAMPLE", "ChatModel"]

# They end in different tokens, so the tokens that end all their renderings come from the template.
_ENDINGS = ("How are you", "Is it 7?", "Name a colour.", "(yes)", "the letter x", "Sing!")
_BATCH_SIZE = 32
_SAMPLE = "The quick brown fox jumps over 13 lazy dogs. Why?"
_REPLY = "Xylophones"
SYSTEM_SAMPLE = "Xylophone"
"""A word that occurs in no template."""


@dataclass(frozen=True)
class ChatModel:
    """A loaded chat model with its tokenizer and the settings of its chat template."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_id: str
    revision: str | None = None
    """Commit of the weights on the Hub; None for a local folder."""
    chat_template: str | None = None
    """Overrides the tokenizer's own template."""
    system_prompt: str | None = None
    """Text of the system message; None: the template's default."""
    thinking: bool = False
    """Whether a reasoning model thinks before it answers."""
    adapter: str | None = None
    """Folder or Hub id of the PEFT adapter on the weights; None without one."""
    gguf_types: Mapping[str, int] | None = None
    """Number of weights of each type in the GGUF file that they were read from; None for other files."""

    def render(self, request: str) -> str:
        """Render a request with the chat template, up to the beginning of the reply.

        Raises ChatTemplateError if there is no template, or if it fails.
        """
        rendered = self._rendered(self._messages(request), add_generation_prompt=True) + self._opening
        return rendered + closing(rendered, self.thinking)

    def _messages(self, request: str) -> list[dict[str, str]]:
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": request}]

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=pinned(self._own_template(), self.thinking),
            )
        except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError, TemplateError) as error:
            raise ChatTemplateError(
                f"The chat template of {self.model_id} is missing or cannot be used ({error}). Use a chat model, or pass "
                "--chat_template with a Jinja template or a file that holds one."
            ) from error
        return str(rendered)

    def _own_template(self) -> str:
        return str(self.tokenizer.get_chat_template(self.chat_template))

    @property
    def template_settings(self) -> dict[str, Any]:
        """Settings with which prompts are rendered, for run.json."""
        found = settings(self._own_template(), self.thinking)
        return {**found, "thinking_closed_with": self._closing(), "system_prompt": self.system_prompt}

    def _closing(self) -> str:
        rendered = self._rendered(self._messages("Hello"), add_generation_prompt=True) + self._opening
        return closing(rendered, self.thinking)

    @cached_property
    def _opening(self) -> str:
        """The text before a reply, for templates that write it there but ignore add_generation_prompt; otherwise empty."""
        before = self._before_reply() if self._ignores_generation_prompt else None
        return (before or "").rstrip(" ")

    def _before_reply(self) -> str | None:
        """The text that the template writes between a request and its reply; None if it does not render them in a row."""
        prompt, (before, written, _) = self._rendered(self._messages("Hello")), self._exchange(_REPLY).partition(_REPLY)
        return before.removeprefix(prompt) if written and before.startswith(prompt) else None

    @cached_property
    def _ignores_generation_prompt(self) -> bool:
        messages = self._messages("Hello")
        return self._rendered(messages) == self._rendered(messages, add_generation_prompt=True)

    def _exchange(self, reply: str) -> str:
        """A request and its reply, rendered; empty if the template takes no replies."""
        try:
            return self._rendered([*self._messages("Hello"), {"role": "assistant", "content": reply}])
        except ChatTemplateError:
            return ""

    def template_warnings(self, ids: Sequence[int]) -> Iterator[str]:
        """Warnings about the chat template.

        Args:
            ids: token ids of a prompt.
        """
        if beginning := begins_oddly(self.tokenizer, ids, self.model_id):
            yield beginning
        if self._opening:
            yield (
                f"The chat template of {self.model_id} ignores add_generation_prompt. Its prompts are followed by "
                f"{self._opening!r}, which it writes before a reply."
            )
        elif self._ignores_generation_prompt and self._before_reply() is None:
            yield (
                f"The chat template of {self.model_id} ignores add_generation_prompt, and shows no text that begins a reply. If a "
                "reply begins with one, pass --chat_template with a template that writes it."
            )
        if not self.thinking and (opener := left_open(self.render("Hello"))):
            yield (
                f"The prompts of {self.model_id} end in {opener!r}, which seems to begin thoughts, and no known text ends these: "
                "refusal scores may be read from the first token of a thought. Pass --chat_template with one that ends in the "
                "beginning of an answer."
            )

    def check_request(self) -> None:
        """Raise ChatTemplateError if the template leaves out the request."""
        if len(set(map(self.render, _ENDINGS))) == 1:
            raise ChatTemplateError(
                f"The chat template of {self.model_id} leaves out the request, so all prompts would be the same. Pass "
                "--chat_template with one that renders the user's message."
            )

    def check_system_prompt(self) -> None:
        """Raise ChatTemplateError if there is a system prompt and the template rejects or drops it."""
        if self.system_prompt is None:
            return
        replace(self, system_prompt=None).render("Hello")  # a template that always fails is another problem
        try:
            if SYSTEM_SAMPLE in replace(self, system_prompt=SYSTEM_SAMPLE).render("Hello"):
                return
            reason = "drops the system message"
        except ChatTemplateError as error:
            reason = f"rejects a system message: {error.__cause__}"
        raise ChatTemplateError(
            f"The chat template of {self.model_id} takes no --system_prompt (it {reason}). Leave it out, put the text at the "
            "beginning of your own prompts, or pass a --chat_template that supports it."
        )

    def encode(self, request: str, reply: str = "") -> list[int]:
        """Token ids of the rendered request and the start of a reply.

        Special tokens come from the template; a request's own text is encoded as text (but see `control_tokens`).
        """
        if self._control.within(request):
            plain = self._control.encode_plainly(lambda text: self.render(text) + reply, request)
            if plain is not None:
                return plain
        return list(self.tokenizer(self.render(request) + reply, add_special_tokens=False)["input_ids"])

    def control_tokens(self, request: str) -> list[str]:
        """Special tokens in a request's own text that are encoded as such, since the tokenizer offers no other way."""
        found = self._control.within(request)
        return found if found and self._control.encode_plainly(self.render, request) is None else []

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer)

    @cached_property
    def eoi_tokens(self) -> tuple[int, ...]:
        """End-of-instruction (EOI) tokens, with which the template follows every request (paper, section 2.3).

        Raises ChatTemplateError if there are none, or if the template leaves out the request.
        """
        self.check_request()
        encoded = [self.encode(request) for request in _ENDINGS]
        shared = 0
        while shared < min(map(len, encoded)) and len({tokens[-1 - shared] for tokens in encoded}) == 1:
            shared += 1
        if shared == 0:
            raise ChatTemplateError(
                f"The chat template of {self.model_id} ends with the request, so there is no end-of-instruction token "
                "from which to read the direction. Pass --chat_template with one that ends the user's turn."
            )
        return tuple(encoded[0][-shared:])

    @property
    def n_positions(self) -> int:
        """Number of last tokens that give candidates."""
        return len(self.eoi_tokens)

    def inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """The model's inputs for a prompt, (1, token) each, on the model's device.

        Raises PromptError if the prompt has an image, which this model would not see.
        """
        if prompt.image is not None:
            raise PromptError(
                f"The prompt {prompt.id!r} has an image, but {self.model_id} was loaded for text. Load it with load_vision_model."
            )
        ids = torch.tensor([self.encode(prompt.text)], device=execution_device(self.model))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def reply_tokens(self, reply: str) -> list[int]:
        """Token ids of a reply, with any space that the template puts before it (Llama 2)."""
        before = self.encode("Hello")
        after = self.encode("Hello", self._space_before(reply) + reply)
        if after[: len(before)] == before:
            return after[len(before) :]
        return list(self.tokenizer(reply, add_special_tokens=False)["input_ids"])

    def _space_before(self, reply: str) -> str:
        """The space that the template puts before a reply."""
        prompt, exchange = self.render("Hello"), self._exchange(reply)
        space = exchange[len(prompt) :].partition(reply)[0]
        return space if exchange.startswith(prompt) and space.isspace() else ""

    @property
    def most_tokens(self) -> float:
        """Number of positions of the model, for prompt and reply; infinite if its configuration does not limit them."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return math.inf if most is None else most

    def text_of(self, token: int) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([token]))

    def check_tokenizer(self) -> None:
        """Raise TokenizerError if ordinary text becomes unknown tokens, as without tokenizer files."""
        ids = set(self.tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]) - {self.tokenizer.unk_token_id}
        if len(ids) < 5:
            raise TokenizerError(
                f"The tokenizer of {self.model_id} maps ordinary text to unknown tokens: its files are missing or broken. "
                "A model folder needs tokenizer.json (or tokenizer.model) and tokenizer_config.json beside the weights."
            )

    def complete(self, prompts: Sequence[Prompt | str] | Prompt | str, max_new_tokens: int = 32) -> list[str]:
        """Greedy completions, in order; a list of one for a single request.

        Raises PromptError if the model has no position left for a reply, OutOfMemoryError.
        """
        replies = self.generate(prompts, max_new_tokens)
        return [str(text) for text in self.tokenizer.batch_decode(replies, skip_special_tokens=True)]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt | str] | Prompt | str,
        max_new_tokens: int = 32,
        *,
        at_once: int | None = None,
    ) -> list[list[int]]:
        """Token ids of greedy completions, in order.

        Prompts of equal length share a batch, so nothing is padded. Of the model's generation config only the special tokens
        apply: no penalties, beams or suppressed tokens. Completions end where the model has no position left.

        Args:
            prompts: requests, or prompts with images for a vision-language model.
            max_new_tokens: most tokens of a completion.
            at_once: most prompts of a batch; None: 32, which is also the maximum.

        Raises PromptError if the model has no position left for a reply, OutOfMemoryError.
        """
        at_once = min(at_once or _BATCH_SIZE, _BATCH_SIZE)
        prompts = [prompts] if isinstance(prompts, str | Prompt) else prompts
        inputs = [self.inputs(Prompt("", prompt) if isinstance(prompt, str) else prompt) for prompt in prompts]
        same_shape: dict[tuple[torch.Size, ...], list[int]] = {}
        for index, tensors in enumerate(inputs):
            same_shape.setdefault(tuple(tensor.shape for tensor in tensors.values()), []).append(index)
        replies: list[list[int]] = [[] for _ in prompts]
        for members in same_shape.values():
            for begin in range(0, len(members), at_once):
                some = members[begin : begin + at_once]
                batch = {name: torch.cat([inputs[index][name] for index in some]) for name in inputs[some[0]]}
                output = self._generate(batch, max_new_tokens)[:, batch["input_ids"].shape[1] :]
                for index, reply in zip(some, output.tolist(), strict=True):
                    replies[index] = reply
        return replies

    def _generate(self, batch: dict[str, Tensor], max_new_tokens: int) -> Tensor:
        length = batch["input_ids"].shape[1]
        left = self.most_tokens - length + 1  # the last new token takes none
        if left < 1:
            raise PromptError(
                f"A prompt has {length} tokens, but {self.model_id} takes {self.most_tokens}. Shorten it."
            )
        try:
            return self._greedy().generate(**batch, max_new_tokens=min(max_new_tokens, left))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise OutOfMemoryError(
                f"Out of memory while {len(batch['input_ids'])} prompts were completed at once. Lower --batch_size, or omit "
                "--sanity and --calibrate_refusal."
            ) from error

    def _greedy(self) -> PreTrainedModel:
        """The same modules with a plain generation config, since `generate` takes its defaults from the model's."""
        model = copy(unwrapped(self.model))
        own, pad = model.generation_config, self.tokenizer.pad_token_id
        model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            use_cache=own.use_cache,
        )
        return model
