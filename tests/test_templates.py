"""The chat formats of the main families, through their templates: what the model is given, and where the reply begins."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from refusal_direction import ChatModel
from refusal_direction.errors import ChatTemplateError
from tests.chat_formats import DROPPED, FORMATS, REFUSED, SHOWN, tokenizer_for

every = pytest.mark.parametrize("name", FORMATS)


def those(*fates: str) -> Any:
    return pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.system in fates])


@cache
def chat_of(name: str) -> ChatModel:
    """A format's tokenizer without a model."""
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type="none"))
    return ChatModel(model, tokenizer_for(FORMATS[name]), name)


@every
def test_a_request_is_rendered_as_the_family_documents_it(name: str):
    assert chat_of(name).render("Hi") == FORMATS[name].prompt


@every
def test_the_end_of_instruction_tokens_are_what_the_format_puts_after_a_request(name: str):
    chat, format = chat_of(name), FORMATS[name]
    assert chat.tokenizer.decode(chat.eoi_tokens) == format.end
    special = [re.escape(token) for token in format.tokens]
    assert [chat.text_of(token) for token in chat.eoi_tokens if token in chat.tokenizer.all_special_ids] == re.findall(
        "|".join(special), format.end
    )


@every
def test_the_beginning_of_sequence_is_written_once_where_the_template_writes_it(name: str):
    chat, format = chat_of(name), FORMATS[name]
    assert chat.tokenizer("Hi")["input_ids"][0] == chat.tokenizer.bos_token_id  # control: by itself it would add one
    assert chat.encode("Hi").count(chat.tokenizer.bos_token_id) == format.prompt.count(format.tokens[0])


def test_a_template_that_reads_the_clock_would_show_today_by_itself():
    """Control of the requests above, which are of a fixed date whenever they are rendered."""
    shown = chat_of("mistral small").tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "The current date is " in shown
    assert "The current date is 2024-07-26" in FORMATS["mistral small"].prompt
    assert "2024-07-26" not in shown


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{{ date_string }}", "26 Jul 2024"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ strftime_now('%A, %-d %B, %d/%m/%y at %H:%M') }}", "Friday, 26 July, 26/07/24 at 00:00"),
    ],
)
def test_a_date_is_pinned_in_the_form_that_the_template_wants(template: str, shown: str):
    assert replace(chat_of("chatml"), chat_template=template).render("Hi") == shown


@every
def test_the_pinned_date_is_recorded_where_the_template_shows_one(name: str):
    dated = "2024" in FORMATS[name].prompt
    assert chat_of(name).template_settings["date"] == ("2024-07-26" if dated else None)


@every
def test_thinking_is_off_by_default_and_recorded(name: str):
    chat, format = chat_of(name), FORMATS[name]
    settings = chat.template_settings
    assert settings["thinking"] is False
    switched_or_closed = bool(settings["thinking_switches"] or settings["thinking_closed_with"])
    assert switched_or_closed >= (format.thinking is not None)
    assert bool(settings["thinking_closed_with"]) == (name in ("deepseek-r1", "gpt-oss"))


@every
def test_a_model_that_may_think_is_left_to_it(name: str):
    chat, format = replace(chat_of(name), thinking=True), FORMATS[name]
    assert chat.render("Hi").endswith(format.thinking or format.end)
    assert chat.template_settings["thinking"] is True
    assert chat.template_settings["thinking_closed_with"] == ""


@those(SHOWN)
def test_a_system_prompt_stands_where_the_format_puts_it(name: str):
    chat = replace(chat_of(name), system_prompt="Be kind.")
    chat.check_system_prompt()
    assert chat.render("Hi") == FORMATS[name].with_system
    assert chat.template_settings["system_prompt"] == "Be kind."


@those(REFUSED)
def test_a_system_prompt_that_the_template_refuses_is_an_error(name: str):
    with pytest.raises(ChatTemplateError, match=r"takes no --system_prompt \(it rejects.*Leave it out"):
        replace(chat_of(name), system_prompt="Be kind.").check_system_prompt()


@those(DROPPED)
def test_a_system_prompt_that_the_template_drops_is_an_error(name: str):
    chat = replace(chat_of(name), system_prompt="Be kind.")
    assert chat.render("Hi") == chat_of(name).render("Hi")  # control: nobody else would notice
    with pytest.raises(ChatTemplateError, match=r"takes no --system_prompt \(it drops.*Leave it out"):
        chat.check_system_prompt()


def test_a_template_that_always_fails_is_not_taken_for_one_without_a_system_role():
    broken = replace(chat_of("chatml"), chat_template="{{ raise_exception('never') }}", system_prompt="Be kind.")
    with pytest.raises(ChatTemplateError, match="cannot be used"):
        broken.check_system_prompt()


def test_what_a_system_prompt_says_does_not_decide_whether_it_is_taken():
    """A template may trim, escape or quote it."""
    chat = chat_of("chatml")
    quoting = chat.tokenizer.chat_template.replace("message['content'] | trim", "message['content'] | tojson")
    told = replace(chat, chat_template=quoting, system_prompt='Say "yes"\n')
    told.check_system_prompt()  # raises where it is not taken
    assert "Say" in told.render("Hi")
    assert told.system_prompt not in told.render("Hi")  # control: it is not there as it was written


def test_the_default_system_message_of_a_template_gives_way_to_an_empty_one():
    chat = replace(chat_of("qwen2.5"), system_prompt="")
    chat.check_system_prompt()
    assert chat.render("Hi").startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")


@every
def test_the_reply_is_tokenised_as_it_follows_the_prompt(name: str):
    chat = chat_of(name)
    before = chat.encode("Hello")
    space = " " if name == "llama2" else ""
    assert chat.encode("Hello", space + "I cannot") == [*before, *chat.reply_tokens("I cannot")]
