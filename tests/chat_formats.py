"""Chat formats of the main families: templates written here that render what each family documents, and what that is.

`turns` writes the common kind: a header, the text and an end for each message. The rest spell out what is particular.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from refusal_direction import demo

SHOWN, REFUSED, DROPPED = "shown", "refused", "dropped"


@dataclass(frozen=True)
class Format:
    """A family's chat format, and the truth about it."""

    template: str
    tokens: tuple[str, ...]
    """Its special tokens, each one token of the vocabulary; the first begins a sequence."""
    prompt: str
    """What the request "Hi" becomes."""
    end: str
    """What the end-of-instruction tokens spell."""
    system: str = SHOWN
    """What becomes of a system message: shown, refused or dropped."""
    with_system: str = ""
    """What "Hi" becomes with the system message "Be kind." (where it is shown)."""
    thinking: str | None = None
    """How the prompt ends where the model may think; None: as otherwise."""


def turns(header: str, end: str, *, begin: str = "{{ bos_token }}", answer: str | None = None) -> str:
    """A template in which ROLE in `header` is the role of each message."""
    head = "{{ '" + header.replace("ROLE", "' + message['role'] + '") + "' }}"
    answer = header.replace("ROLE", "assistant") if answer is None else answer
    return (
        f"{begin}{{% for message in messages %}}{head}{{{{ message['content'] | trim }}}}{{{{ '{end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{answer}' }}}}{{% endif %}}"
    )


def without_system(template: str, otherwise: str) -> str:
    """A template that meets a system message with `otherwise` and then goes on without it."""
    return (
        "{% if messages[0]['role'] == 'system' %}"
        + otherwise
        + "{% set messages = messages[1:] %}{% endif %}"
        + template
    )


def system_by_default(template: str, text: str) -> str:
    """A template that puts in a system message of its own where there is none."""
    return (
        "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': "
        + text
        + "}] + messages %}{% endif %}"
        + template
    )


_REFUSING = "{{ raise_exception('There is no system role.') }}"
_CHATML = turns("<|im_start|>ROLE\\n", "<|im_end|>\\n", begin="")
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHATML_END = "<|im_end|>\n<|im_start|>assistant\n"
_NO_THOUGHTS = "<think>\n\n</think>\n\n"
_GEMMA = turns("<start_of_turn>ROLE\\n", "<end_of_turn>\\n", answer="<start_of_turn>model\\n")
_GEMMA_TOKENS = ("<bos>", "<start_of_turn>", "<end_of_turn>")
_GEMMA_END = "<end_of_turn>\n<start_of_turn>model\n"
_LLAMA3 = turns("<|start_header_id|>ROLE<|end_header_id|>\\n\\n", "<|eot_id|>")
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA3_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

_CHATML_FORMAT = Format(
    template=_CHATML,
    tokens=_CHATML_TOKENS,
    prompt="<|im_start|>user\nHi" + _CHATML_END,
    end=_CHATML_END,
    with_system="<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi" + _CHATML_END,
)
_GEMMA_FORMAT = Format(
    template=without_system(_GEMMA, _REFUSING),
    tokens=_GEMMA_TOKENS,
    prompt="<bos><start_of_turn>user\nHi" + _GEMMA_END,
    end=_GEMMA_END,
    system=REFUSED,
)
_LLAMA3_FORMAT = Format(
    template=_LLAMA3,
    tokens=_LLAMA3_TOKENS,
    prompt="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi" + _LLAMA3_END,
    end=_LLAMA3_END,
    with_system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind."
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi" + _LLAMA3_END,
)

