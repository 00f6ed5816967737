"""An image and a question reach the model through its real processor, as its family was trained on them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import (
    ProcessorMixin,
)
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import is_torchvision_available

from refusal_direction import ablated, demo
from refusal_direction.config import VISION, ModelSource
from refusal_direction.engine import Engine
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.errors import ChatTemplateError, ModelAccessError
from refusal_direction.models import refusal_tokens
from refusal_direction.models.loading import load_vision_model
from refusal_direction.models.vision import VisionChatModel
from refusal_direction.prompts import Prompt
from refusal_direction.prompts.images import UnusableImageError, usable
from refusal_direction.scoring.baseline import measure_baseline
from tests.families import D_MODEL, N_LAYERS, layers_of
from tests.families.tables import VISION_FAMILIES
from tests.families.vision import SIDE
from tests.oracles import stream
from tests.processors import built_for
from tests.vision_templates import LLAVA, TEMPLATES

# PaliGemma's processor makes NumPy arrays of tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.*")

QUESTION = "What is shown here?"
PHRASES = ("I cannot", "I can't", "Sorry", "No,", "I apologize", "I'm not able", "As an AI", "I'm unable")

every_template = pytest.mark.parametrize("name", TEMPLATES)
loadable = pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.whole])


def picture(width: int = SIDE, height: int = SIDE, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def prompt(text: str = QUESTION, **image: Any) -> Prompt:
    return Prompt("a", text, picture(**image))


def _chat(name: str) -> VisionChatModel:
    template = TEMPLATES[name]
    processor = template.processor()
    ids = {key: processor.tokenizer.convert_tokens_to_ids(text) for key, text in template.tokens.items()}
    return VisionChatModel(built_for(name, processor, **ids), processor.tokenizer, name, processor=processor)


@pytest.fixture(scope="module")
def chats() -> dict[str, VisionChatModel]:
    """A tiny random model of every family, behind its real processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *arguments, **named: None)  # of video
        patch.setattr(processing_smolvlm, "num2words", str)  # counts video frames in words
        return {name: _chat(name) for name in TEMPLATES}


@every_template
def test_the_prompt_is_what_the_family_was_trained_on(name: str, chats: dict[str, VisionChatModel]) -> None:
    """The question is there, the generation prompt is, the image's place is, and BOS exactly once where there is one."""
    chat, template = chats[name], TEMPLATES[name]
    text = chat.tokenizer.decode(chat.inputs(prompt())["input_ids"][0]).replace(template.image, "")
    assert text == template.prompt.format(question=QUESTION)


@every_template
def test_there_are_as_many_image_tokens_as_the_image_has_features(name: str, chats: dict[str, VisionChatModel]) -> None:
    chat = chats[name]
    ids = chat.inputs(prompt())["input_ids"][0].tolist()
    assert ids.count(chat.tokenizer.convert_tokens_to_ids(TEMPLATES[name].image)) == (
        TEMPLATES[name].tiles * VISION_FAMILIES[name].image_tokens
    )


@every_template
def test_the_model_takes_what_the_processor_gives_and_nothing_is_to_be_learnt(
    name: str, chats: dict[str, VisionChatModel]
) -> None:
    chat = chats[name]
    inputs = chat.inputs(prompt())
    assert "labels" not in inputs
    assert all(isinstance(tensor, torch.Tensor) for tensor in inputs.values())
    with torch.no_grad():
        output = chat.model(**inputs, use_cache=False)
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    assert output.get("loss") is None


@every_template
def test_pixels_come_in_the_models_dtype(name: str, chats: dict[str, VisionChatModel]) -> None:
    chat = chats[name]
    half = replace(chat, model=built_half(chat))
    for model, dtype in ((chat, torch.float32), (half, torch.bfloat16)):
        inputs = model.inputs(prompt())
        assert inputs["pixel_values"].dtype == dtype
        assert not inputs["input_ids"].is_floating_point()
    assert len(half.complete([prompt()], 2)) == 1


def built_half(chat: VisionChatModel) -> Any:
    """A copy of the model in bfloat16."""
    half = type(chat.model)(chat.model.config).eval().to(torch.bfloat16)
    half.load_state_dict(chat.model.state_dict())
    return half


