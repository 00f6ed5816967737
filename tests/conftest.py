"""What every test runs under: seeded, offline, nothing drawn on the screen."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from hypothesis import settings

from refusal_direction import ChatModel, RunResult, demo, extract, load_chat_model
from refusal_direction.config import Config, ModelSource, PromptSource
from refusal_direction.prompts import PromptSets, gather, read_prompts

settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("seeded")

SHARED = Path(__file__).parents[2] / "shared"
"""Reference data that lies beside the repository where it is developed; not part of the project."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Results of the method's reference implementation."""
    return _shared("golden")


@pytest.fixture(scope="session")
def splits() -> Path:
    """The published prompt splits."""
    return _shared("data/splits")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: it is kept beside the repository, not in it")
    return folder


@pytest.fixture(scope="session")
def chat() -> ChatModel:
    """The demo model."""
    return load_chat_model("demo")


SMALL = Config(model=ModelSource("demo"), prompts=PromptSource(n_train=24, n_val=12))
"""A small but whole run on the demo model."""


@pytest.fixture(scope="session")
def prompts() -> PromptSets:
    """The prompts of the small run."""
    return gather(SMALL)


@pytest.fixture(scope="session")
def extraction(chat: ChatModel, prompts: PromptSets) -> RunResult:
    """The small run on the demo model."""
    return extract(chat, SMALL, prompts=prompts)


@pytest.fixture(scope="session")
def harmful() -> list[str]:
    return [prompt.text for prompt in read_prompts(demo.PROMPTS_DIR / "harmful_test.json")]


@pytest.fixture(scope="session")
def harmless() -> list[str]:
    return [prompt.text for prompt in read_prompts(demo.PROMPTS_DIR / "harmless_test.json")]