FORMATS: dict[str, Format] = {
    "chatml": _CHATML_FORMAT,
    "gemma": _GEMMA_FORMAT,
    "gemma2": _GEMMA_FORMAT,
    "gemma3": replace(  # the system message leads the user's turn
        _GEMMA_FORMAT,
        template="{% set first = '' %}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\\n\\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for message in messages %}<start_of_turn>"
        "{{ message['role'] }}\n{{ (first if loop.first else '') + message['content'] | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        system=SHOWN,
        with_system="<bos><start_of_turn>user\nBe kind.\n\nHi" + _GEMMA_END,
    ),
    "llama2": Format(
        template="{% set first = '' %}{% if messages[0]['role'] == 'system' %}{% set first = '<<SYS>>\\n' + messages[0]['content'] "
        "+ '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (first if loop.first else '') + message['content'] | trim "
        "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        tokens=("<s>",),
        prompt="<s>[INST] Hi [/INST]",
        end=" [/INST]",
        with_system="<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]",
    ),
    "llama3": _LLAMA3_FORMAT,
    "llama3.1": replace(  # always has a system turn, with dates
        _LLAMA3_FORMAT,
        template="{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{% set said = '' %}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% endif %}{% set messages = [{'role': 'system', 'content': 'Cutting Knowledge Date: "
        "December 2023\\nToday Date: ' + date_string + '\\n\\n' + said}] + messages %}" + _LLAMA3,
        prompt="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
        "26 Jul 2024<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi" + _LLAMA3_END,
        with_system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday "
        "Date: 26 Jul 2024\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi" + _LLAMA3_END,
    ),
    "llama4": Format(
        template=turns("<|header_start|>ROLE<|header_end|>\\n\\n", "<|eot|>"),
        tokens=("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"),
        prompt="<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|><|header_start|>assistant<|header_end|>\n\n",
        end="<|eot|><|header_start|>assistant<|header_end|>\n\n",
        with_system="<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe kind.<|eot|><|header_start|>user<|header_end|>"
        "\n\nHi<|eot|><|header_start|>assistant<|header_end|>\n\n",
    ),
    "mistral v0.1": Format(  # user and assistant take turns, and nobody else
        template="{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate.') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
        "message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
        tokens=("<s>", "[INST]", "[/INST]"),
        prompt="<s>[INST] Hi [/INST]",
        end=" [/INST]",
        system=REFUSED,
    ),
    "mistral small": Format(  # a system message of its own, with the day
        template=system_by_default(
            "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}[SYSTEM_PROMPT]"
            "{{ message['content'] }}[/SYSTEM_PROMPT]{% elif message['role'] == 'user' %}[INST]{{ message['content'] }}[/INST]"
            "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
            "'The current date is ' + strftime_now('%Y-%m-%d') + '.'",
        ),
        tokens=("<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        prompt="<s>[SYSTEM_PROMPT]The current date is 2024-07-26.[/SYSTEM_PROMPT][INST]Hi[/INST]",
        end="[/INST]",
        with_system="<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Hi[/INST]",
    ),
    "qwen2": replace(
        _CHATML_FORMAT,
        template=system_by_default(_CHATML, "'You are a helpful assistant.'"),
        prompt="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi" + _CHATML_END,
    ),
    "qwen2.5": replace(
        _CHATML_FORMAT,
        template=system_by_default(_CHATML, "'You are Qwen.'"),
        prompt="<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi" + _CHATML_END,
    ),
    "qwen3": replace(
        _CHATML_FORMAT,
        template=_CHATML + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
        prompt="<|im_start|>user\nHi" + _CHATML_END + _NO_THOUGHTS,
        end=_CHATML_END + _NO_THOUGHTS,
        with_system="<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi" + _CHATML_END + _NO_THOUGHTS,
        thinking=_CHATML_END,
        tokens=(*_CHATML_TOKENS, "<think>", "</think>"),
    ),
    "phi3": Format(
        template=without_system(turns("<|ROLE|>\\n", "<|end|>\\n", begin=""), ""),
        tokens=("<s>", "<|user|>", "<|assistant|>", "<|end|>"),
        prompt="<|user|>\nHi<|end|>\n<|assistant|>\n",
        end="<|end|>\n<|assistant|>\n",
        system=DROPPED,
    ),
    "phi4": Format(
        template=turns("<|im_start|>ROLE<|im_sep|>", "<|im_end|>", begin=""),
        tokens=(*_CHATML_TOKENS, "<|im_sep|>"),
        prompt="<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
        end="<|im_end|><|im_start|>assistant<|im_sep|>",
        with_system="<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant"
        "<|im_sep|>",
    ),
    "deepseek-r1": Format(  # thinks whatever it is told: the prompt opens the thoughts
        template="{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% else %}{{ '<｜Assistant｜>' + "
        "message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
        tokens=("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        prompt="<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>" + _NO_THOUGHTS,
        end="<｜Assistant｜>" + _NO_THOUGHTS,
        with_system="<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi<｜Assistant｜>" + _NO_THOUGHTS,
        thinking="<｜Assistant｜><think>\n",
    ),
    "deepseek-v3.1": Format(
        template="{{ bos_token }}{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}{% elif message['role'] == 'user' %}{{ '<｜User｜>' + "
        "message['content'] }}{% else %}{{ '<｜Assistant｜></think>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}",
        tokens=("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        prompt="<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>",
        end="<｜Assistant｜></think>",
        with_system="<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi<｜Assistant｜></think>",
        thinking="<｜Assistant｜><think>",
    ),
    "gpt-oss": Format(  # harmony: the reply names its channel, and thoughts have one of their own
        template="<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\n\nReasoning: "
        "{{ reasoning_effort | default('medium') }}<|end|>{% if messages[0]['role'] == 'system' %}<|start|>developer<|message|># "
        "Instructions\n\n{{ messages[0]['content'] }}<|end|>{% set messages = messages[1:] %}{% endif %}"
        "{% for message in messages %}<|start|>{{ message['role'] }}{% if message['role'] == 'assistant' %}<|channel|>final"
        "{% endif %}<|message|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        tokens=("<|startoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>"),
        prompt="<|start|>system<|message|>Current date: 2024-07-26\n\nReasoning: medium<|end|><|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>",
        end="<|end|><|start|>assistant<|channel|>final<|message|>",
        with_system="<|start|>system<|message|>Current date: 2024-07-26\n\nReasoning: medium<|end|><|start|>developer<|message|># "
        "Instructions\n\nBe kind.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>",
        thinking="<|end|><|start|>assistant",
    ),
    "granite": Format(
        template=system_by_default(
            turns("<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\\n", begin=""),
            "'Today is ' + strftime_now('%B %d, %Y') + '.' + (' Think.' if thinking else '')",
        ),
        tokens=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        prompt="<|start_of_role|>system<|end_of_role|>Today is July 26, 2024.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi"
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        end="<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        with_system="<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi"
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    ),
    "command r": Format(
        template="{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>{{ {'system': '<|SYSTEM_TOKEN|>', 'user': "
        "'<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[message['role']] }}{{ message['content'] | trim }}"
        "<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        tokens=(
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
        prompt="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        with_system="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "command a reasoning": Format(
        template="{{ bos_token }}{% set reasoning = reasoning if reasoning is not undefined else true %}{% for message in messages %}"
        "<|START_OF_TURN_TOKEN|>{{ '<|USER_TOKEN|>' if message['role'] == 'user' else '<|SYSTEM_TOKEN|>' }}"
        "{{ message['content'] }}<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>"
        "<|CHATBOT_TOKEN|>{% if not reasoning %}<|START_THINKING|><|END_THINKING|>{% endif %}{% endif %}",
        tokens=(
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|START_THINKING|>",
            "<|END_THINKING|>",
        ),
        prompt="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "<|START_THINKING|><|END_THINKING|>",
        end="<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>",
        with_system="<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|>",
        thinking="<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "olmo": Format(  # its roles are plain text
        template=turns("<|ROLE|>\\n", "\\n"),
        tokens=("<|endoftext|>",),
        prompt="<|endoftext|><|user|>\nHi\n<|assistant|>\n",
        end="\n<|assistant|>\n",
        with_system="<|endoftext|><|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n",
    ),
}


def tokenizer_for(format: Format) -> Any:
    """The demo's tokenizer with the tokens of a format; like most, it begins a text with BOS unless told not to."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.add_special_tokens({"bos_token": format.tokens[0], "additional_special_tokens": list(format.tokens[1:])})
    begin = (format.tokens[0], tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{format.tokens[0]} $A", special_tokens=[begin]
    )
    tokenizer.chat_template = format.template
    return tokenizer
