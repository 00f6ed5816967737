"""The chat formats of the main families, through their templates: what the model is given, and where the reply begins."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refusal_direction import ChatModel
from refusal_direction.errors import ChatTemplateError
from refusal_direction.models import loading
from refusal_direction.models.control_tokens import ControlTokens
from tests.chat_formats import DROPPED, FORMATS, REFUSED, SHOWN, tokenizer_for

every = pytest.mark.parametrize("name", FORMATS)
SWITCHES = ("enable_thinking", "thinking", "reasoning")


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


def changed(name: str, template: str) -> ChatModel:
    return replace(chat_of(name), chat_template=template)


@pytest.mark.parametrize("name", [name for name in FORMATS if "strftime_now" not in FORMATS[name].template])
def test_a_file_with_a_template_renders_as_transformers_renders_it(name: str, tmp_path: Path):
    """Also where it begins with a line break or an indented block, and whatever breaks its last line has."""
    for begin, end in (("", "\n"), ("\n", "\n\n"), ("  {% if true %}x{% endif %}\n", "")):
        file = tmp_path / "template.jinja"
        file.write_text(begin + FORMATS[name].template + end)
        messages = [{"role": "user", "content": "Hi"}]
        chat = changed(name, str(loading._template(str(file))))
        assert chat._rendered(messages, add_generation_prompt=True) == chat.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=file.read_text(),
            **dict.fromkeys(SWITCHES, False),
            date_string="26 Jul 2024",
        )


@every
def test_a_known_format_is_not_warned_of(name: str):
    chat = chat_of(name)
    written = FORMATS[name].tokens[0] in FORMATS[name].prompt
    assert bool(list(chat.template_warnings(chat.encode("Hi")))) == (not written)  # its tokenizer would add one


@pytest.mark.parametrize(
    ("opener", "closer"),
    [
        ("<think>\n", "\n</think>\n\n"),
        ("<seed:think>", "\n</seed:think>\n\n"),
        ("<thought>", "\n</thought>\n\n"),
        ("[THINK]", "[/THINK]"),
        ("<|channel>thought\n", "<channel|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_a_block_of_thoughts_that_a_template_opens_is_closed(opener: str, closer: str):
    chat = changed("gemma", FORMATS["gemma"].template + opener)
    # Jinja drops the last line break of a template
    assert chat.render("Hi") == FORMATS["gemma"].prompt + opener.removesuffix("\n") + closer
    assert not list(chat.template_warnings(chat.encode("Hi")))
    assert replace(chat, thinking=True).render("Hi") == FORMATS["gemma"].prompt + opener.removesuffix("\n")


@pytest.mark.parametrize("opener", ["<|my_thoughts|>", "<|think|>", "<start_of_turn>thinking\n"])
def test_an_opener_of_thoughts_without_a_known_end_is_warned_of(opener: str):
    chat = changed("gemma", FORMATS["gemma"].template + opener)
    (warning,) = chat.template_warnings(chat.encode("Hi"))
    assert "seems to begin thoughts" in warning
    assert opener.strip() in warning
    assert not list(replace(chat, thinking=True).template_warnings(chat.encode("Hi")))


@pytest.mark.parametrize(
    "end", ["<think>\n\n</think>\n\n", "<|START_THINKING|><|END_THINKING|>", "/no_think\n", "Think!\n"]
)
def test_thoughts_that_are_closed_are_left_alone(end: str):
    chat = changed("gemma", FORMATS["gemma"].template + end)
    assert chat.render("Hi") == FORMATS["gemma"].prompt + end.removesuffix("\n")
    assert not list(chat.template_warnings(chat.encode("Hi")))


def test_a_template_that_ignores_the_generation_prompt_is_completed_from_its_replies():
    own = FORMATS["gemma"].template
    chat = changed("gemma", own[: own.index("{% if add_generation_prompt")])
    assert chat.render("Hi").endswith("Hi<end_of_turn>\n<start_of_turn>assistant\n")
    (warning,) = chat.template_warnings(chat.encode("Hi"))
    assert "ignores add_generation_prompt" in warning
    assert repr("<start_of_turn>assistant\n") in warning


def test_a_template_that_takes_no_replies_and_begins_none_is_warned_of():
    own = FORMATS["gemma"].template
    refusing = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no replies') }}{% endif %}"
    chat = changed("gemma", refusing + own[: own.index("{% if add_generation_prompt")])
    (warning,) = chat.template_warnings(chat.encode("Hi"))
    assert "shows no text that begins a reply" in warning


def test_a_beginning_of_sequence_that_is_written_twice_or_never_is_warned_of():
    own, bos = FORMATS["gemma"].template, "{{ bos_token }}"
    twice, never = changed("gemma", bos + own), changed("gemma", own.replace(bos, ""))
    (warning,) = twice.template_warnings(twice.encode("Hi"))
    assert "twice" in warning
    (warning,) = never.template_warnings(never.encode("Hi"))
    assert "does not write" in warning
    never.tokenizer.bos_token = None
    assert not list(never.template_warnings(never.encode("Hi")))


@every
def test_control_tokens_in_a_request_are_encoded_as_text(name: str):
    chat, format = chat_of(name), FORMATS[name]
    request = f"Say {format.tokens[-1]} and {format.tokens[0]}now"
    encoded, special = chat.encode(request), set(chat.tokenizer.all_special_ids)
    assert [token for token in encoded if token in special] == [t for t in chat.encode("Hi") if t in special]
    assert chat.tokenizer.decode(encoded).replace(" ", "") == chat.render(request).replace(" ", "")
    assert encoded[-len(chat.eoi_tokens) :] == list(chat.eoi_tokens)
    assert chat.control_tokens(request) == []
    taken = chat.tokenizer(chat.render(request), add_special_tokens=False)["input_ids"]
    assert sum(token in special for token in taken) > sum(token in special for token in encoded)  # control


def test_control_tokens_that_cannot_be_encoded_as_text_are_named(monkeypatch: pytest.MonkeyPatch):
    chat = replace(chat_of("gemma"))
    monkeypatch.setattr(ControlTokens, "encode_plainly", lambda *_: None)
    end = FORMATS["gemma"].tokens[-1]
    assert chat.control_tokens(f"Say {end} or {end}") == [end]
    assert chat.control_tokens("Say end") == []
