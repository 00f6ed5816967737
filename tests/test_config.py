"""Settings from Python: each is checked by the type of its field, and text by what files and models can take."""

from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path, PurePosixPath
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from refusal_direction.config import TEXT, Config, ModelSource, PromptSource, Rules, Thresholds
from refusal_direction.errors import ConfigurationError

PARTS = (ModelSource, PromptSource, Thresholds, Config)
FIELDS = [(kind, field) for kind in PARTS for field in fields(kind)]


def types_of(kind: type, field: Field[Any]) -> tuple[Any, ...]:
    """The types that a setting may have."""
    hint = get_type_hints(kind)[field.name]
    return (hint,) if get_origin(hint) is tuple else get_args(hint) or (hint,)


TEXTS = [(kind, field) for kind, field in FIELDS if {str, Path} & set(types_of(kind, field))]

WRONG: dict[type, tuple[Any, ...]] = {
    bool: (0, 1, "no", "", 1.0),
    int: (8.5, 8.0, "8", "abc", True, [8], object()),
    float: ("abc", "0.1", True, [0.1], 1j, object()),
    str: (7, 1.5, True, ["a"], b"a", object()),
    Path: (7, 1.5, True, ["a"], b"a", object()),
}
"""Values of other types, some of which Python would convert without a word."""


def of_each_field() -> list[tuple[type, str, Any]]:
    cases: list[tuple[type, str, Any]] = []
    for kind, field in FIELDS:
        types = types_of(kind, field)
        values = [value for one in WRONG if one in types for value in WRONG[one]] or [7, "gemma", object(), {"a": 1}]
        cases += [
            (kind, field.name, value) for value in (*values, None) if value is not None or type(None) not in types
        ]
    return cases


@pytest.mark.parametrize(("kind", "name", "value"), of_each_field())
def test_a_value_of_another_type_is_named_with_what_was_expected(kind: type, name: str, value: object):
    with pytest.raises(ConfigurationError, match=rf"^(--)?{name}: (must be .*, but .*was given|it is empty)"):
        kind(**{name: value})


@pytest.mark.parametrize("name", [field.name for field in fields(Rules)])
def test_rules_are_checked_too(name: str):
    with pytest.raises(ConfigurationError, match=f"^{name}: must be"):
        Rules(**{**vars(TEXT), name: object()})


def test_what_loses_nothing_is_converted():
    thresholds = Thresholds(kl_threshold=1, prune_layers=np.float32(0.5))
    assert (type(thresholds.kl_threshold), thresholds.prune_layers) == (float, 0.5)
    source = PromptSource(n_train=np.int64(8), harmful="a.txt", data_dir=PurePosixPath("b"))
    assert (type(source.n_train), source.n_train, source.harmful, source.data_dir) == (int, 8, Path("a.txt"), Path("b"))
    assert Config(refusal_tokens=["I", np.int32(3)]).refusal_tokens == ("I", 3)
    assert ModelSource(Path("models") / "mine", chat_template=Path("a.jinja")).chat_template == "a.jinja"


@pytest.mark.parametrize(
    "build",
    [
        lambda: Thresholds(kl_threshold=10**400),
        lambda: Config(refusal_tokens=(1.5,)),
        lambda: Config(refusal_tokens="I"),
        lambda: Config(methods="difference_of_means"),
        lambda: Config(methods=()),
        lambda: Config(refusal_tokens=(-1,)),
    ],
)
def test_what_cannot_be_converted_is_an_error(build: Callable[[], object]):
    with pytest.raises(ConfigurationError):
        build()


SPOILED = {"a\udcff": "bytes that are not UTF-8", "a\0b": "a NUL character", "": "it is empty"}
"""Text as it comes from a shell: bytes that are not UTF-8 become halves of surrogate pairs."""


@pytest.mark.parametrize("text", SPOILED, ids=["not UTF-8", "NUL", "empty"])
@pytest.mark.parametrize(("kind", "field"), TEXTS, ids=[field.name for _, field in TEXTS])
def test_text_that_nothing_can_take_is_an_error_in_every_setting(kind: type, field: Field[Any], text: str):
    if not text and field.name == "system_prompt":
        assert (
            ModelSource(system_prompt="").system_prompt == ""
        )  # a message without text, in place of the template's own
        return
    for value in (text, Path(text)) if text and Path in types_of(kind, field) else (text,):
        with pytest.raises(ConfigurationError, match=rf"^--{field.name}.*{SPOILED[text]}"):
            kind(**{field.name: value})


def test_each_refusal_token_is_checked():
    for text, said in SPOILED.items():
        with pytest.raises(ConfigurationError, match=f"--refusal_tokens.*{said}"):
            Config(refusal_tokens=("I", text))


def test_a_tilde_is_the_home_folder_wherever_a_folder_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    model = ModelSource("~/gemma", adapter="~/lora", chat_template="~/chat.jinja", system_prompt="~/no path")
    assert (model.model_id, model.adapter, model.chat_template) == tuple(
        f"/home/ada/{name}" for name in ("gemma", "lora", "chat.jinja")
    )
    assert model.system_prompt == "~/no path"
    assert PromptSource(harmful="~/bad.txt").harmful == Path("/home/ada/bad.txt")
    assert ModelSource(chat_template="~/{{ messages[0].content }}").chat_template == "~/{{ messages[0].content }}"