@every_template
def test_the_image_and_the_question_both_matter(name: str, chats: dict[str, VisionChatModel]) -> None:
    chat = chats[name]

    def logits(some: Prompt) -> torch.Tensor:
        with torch.no_grad():
            return chat.model(**chat.inputs(some), use_cache=False).logits[0, -1]

    plain = logits(prompt())
    assert (logits(prompt(colour="blue")) - plain).abs().max() > 0.01
    assert (logits(prompt("What is heard here?")) - plain).abs().max() > 0.01


@every_template
def test_large_images_are_taken_as_well(name: str, chats: dict[str, VisionChatModel]) -> None:
    """Some families cut them into tiles or keep their size, so prompts differ in shape; they still run together."""
    chat = chats[name]
    prompts = [prompt(), prompt(width=4 * SIDE, height=2 * SIDE), prompt(width=SIDE, height=3 * SIDE)]
    together, apart = chat.complete(prompts, 3), [chat.complete([one], 3)[0] for one in prompts]
    assert together == apart


@every_template
def test_the_first_token_of_a_completion_is_the_one_that_the_engine_scores(
    name: str, chats: dict[str, VisionChatModel]
) -> None:
    """What is scored is what would be generated: masks and positions of a plain forward are those of generation."""
    chat, prompts = chats[name], [prompt(), prompt("Why?", width=3 * SIDE, colour="green"), prompt("Who made it?")]
    engine = Engine(ResidualStream(chat.model), [chat.inputs(one) for one in prompts], batch_size=2)
    tokens = refusal_tokens.resolve(chat, (), VISION)
    baseline = measure_baseline(
        engine, tokens.ids, n_positions=chat.n_positions, activations_of=[0, 1, 2], logits_of=[0, 1, 2]
    )
    assert engine.name == "layer-major"
    for index, one in enumerate(prompts):
        generated = chat._generate(chat.inputs(one), 1)[0, -1]
        assert int(baseline.logits[index].argmax()) == int(generated)


@every_template
def test_the_stream_stays_orthogonal_while_completions_are_generated(
    name: str, chats: dict[str, VisionChatModel]
) -> None:
    chat, u = chats[name], torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    before = chat.complete([prompt()], 5)
    with ablated(chat.model, u), stream.followed(layers_of(chat.model, VISION_FAMILIES[name]), u) as leaks:
        chat.complete([prompt()], 5)
    assert len(leaks.additions) >= 2 * N_LAYERS
    assert leaks.worst < 1e-5
    assert chat.complete([prompt()], 5) == before


@loadable
def test_a_saved_model_is_loaded_with_its_processor(
    name: str, chats: dict[str, VisionChatModel], tmp_path: Path
) -> None:
    chats[name].model.save_pretrained(tmp_path)
    chats[name].processor.save_pretrained(tmp_path)
    if name == "idefics3" and Version(transformers.__version__) < Version("5.24") and not is_torchvision_available():
        pytest.skip("older transformers load Idefics3's processor only where torchvision is installed")
    loaded = load_vision_model(ModelSource(str(tmp_path), dtype="float32"))
    assert (loaded.model_id, loaded.revision, loaded.n_positions) == (str(tmp_path), None, 3)
    ours, theirs = loaded.inputs(prompt()), chats[name].inputs(prompt())
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)
    assert loaded.complete([prompt()], 4) == chats[name].complete([prompt()], 4)


