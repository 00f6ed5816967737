"""What every test runs under: seeded, offline, in one thread, nothing drawn on the screen.

torch is imported by the fixtures: the process that only hands the tests to the workers does without.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch and NumPy are
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings

from refusal_direction.config import Config, ModelSource, PromptSource

if TYPE_CHECKING:
    from refusal_direction import ChatModel, PromptSets, RunResult

settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("seeded")

SHARED = Path(__file__).parents[2] / "shared"
"""Reference data that lies beside the repository where it is developed; not part of the project."""


@pytest.fixture(scope="session", autouse=True)
def _single_threaded() -> None:
    """Tests that run beside each other have a core each."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

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
    from refusal_direction import load_chat_model

    return load_chat_model("demo")


SMALL = Config(model=ModelSource("demo"), prompts=PromptSource(n_train=24, n_val=12))
"""A small but whole run on the demo model."""


@pytest.fixture(scope="session")
def prompts() -> PromptSets:
    """The prompts of the small run."""
    from refusal_direction.prompts import gather

    return gather(SMALL)


@pytest.fixture(scope="session")
def extraction(chat: ChatModel, prompts: PromptSets) -> RunResult:
    """The small run on the demo model."""
    from refusal_direction import extract

    return extract(chat, SMALL, prompts=prompts)


@pytest.fixture(scope="session")
def harmful() -> list[str]:
    return _demo_prompts("harmful")


@pytest.fixture(scope="session")
def harmless() -> list[str]:
    return _demo_prompts("harmless")


def _demo_prompts(kind: str) -> list[str]:
    from refusal_direction import demo
    from refusal_direction.prompts import read_prompts

    return [prompt.text for prompt in read_prompts(demo.PROMPTS_DIR / f"{kind}_test.json")]
