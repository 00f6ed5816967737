"""Find the direction in the residual stream that carries refusal in open-weights chat models (Arditi et al., 2024).

    extract            model and prompts -> direction, scores, proof
    ablated            context in which a model runs with a direction removed from its residual stream
    steered            context in which a model runs with a direction added
    load_chat_model    weights, tokenizer and template of a chat model
    load_vision_model  weights and processor of a vision-language model
    load_direction     what an earlier run found
    Config             every setting of a run
    PromptSets         prompts of one's own

Importing the package is cheap: torch is loaded when one of these is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refusal_direction.config import Config
    from refusal_direction.engine.interventions import ablated, steered
    from refusal_direction.errors import RefusalDirectionError
    from refusal_direction.models.chat import ChatModel
    from refusal_direction.models.loading import load_chat_model, load_vision_model
    from refusal_direction.output.artifacts import load_direction
    from refusal_direction.pipeline import Direction, RunResult, extract
    from refusal_direction.prompts.sets import PromptSets

__all__ = [
    "ChatModel",
    "Config",
    "Direction",
    "RunResult",
    "PromptSets",
    "RefusalDirectionError",
    "ablated",
    "extract",
    "load_chat_model",
    "load_direction",
    "load_vision_model",
    "steered",
]

_HOMES = {
    "ChatModel": "models.chat",
    "Config": "config",
    "Direction": "pipeline",
    "RunResult": "pipeline",
    "PromptSets": "prompts.sets",
    "RefusalDirectionError": "errors",
    "ablated": "engine.interventions",
    "extract": "pipeline",
    "load_chat_model": "models.loading",
    "load_direction": "output.artifacts",
    "load_vision_model": "models.loading",
    "steered": "engine.interventions",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