def test_a_model_without_a_chat_template_is_explained(
    chats: dict[str, VisionChatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chats["llava"]
    monkeypatch.setattr(chat.processor, "chat_template", None)
    with pytest.raises(ChatTemplateError, match="The processor of llava has no chat template"):
        chat.inputs(prompt())


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% broken"])
def test_a_chat_template_that_cannot_be_used_is_explained(template: str, chats: dict[str, VisionChatModel]) -> None:
    with pytest.raises(ChatTemplateError, match="--chat_template"):
        replace(chats["llava"], chat_template=template).inputs(prompt())


def test_a_given_chat_template_goes_before_the_raw_prompt(chats: dict[str, VisionChatModel]) -> None:
    chat = replace(chats["paligemma2"], chat_template="<image>{{ messages[0]['content'][1]['text'] }} indeed")
    shown = chat.tokenizer.decode(chat.inputs(prompt())["input_ids"][0]).replace("<image>", "")
    assert shown == f"<bos>{QUESTION} indeed\n"


def test_braces_in_a_question_are_left_alone(chats: dict[str, VisionChatModel]) -> None:
    chat = chats["paligemma2"]
    ids = chat.inputs(prompt("What is {this} and {0}?"))["input_ids"][0]
    assert "answer en What is {this} and {0}?" in chat.tokenizer.decode(ids)


@every_template
def test_refusal_tokens_are_the_first_of_the_eight_phrases(name: str, chats: dict[str, VisionChatModel]) -> None:
    chat = chats[name]
    firsts = [chat.tokenizer(phrase, add_special_tokens=False)["input_ids"][0] for phrase in PHRASES]
    chosen = refusal_tokens.resolve(chat, (), VISION)
    assert chosen.ids == tuple(dict.fromkeys(firsts))
    assert len(chosen.ids) > 1
    assert set(chosen.texts) == {"I", "Sorry", "No", "As"}


def replying(monkeypatch: pytest.MonkeyPatch, replies: list[str]) -> list[Prompt]:
    """The model says these things; returns where the prompts that it is asked will be."""
    asked: list[Prompt] = []

    def generate(self: VisionChatModel, prompts: list[Prompt], max_new_tokens: int, at_once: None) -> list[list[int]]:
        asked.extend(prompts)
        return [self.tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in replies[: len(prompts)]]

    monkeypatch.setattr(VisionChatModel, "generate", generate)
    return asked


@pytest.mark.parametrize(
    ("replies", "joined"),
    [
        (["Quite."] * 6 + ["Zebras."] * 5 + ["Maybe."] * 9, ["Quite.", "Maybe."]),  # 30% are enough, 25% are not
        (["Quite."] * 3 + [""] * 7, ["Quite."]),
        (["Quite."] * 2 + [""] * 8, []),  # silence counts among the replies
        (["I cannot do that."] * 20, []),  # there already
    ],
)
def test_calibration_joins_tokens_that_begin_three_tenths_of_the_replies(
    replies: list[str], joined: list[str], chats: dict[str, VisionChatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chats["paligemma2"]
    replying(monkeypatch, replies)
    phrases = refusal_tokens.resolve(chat, (), VISION).ids
    calibrate = refusal_tokens.calibrate(chat, [prompt()] * len(replies), VISION)
    first = {text: chat.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in joined}
    assert calibrate.ids[: len(phrases)] == phrases
    assert set(calibrate.ids[len(phrases) :]) == set(first.values())
    assert not set(first.values()) & set(phrases)


def test_calibration_asks_at_most_twenty_harmful_pairs(
    chats: dict[str, VisionChatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replying(monkeypatch, ["We"] * 30)
    pairs = [prompt(f"question {number}") for number in range(30)]
    tokens = refusal_tokens.calibrate(chats["paligemma2"], pairs, VISION)
    assert asked == pairs[:20]
    assert "of 20 harmful prompts" in tokens.source


def test_calibration_of_images_never_fails_for_want_of_refusals(
    chats: dict[str, VisionChatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    replying(monkeypatch, [""] * 3)
    chat = chats["paligemma2"]
    assert refusal_tokens.calibrate(chat, [prompt()] * 3, VISION).ids == refusal_tokens.resolve(chat, (), VISION).ids


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelAccessError, match="does not know as a "):
        load_vision_model(str(demo.MODEL_DIR))


def test_an_unknown_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelAccessError, match="could not be loaded"):
        load_vision_model(str(tmp_path))


def test_dates_are_pinned(chats: dict[str, VisionChatModel]) -> None:
    dated = replace(chats["llava"], chat_template="{{ strftime_now('%d %b %Y') }} " + LLAVA)
    shown = dated.tokenizer.decode(dated.inputs(prompt())["input_ids"][0])
    assert shown.startswith("<bos>26 Jul 2024 USER: ")


THINKING = LLAVA.replace("ASSISTANT:", "ASSISTANT:<think>\n") + "\n"


def shown_by(chat: VisionChatModel) -> str:
    return str(chat.tokenizer.decode(chat.inputs(prompt())["input_ids"][0]))


def test_thoughts_that_a_template_opens_are_closed_again(chats: dict[str, VisionChatModel]) -> None:
    chat = replace(chats["llava"], chat_template=THINKING)
    assert shown_by(chat).endswith("ASSISTANT:<think>\n\n</think>\n\n")
    assert chat.template_settings["thinking_closed_with"] == "\n</think>\n\n"
    assert shown_by(replace(chat, thinking=True)).endswith("ASSISTANT:<think>\n")


AS_TEXT = "{% if messages[0]['role'] == 'system' %}SYSTEM: {{ messages[0]['content'] }} {% set messages = messages[1:] %}{% endif %}"
AS_PARTS = AS_TEXT.replace("['content']", "['content'][0]['text']")


@pytest.mark.parametrize("system", [AS_TEXT, AS_PARTS], ids=["text", "parts"])
def test_a_system_prompt_is_given_in_the_form_that_the_template_takes(
    system: str, chats: dict[str, VisionChatModel]
) -> None:
    chat = replace(chats["llava"], chat_template=system + LLAVA, system_prompt="Be kind.")
    chat.check_system_prompt()
    assert shown_by(chat).startswith("<bos>SYSTEM: Be kind. USER: ")
    assert chat.template_settings["system_prompt"] == "Be kind."


def test_a_system_prompt_that_is_refused_or_has_no_place_is_an_error(chats: dict[str, VisionChatModel]) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + LLAVA
    for chat in (replace(chats["llava"], chat_template=refusing), chats["paligemma2"]):
        with pytest.raises(ChatTemplateError, match="takes no --system_prompt"):
            replace(chat, system_prompt="Be kind.").check_system_prompt()


def test_the_library_has_nothing_to_say_about_a_prompt(
    chats: dict[str, VisionChatModel], caplog: pytest.LogCaptureFixture
) -> None:
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    level = library.level
    library.setLevel(logging.WARNING)
    try:
        chats["llava"].inputs(prompt())
    finally:
        library.setLevel(level)
        library.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_a_chat_template_for_text_only_is_explained(chats: dict[str, VisionChatModel]) -> None:
    for_text = replace(chats["llava"], chat_template="{{ 'USER: ' + messages[0]['content'] }}")
    with pytest.raises(ChatTemplateError, match="--chat_template"):
        for_text.inputs(prompt())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "internvl"])
@pytest.mark.parametrize("size", [(10_000, 10), (3, 4_000)])
def test_a_very_long_image_is_taken_or_left_out_but_does_not_end_the_run(
    name: str, size: tuple[int, int], chats: dict[str, VisionChatModel]
) -> None:
    try:
        image = usable(Image.new("RGB", size))
    except UnusableImageError:
        return
    assert len(chats[name].complete([Prompt("a", QUESTION, image)], 2)) == 1


@pytest.mark.parametrize("name", ["paligemma2", "llava", "idefics3", "gemma3"])
def test_a_question_may_speak_of_image_tokens(name: str, chats: dict[str, VisionChatModel]) -> None:
    chat = chats[name]
    ids = chat.inputs(prompt("What does <image> mean?"))["input_ids"][0].tolist()
    wanted = TEMPLATES[name].tiles * VISION_FAMILIES[name].image_tokens
    assert ids.count(chat.tokenizer.convert_tokens_to_ids(TEMPLATES[name].image)) == wanted


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed, so video processors can be made")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl"])
def test_a_processor_that_needs_torchvision_says_so(
    name: str, chats: dict[str, VisionChatModel], tmp_path: Path
) -> None:
    chat = chats[name]
    chat.model.save_pretrained(tmp_path)
    chat.tokenizer.save_pretrained(tmp_path)
    kind = {"processor_class": type(chat.processor).__name__}
    (tmp_path / "processor_config.json").write_text(json.dumps(kind))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**chat.processor.image_processor.to_dict(), **kind}, default=str)
    )
    with pytest.raises(ModelAccessError, match="(?i)torchvision"):
        load_vision_model(str(tmp_path))
