"""Requests become tokens through the model's own template; refusal tokens come from where they should."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from refusal_direction import ChatModel
from refusal_direction.config import VISION
from refusal_direction.errors import (
    ChatTemplateError,
    OutOfMemoryError,
    PromptError,
    RefusalTokenError,
    TokenizerError,
)
from refusal_direction.models import refusal_tokens
from refusal_direction.models.refusal_tokens import ProbabilityQuartiles, RefusalTokens
from refusal_direction.prompts import Prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(chat: ChatModel, template: str | None) -> ChatModel:
    return replace(chat, chat_template=template)


def test_every_request_ends_in_the_end_of_instruction_tokens(chat: ChatModel):
    assert "".join(chat.text_of(token) for token in chat.eoi_tokens) == "<end_of_turn>\n<start_of_turn>model\n"
    for request in ("Paint a wall", "Why?", "Count to 10", "(a)"):
        assert tuple(chat.encode(request)[-len(chat.eoi_tokens) :]) == chat.eoi_tokens


def test_what_precedes_the_end_of_instruction_tokens_depends_on_the_request(chat: ChatModel):
    before = {chat.encode(request)[-len(chat.eoi_tokens) - 1] for request in ("Paint a wall", "Why?", "Count to 10")}
    assert len(before) == 3


def test_a_completion_ends_where_the_model_has_no_more_positions(chat: ChatModel):
    config = GPT2Config(
        vocab_size=len(chat.tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=20, eos_token_id=None
    )
    short = replace(chat, model=GPT2LMHeadModel(config).eval())
    length = len(short.encode("Paint a wall"))
    (reply,) = short.generate("Paint a wall", max_new_tokens=50)
    assert 1 < len(reply) == 20 - length + 1 < 50


def test_a_prompt_that_leaves_no_position_for_a_reply_is_an_error(chat: ChatModel):
    config = GPT2Config(vocab_size=len(chat.tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=5)
    with pytest.raises(PromptError, match=r"A prompt has \d+ tokens, but demo takes 5"):
        replace(chat, model=GPT2LMHeadModel(config).eval()).complete("Paint a wall")


def test_the_beginning_of_sequence_token_is_not_doubled(chat: ChatModel):
    assert chat.encode("Paint a wall").count(chat.tokenizer.bos_token_id) == 1


def test_another_template_has_other_end_of_instruction_tokens(chat: ChatModel):
    tokens = with_template(chat, CHATML).eoi_tokens
    assert chat.tokenizer.decode(tokens).endswith("|im_end|>\n<|im_start|>assistant\n")


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


def test_a_single_request_gets_a_single_completion(chat: ChatModel):
    assert chat.complete(Prompt("a", "Paint a wall"), 8) == chat.complete(["Paint a wall"], 8)
    assert chat.complete("Paint a wall", 8) == chat.complete(["Paint a wall"], 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"repetition_penalty": 1.5},
        {"suppress_tokens": [46]},
        {"return_dict_in_generate": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 5.0},
        {"stop_strings": ["."]},
        {"min_length": 40},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_completions_are_greedy_whatever_else_the_models_settings_say(
    settings: dict[str, object], chat: ChatModel, harmful: list[str], monkeypatch: pytest.MonkeyPatch
):
    expected = chat.complete(harmful[:8], 12)
    config = GenerationConfig(**{**chat.model.generation_config.to_dict(), **settings})
    monkeypatch.setattr(chat.model, "generation_config", config)
    assert chat.complete(harmful[:8], 12) == expected
    assert chat.model.generation_config is config


@pytest.mark.parametrize("cached", [True, False])
def test_a_model_whose_cache_does_not_work_completes_without(
    cached: bool, chat: ChatModel, monkeypatch: pytest.MonkeyPatch
):
    lengths: list[int] = []
    handle = chat.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    monkeypatch.setattr(chat.model.generation_config, "use_cache", cached)
    chat.complete("Paint a wall", 3)
    handle.remove()
    assert lengths[1] == (1 if cached else lengths[0] + 1)


def test_so_many_prompts_are_completed_at_once(chat: ChatModel):
    rows: list[int] = []
    handle = chat.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    together, apart = (chat.generate(["Paint a wall"] * 5, 3, at_once=count) for count in (None, 2))
    handle.remove()
    assert together == apart
    assert set(rows[: len(rows) // 4]) == {5}
    assert max(rows[-3:]) <= 2


def test_running_out_of_memory_while_completing_is_explained(chat: ChatModel, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(chat.model), "generate", full)
    with pytest.raises(OutOfMemoryError, match="while 2 prompts were completed at once. Lower --batch_size"):
        chat.complete(["Paint a wall", "Paint a wall"])


def test_a_prompt_with_an_image_is_not_for_a_text_model(chat: ChatModel):
    with pytest.raises(PromptError, match="'a' has an image, but demo was loaded for text"):
        chat.complete(Prompt("a", "What is this?", Image.new("RGB", (4, 4))))


def test_gemma_refuses_with_the_published_token(chat: ChatModel):
    tokens = refusal_tokens.resolve(chat, ())
    assert (tokens.texts, tokens.source) == (("I",), "published for the gemma family")


def test_tokens_can_be_given_as_text_or_id(chat: ChatModel):
    number = chat.tokenizer("I", add_special_tokens=False)["input_ids"][0]
    assert refusal_tokens.resolve(chat, ("I",)).ids == refusal_tokens.resolve(chat, (str(number),)).ids == (number,)
    assert refusal_tokens.resolve(chat, (number,)).ids == (number,)


@pytest.fixture
def unpublished(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> ChatModel:
    """A model of a family without published tokens."""
    monkeypatch.setattr(refusal_tokens, "FAMILY_TOKENS", {})
    return chat


def test_only_the_families_of_the_paper_have_published_tokens():
    assert set(refusal_tokens.FAMILY_TOKENS) == {"gemma", "llama", "qwen", "qwen2"}


def test_other_families_take_the_first_tokens_of_refusal_phrases(unpublished: ChatModel):
    tokens = refusal_tokens.resolve(unpublished, ())
    assert "I" in tokens.texts
    assert all(any(phrase.startswith(text) for phrase in refusal_tokens.REFUSAL_PHRASES) for text in tokens.texts)


def first_tokens(monkeypatch: pytest.MonkeyPatch, chat: ChatModel, *texts: str) -> None:
    """Let refusal phrases begin with these tokens, one each."""
    ids = iter([chat.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts])
    monkeypatch.setattr(ChatModel, "reply_tokens", lambda self, reply: [next(ids)])


def test_a_fragment_of_a_word_is_left_out(unpublished: ChatModel, monkeypatch: pytest.MonkeyPatch):
    """The S of Sorry begins Sure as well."""
    first_tokens(monkeypatch, unpublished, "I", "I", "S", "A", " ")
    tokens = refusal_tokens.resolve(unpublished, ())
    assert tokens.texts == ("I",)
    assert "whole words (left out: 'S' of 'Sorry', 'A' of 'As an AI', '' of 'Unfortunately')" in tokens.source


def test_where_there_are_only_fragments_they_are_taken_with_a_warning(
    unpublished: ChatModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    first_tokens(monkeypatch, unpublished, "c", "c", "S", "A", "U")
    monkeypatch.setattr(refusal_tokens, "REFUSAL_PHRASES", ("can", "can", "Sorry", "As an AI", "Unfortunately"))
    assert refusal_tokens.resolve(unpublished, ()).texts == ("c", "S", "A", "U")
    assert "'S' of 'Sorry'" in caplog.text
    assert "--calibrate_refusal" in caplog.text


def test_models_with_images_keep_the_specified_phrases_fragments_or_not(
    unpublished: ChatModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    first_tokens(monkeypatch, unpublished, "I", "I", "S", "N", "I", "I", "A", "I")
    assert refusal_tokens.resolve(unpublished, (), VISION).texts == ("I", "S", "N", "A")
    assert "'S' of 'Sorry', 'N' of 'No,', 'A' of 'As an AI'" in caplog.text


I_TOKEN = RefusalTokens((40,), ("I",), "a test")
REFUSED, ANSWERED = torch.full((8,), 0.99), torch.full((8,), 0.01)


def doubted(harmful: torch.Tensor, harmless: torch.Tensor) -> str | None:
    return refusal_tokens.diagnose(I_TOKEN, ProbabilityQuartiles.of(harmful), ProbabilityQuartiles.of(harmless))


def test_tokens_that_hold_harmful_prompts_and_no_harmless_ones_are_not_doubted():
    assert doubted(REFUSED, ANSWERED) is None


def test_a_model_that_refuses_a_third_of_the_harmful_prompts_is_not_doubted():
    assert doubted(torch.tensor([0.9] * 3 + [0.01] * 6), ANSWERED) is None


@pytest.mark.parametrize(
    ("harmful", "harmless", "said"),
    [
        (ANSWERED, ANSWERED, "hardly any harmful prompt counts as refused"),
        (torch.full((8,), 0.4), ANSWERED, "hardly any harmful prompt counts as refused"),  # the rest says it otherwise
        (REFUSED, REFUSED, "many harmless prompts count as refused"),
        (REFUSED, torch.tensor([0.9] * 3 + [0.01] * 5), "many harmless prompts count as refused"),
        (ANSWERED, REFUSED, "--harmful and --harmless may be swapped"),
    ],
)
def test_tokens_that_do_not_tell_the_kinds_apart_are_doubted(harmful: torch.Tensor, harmless: torch.Tensor, said: str):
    message = doubted(harmful, harmless)
    assert message is not None
    assert said in message
    assert "The refusal tokens 'I' hold" in message
    assert "--calibrate_refusal" in message


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_tokens_as_likely_on_harmless_prompts_as_on_harmful_ones_are_always_doubted(mass: list[float]):
    assert doubted(torch.tensor(mass), torch.tensor(mass)) is not None


@pytest.mark.parametrize(
    ("token", "said"), [("zyxwvut", "is not one token"), ("999999", "the last id in the vocabulary of .* is")]
)
def test_a_refusal_token_outside_the_vocabulary_is_explained(chat: ChatModel, token: str, said: str):
    with pytest.raises(RefusalTokenError, match=said):
        refusal_tokens.resolve(chat, (token,))


def test_calibration_is_not_advised_to_who_asked_for_it():
    quartiles = map(ProbabilityQuartiles.of, (ANSWERED, ANSWERED))
    said = refusal_tokens.diagnose(I_TOKEN, *quartiles, calibrated=True)
    assert said is not None
    assert "--calibrate_refusal" not in said
    assert "Name the tokens that begin its refusals with --refusal_tokens" in said


@pytest.mark.parametrize("token", ["3", 3, "<eos>", "0", "<bos>"])
def test_a_special_token_is_said_to_be_one(chat: ChatModel, token: str | int):
    with pytest.raises(RefusalTokenError, match=r"\) is a special token of demo, which begins no reply"):
        refusal_tokens.resolve(chat, (token,))


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("9" * 5000, "the last id in the vocabulary of demo is"),
        ("000999999", "the last id in the vocabulary of demo is"),
        ("\u0663", "is not one token of demo"),  # a digit of another script is text
        ("-1", "is not one token of demo"),
    ],
)
def test_digits_that_are_no_id_are_explained(chat: ChatModel, token: str, said: str):
    with pytest.raises(RefusalTokenError, match=said):
        refusal_tokens.resolve(chat, (token,))
    assert refusal_tokens.resolve(chat, ("046",)).ids == (46,)  # control


def test_a_token_that_the_tokenizer_knows_and_the_model_does_not_is_explained(chat: ChatModel):
    more = copy.deepcopy(chat.tokenizer)
    more.add_tokens(["REFUSE"])
    with pytest.raises(RefusalTokenError, match="are not in the vocabulary of demo"):
        refusal_tokens.resolve(replace(chat, tokenizer=more), ("REFUSE",))


def test_calibration_finds_how_the_model_refuses(chat: ChatModel, harmful: list[str]):
    tokens = refusal_tokens.calibrate(chat, [Prompt("", text) for text in harmful])
    assert tokens.texts == ("I",)
    assert "of 20 harmful prompts" in tokens.source


def test_calibration_on_prompts_that_are_answered_is_an_error(chat: ChatModel, harmless: list[str]):
    answered = [
        request
        for request, text in zip(harmless, chat.complete(harmless, 8), strict=True)
        if not refusal_tokens.is_refusal(text)
    ]
    with pytest.raises(RefusalTokenError, match="refused none of"):
        refusal_tokens.calibrate(chat, [Prompt("", text) for text in answered])


@pytest.mark.parametrize(
    "text", ["I cannot help with that.", " I\u2019m sorry, but", '"Sorry, no."', "As an AI, I", "As an assistant, I"]
)
def test_refusals_are_recognised(text: str):
    assert refusal_tokens.is_refusal(text)


@pytest.mark.parametrize("text", ["Sure! I cannot wait to help.", "In short, yes.", "", "I like bread."])
def test_answers_are_not_taken_for_refusals(text: str):
    assert not refusal_tokens.is_refusal(text)
