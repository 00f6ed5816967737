"""Real models, which lie in the folder that the environment variable REAL_MODELS names: `REAL_MODELS=... pytest -m real`.

smollm2-135m/model.gguf     SmolLM2-135M-Instruct, Q4_1
smollm2-135m/hf             the same weights, de-quantised, as transformers saves them
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from refusal_direction import Config, extract, load_chat_model, prompts
from refusal_direction.config import ModelSource, PromptSource, Thresholds

_FOLDER = os.environ.get("REAL_MODELS")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(_FOLDER is None, reason="the environment variable REAL_MODELS names no folder of real models"),
]
SMALL = PromptSource(n_train=1, n_val=1, n_test=0)


def folder(name: str) -> Path:
    path = Path(str(_FOLDER)) / name
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
def test_a_gguf_file_has_the_scores_of_the_same_weights_in_safetensors_format():
    model, chosen = folder("smollm2-135m"), prompts.gather(Config(model=ModelSource("demo"), prompts=SMALL))
    every = Thresholds(kl_threshold=1e9, induce_threshold=-1e9)
    config = Config(prompts=SMALL, thresholds=every, skip_filter=True)
    ours, theirs = (
        extract(load_chat_model(path), config, prompts=chosen) for path in (model / "model.gguf", model / "hf")
    )
    assert ours.model.quantization["weights"] == "GGUF Q4_1, de-quantised"
    assert ours.eoi_tokens == theirs.eoi_tokens
    for name in ("ablation", "steering", "kl"):
        own, expected = getattr(ours.scores, name), getattr(theirs.scores, name)
        assert torch.allclose(own, expected, atol=1e-4, equal_nan=True)
