"""The pipeline as a library: settings beside a loaded model, and inputs that cannot be right."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refusal_direction import (
    ChatModel,
    RunResult,
    ablated,
    extract,
    load_chat_model,
    load_vision_model,
    pipeline,
    steered,
)
from refusal_direction.config import VISION_CONFIG, Config, ModelSource, PromptSource, Thresholds
from refusal_direction.errors import (
    ConfigurationError,
    ModelAccessError,
    NoCandidateError,
    PromptError,
    TokenizerError,
    TooFewPromptsError,
    UnsupportedModelError,
)
from refusal_direction.models import inputs
from refusal_direction.models.control_tokens import ControlTokens
from refusal_direction.prompts import Kind, Prompt, PromptSets, Split
from refusal_direction.prompts.sets import SETS_FOR_SELECTION
from refusal_direction.results import table
from tests.conftest import SMALL

FEW = Config(prompts=PromptSource(n_train=16, n_val=8))


def with_prompt(prompts: PromptSets, text: str) -> PromptSets:
    odd = Prompt("mine/7", text)
    return replace(prompts, harmful_train=(odd, *prompts.harmful_train[1:]))


def test_settings_go_with_a_loaded_model(chat: ChatModel):
    found = extract(chat, replace(FEW, batch_size=3, thresholds=Thresholds(kl_threshold=1.0)))
    assert {which: len(found.prompts[which].ids) for which in SETS_FOR_SELECTION} == {
        (Kind.HARMFUL, Split.TRAIN): 16,
        (Kind.HARMLESS, Split.TRAIN): 16,
        (Kind.HARMFUL, Split.VALIDATION): 8,
        (Kind.HARMLESS, Split.VALIDATION): 8,
    }
    assert found.config.model.model_id == found.model.model_id == "demo"
    assert found.selection.conditions.kl_threshold == 1.0


def test_tokens_that_say_nothing_of_refusal_are_warned_of_in_the_results(
    chat: ChatModel, extraction: RunResult, prompts: PromptSets
):
    anything = Thresholds(kl_threshold=100.0, induce_threshold=-100.0)
    config = replace(FEW, refusal_tokens=("a",), skip_filter=True, thresholds=anything)
    (warning,) = extract(chat, config, prompts=prompts).warnings
    assert "hardly any harmful prompt counts as refused" in warning
    assert extraction.warnings == ()  # control


@pytest.mark.parametrize("config", [Config(), VISION_CONFIG], ids=["text", "images with text"])
def test_a_model_that_cannot_be_had_is_found_out_before_prompts_are_fetched(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fetched = []
    monkeypatch.setattr(pipeline.prompt_sources, "gather", lambda *args, **kwargs: fetched.append(args))
    for model_id in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(ModelAccessError):
            extract(model_id, config)
    assert not fetched


def test_a_prompt_whose_end_becomes_one_token_with_the_templates_is_refused(chat: ChatModel, prompts: PromptSets):
    """Else the mean at that position would be over other tokens."""
    merging = copy.deepcopy(chat.tokenizer)
    merging.add_tokens(["wall\n"])
    template = "{{ messages[0]['content'] }}\nReply:"
    odd = replace(chat, tokenizer=merging, chat_template=template)
    assert odd.text_of(odd.eoi_tokens[0]) == "\n"
    with pytest.raises(
        PromptError, match="The end of mine/7 and the text that the chat template puts after it become tokens"
    ):
        extract(odd, FEW, prompts=with_prompt(prompts, "Paint a wall"))


def test_prompts_without_images_are_not_for_a_vision_language_model():
    texts = PromptSets(["Name a colour."], ["Paint a wall."], ["Name a tree."], ["Paint a door."])
    with pytest.raises(PromptError, match="'Name a colour.' has no image, which demo needs"):
        extract(load_vision_model("demo"), prompts=texts)


def test_what_is_no_chat_model_or_no_prompts_is_explained(chat: ChatModel):
    with pytest.raises(ConfigurationError, match="not a GemmaForCausalLM. Load it by load_chat_model"):
        extract(chat.model)  # type: ignore[arg-type]
    for config in ("pruned", {"search": "pruned"}, Config):
        with pytest.raises(ConfigurationError, match=f"extract needs a Config, not a {type(config).__name__}: "):
            extract(chat, config)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"prompts must be PromptSets\(harmful_train=..., ...\), not a list"):
        extract(chat, prompts=[["a"]] * 4)  # type: ignore[arg-type]


def test_a_result_is_shown_as_its_table(extraction: RunResult):
    assert str(extraction) == table(extraction)
    assert str(extraction).startswith(f"Refusal direction of demo: {extraction.label} (of 8 layers)")
    assert len(repr(extraction)) < 3000


@pytest.mark.extended
def test_autocast_around_a_run_changes_nothing(chat: ChatModel, extraction: RunResult, prompts: PromptSets):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = extract(chat, extraction.config, prompts=prompts)
        lowered = chat.model(torch.arange(5, 9).unsqueeze(0)).logits
    assert lowered.dtype == torch.bfloat16  # control
    assert torch.allclose(found.candidates.vectors, extraction.candidates.vectors, atol=1e-5)
    assert found.engine.largest_leak < 1e-6


@pytest.mark.parametrize("select", ["best", "nearest"])
@pytest.mark.parametrize("search", ["exhaustive", "pruned"])
def test_prompts_that_are_the_same_on_both_sides_give_no_candidate(chat: ChatModel, search: str, select: str):
    same = replace(chat, chat_template="{{ messages[-1]['content'] | lower }} Reply:")
    texts = ("Name a colour.", "NAME A COLOUR.", "Name A Colour.", "name a colour.")
    config = replace(FEW, search=search, select=select, skip_filter=True)
    found = extract(same, config, prompts=PromptSets(*([text] for text in texts)))
    assert found.selection.index is None
    assert "Every candidate has length zero" in str(found)
    assert found.candidates.zero.all()
    with pytest.raises(NoCandidateError, match="Every candidate has length zero.*Are they the same"):
        found.direction.vector.norm()


def test_where_no_candidate_passes_the_result_has_every_score_and_its_direction_says_why(
    chat: ChatModel, extraction: RunResult, prompts: PromptSets
):
    found = extract(chat, replace(SMALL, thresholds=Thresholds(kl_threshold=-1.0)), prompts=prompts)
    assert found.means == extraction.means
    assert None not in found.selection.rejections
    assert str(found).startswith("No refusal direction of demo was selected (from 40 candidates in 8 layers)")
    nearest = f"The nearest miss, {extraction.label}, needs --kl_threshold 0.028."
    assert nearest in str(found)
    for asked in ("direction", "label"):
        with pytest.raises(
            NoCandidateError, match="25 by KL > -1(.|\n)*needs --kl_threshold 0.028(.|\n)*--select nearest"
        ):
            getattr(found, asked)


def test_the_nearest_miss_is_a_direction_on_request(chat: ChatModel, extraction: RunResult, prompts: PromptSets):
    config = replace(SMALL, thresholds=Thresholds(kl_threshold=-1.0), select="nearest")
    found = extract(chat, config, prompts=prompts)
    assert found.label == extraction.label  # it needs a KL that is a little higher, and nothing else
    assert torch.equal(found.direction.vector, extraction.direction.vector)
    assert found.selection.shortcomings == ["its KL is above -1"]
    assert "No candidate meets every condition" in found.warnings[-1]


def test_the_probability_of_the_refusal_tokens_is_that_of_each_kind_of_prompts(extraction: RunResult):
    """Train and validation prompts together, whatever the filter left."""
    for kind, found in extraction.refusal_probability.items():
        measured = [extraction.prompts[kind, split].probability for split in (Split.TRAIN, Split.VALIDATION)]
        ordered = torch.cat(measured).sort().values
        assert len(ordered) == 36
        middle = (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2
        assert found.median == pytest.approx(float(middle))
        assert found.lower <= found.median <= found.upper
    assert set(extraction.refusal_probability) == set(Kind)


@pytest.mark.extended
def test_a_half_precision_model_selects_the_same_candidate(extraction: RunResult, prompts: PromptSets):
    half = load_chat_model(ModelSource("demo", dtype="bfloat16"))
    found = extract(half, prompts=prompts)
    assert found.label == extraction.label
    for ours, exact in zip(found.means, extraction.means, strict=True):
        assert ours.ablation_refusal == pytest.approx(exact.ablation_refusal, abs=0.3)
    assert found.engine.largest_leak < 8e-3


def test_a_prompt_longer_than_the_model_takes_is_named(chat: ChatModel, prompts: PromptSets):
    with pytest.raises(PromptError, match=r"mine/7 has \d+ tokens, but demo takes 512"):
        extract(chat, prompts=with_prompt(prompts, "bread " * 600))


def test_a_tokenizer_of_another_model_is_found_out(
    chat: ChatModel, prompts: PromptSets, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inputs, "n_embeddings", lambda model: 300)
    with pytest.raises(TokenizerError, match="do not belong together"):
        extract(chat, prompts=prompts)


def test_a_model_in_training_is_looked_at_as_it_answers_and_trained_on(extraction: RunResult, prompts: PromptSets):
    """Without dropout; afterwards every module is as it was."""
    chat = load_chat_model("demo")
    for layer in chat.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    chat.model.train()
    chat.model.model.norm.eval()
    found = extract(chat, prompts=prompts)
    assert torch.equal(found.candidates.vectors, extraction.candidates.vectors)
    assert found.means == extraction.means
    assert [name for name, module in chat.model.named_modules() if not module.training] == ["model.norm"]


def test_a_compiled_model_gives_the_same_scores(extraction: RunResult, prompts: PromptSets):
    chat = load_chat_model("demo")
    chat.model.compile(backend="eager")
    chat.complete(["Name a colour."], 2)
    assert extract(chat, prompts=prompts).means == extraction.means


def test_a_configuration_for_the_other_kind_of_model_is_refused(chat: ChatModel):
    with pytest.raises(ConfigurationError, match="load_vision_model"):
        extract(chat, VISION_CONFIG)
    with pytest.raises(ConfigurationError, match="VISION_CONFIG"):
        extract(load_vision_model("demo"), Config())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Config(batch_size=0), "--batch_size 0: must be at least 1"),
        (lambda: Config(memory_budget=0), "--memory_budget 0"),
        (lambda: Config(select="first"), "--select first: must be best or nearest"),
        (lambda: Config(refusal_tokens="As"), r"--refusal_tokens: must be a tuple, .*, but 'As' \(str\) was given"),
        (lambda: Config(refusal_tokens=("I",), calibrate_refusal=True), "exclude each other"),
        (lambda: PromptSource(n_val=0), "--n_val 0"),
        (lambda: Thresholds(kl_threshold=float("nan")), "--kl_threshold nan: must be a number"),
        (lambda: Thresholds(induce_threshold=float("nan")), "--induce_threshold nan"),
        (lambda: Thresholds(prune_layers=-1), "--prune_layers -1"),
        (lambda: Thresholds(top_k_candidates=0), "--top_k_candidates 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_from_python_too(build: Callable[[], object], said: str):
    with pytest.raises(ConfigurationError, match=said):
        build()


def test_an_intervention_is_not_measured_as_the_models_own_doing(
    chat: ChatModel, extraction: RunResult, prompts: PromptSets
):
    r = extraction.direction
    for context in (ablated(chat.model, r.vector), steered(chat.model, r.vector, layer=r.layer)):
        with context, pytest.raises(ConfigurationError, match="End those contexts first"):
            extract(chat, prompts=prompts)


def test_an_empty_set_of_prompts_is_an_error(chat: ChatModel):
    with pytest.raises(TooFewPromptsError, match="is empty"):
        extract(chat, prompts=PromptSets((), (), (), ()))


def test_logits_that_are_not_numbers_are_found_out(chat: ChatModel, prompts: PromptSets):
    weight = chat.model.model.norm.weight
    own = weight.data.clone()
    weight.data[0] = torch.nan
    try:
        with pytest.raises(
            UnsupportedModelError, match=r"are not numbers.*not finite \(model\.norm\.weight\)"
        ) as error:
            extract(chat, prompts=prompts)
    finally:
        weight.data = own
    assert "--dtype" not in str(error.value)  # it would not help


def test_prompts_with_special_tokens_that_are_read_as_such_stand_in_the_record(
    chat: ChatModel, prompts: PromptSets, monkeypatch: pytest.MonkeyPatch
):
    prompts = with_prompt(prompts, "Say <end_of_turn> and go on")
    with pipeline.prepared(chat, FEW, prompts=prompts) as ready:
        assert not ready.warnings  # it is encoded as text
    monkeypatch.setattr(ControlTokens, "encode_plainly", lambda *_: None)
    with pipeline.prepared(chat, FEW, prompts=prompts) as ready:
        (warning,) = ready.warnings
    assert (
        "1 of the prompts hold special tokens of demo (<end_of_turn>), which it reads as its own turns: mine/7."
        in warning
    )
