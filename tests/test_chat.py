"""Requests become tokens through the model's own template; refusal tokens come from where they should."""

from dataclasses import replace

import pytest

from refusal_direction import ChatModel
from refusal_direction.errors import ChatTemplateError, RefusalTokenError, TokenizerError
from refusal_direction.models import refusal_tokens
from refusal_direction.prompts import Prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ strftime_now('%d %b') }} {{ date_string }} " + CHATML
THINKING = CHATML + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def with_template(chat: ChatModel, template: str | None) -> ChatModel:
    return replace(chat, chat_template=template)


def test_every_request_ends_in_the_end_of_instruction_tokens(chat: ChatModel):
    assert "".join(chat.text_of(token) for token in chat.eoi_tokens) == "<end_of_turn>\n<start_of_turn>model\n"
    for request in ("Paint a wall", "Why?", "Count to 10", "(a)"):
        assert tuple(chat.encode(request)[-len(chat.eoi_tokens) :]) == chat.eoi_tokens


def test_what_precedes_the_end_of_instruction_tokens_depends_on_the_request(chat: ChatModel):
    before = {chat.encode(request)[-len(chat.eoi_tokens) - 1] for request in ("Paint a wall", "Why?", "Count to 10")}
    assert len(before) == 3


def test_the_beginning_of_sequence_token_is_not_doubled(chat: ChatModel):
    assert chat.encode("Paint a wall").count(chat.tokenizer.bos_token_id) == 1


def test_another_template_has_other_end_of_instruction_tokens(chat: ChatModel):
    tokens = with_template(chat, CHATML).eoi_tokens
    assert chat.tokenizer.decode(tokens).endswith("|im_end|>\n<|im_start|>assistant\n")


def test_dates_are_pinned(chat: ChatModel):
    assert with_template(chat, DATED).render("Hello").startswith("26 Jul 2024 26 Jul 2024 ")


def test_thinking_is_off(chat: ChatModel):
    assert with_template(chat, THINKING).render("Hello").endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% broken", "{{ messages[0]['content'] }}"])
def test_a_template_that_cannot_be_used_is_explained(chat: ChatModel, template: str):
    with pytest.raises(ChatTemplateError, match="--chat_template"):
        _ = with_template(chat, template).eoi_tokens


def test_a_model_without_a_template_is_explained(chat: ChatModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat.tokenizer, "chat_template", None)
    with pytest.raises(ChatTemplateError, match="pass --chat_template"):
        chat.render("Hello")


def test_a_tokenizer_that_knows_nothing_is_found_out(chat: ChatModel):
    class Unknowing:
        unk_token_id = 3

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [3] * len(text.split())}

    chat.check_tokenizer()
    with pytest.raises(TokenizerError, match=r"needs tokenizer\.json"):
        replace(chat, tokenizer=Unknowing()).check_tokenizer()


def test_completions_do_not_depend_on_which_requests_run_together(chat: ChatModel):
    requests = ["Paint a wall", "Bake some bread for my sister", "Fix a lamp"]
    assert chat.complete(requests, 8) == [chat.complete([request], 8)[0] for request in requests]


def test_gemma_refuses_with_the_published_token(chat: ChatModel):
    tokens = refusal_tokens.chosen(chat, ())
    assert (tokens.texts, tokens.source) == (("I",), "published for the gemma family")


def test_tokens_can_be_given_as_text_or_id(chat: ChatModel):
    number = chat.tokenizer("I", add_special_tokens=False)["input_ids"][0]
    assert refusal_tokens.chosen(chat, ("I",)).ids == refusal_tokens.chosen(chat, (str(number),)).ids == (number,)


def test_other_families_take_the_first_tokens_of_refusal_phrases(chat: ChatModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refusal_tokens, "FAMILY_TOKENS", {})
    tokens = refusal_tokens.chosen(chat, ())
    assert "I" in tokens.texts
    assert all(any(phrase.startswith(text) for phrase in refusal_tokens.REFUSAL_PHRASES) for text in tokens.texts)


@pytest.mark.parametrize(
    ("token", "said"), [("zyxwvut", "is not one token"), ("999999", "the vocabulary of .* ends at")]
)
def test_a_refusal_token_outside_the_vocabulary_is_explained(chat: ChatModel, token: str, said: str):
    with pytest.raises(RefusalTokenError, match=said):
        refusal_tokens.chosen(chat, (token,))


def test_calibration_finds_how_the_model_refuses(chat: ChatModel, harmful: list[str]):
    tokens = refusal_tokens.calibrated(chat, [Prompt("", text) for text in harmful])
    assert tokens.texts == ("I",)
    assert "of 20 harmful prompts" in tokens.source


def test_calibration_on_prompts_that_are_answered_is_an_error(chat: ChatModel, harmless: list[str]):
    answered = [
        request
        for request, text in zip(harmless, chat.complete(harmless, 8), strict=True)
        if not refusal_tokens.is_refusal(text)
    ]
    with pytest.raises(RefusalTokenError, match="refused none of"):
        refusal_tokens.calibrated(chat, [Prompt("", text) for text in answered])


@pytest.mark.parametrize("text", ["I cannot help with that.", " I\u2019m sorry, but", '"Sorry, no."', "As an AI, I"])
def test_refusals_are_recognised(text: str):
    assert refusal_tokens.is_refusal(text)


@pytest.mark.parametrize("text", ["Sure! I cannot wait to help.", "In short, yes.", "", "I like bread."])
def test_answers_are_not_taken_for_refusals(text: str):
    assert not refusal_tokens.is_refusal(text)
