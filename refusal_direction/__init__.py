"""Find the direction in the residual stream that carries refusal in open-weights chat models (Arditi et al., 2024).

Importing the package is cheap: torch is loaded when one of its names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refusal_direction.config import Config as Config
    from refusal_direction.engine.interventions import ablated as ablated
    from refusal_direction.engine.interventions import steered as steered
    from refusal_direction.errors import RefusalDirectionError as RefusalDirectionError
    from refusal_direction.models.chat import ChatModel as ChatModel
    from refusal_direction.models.loading import load_chat_model as load_chat_model
    from refusal_direction.models.loading import load_vision_model as load_vision_model
    from refusal_direction.output.artifacts import load_direction as load_direction
    from refusal_direction.output.artifacts import load_run as load_run
    from refusal_direction.pipeline import extract as extract
    from refusal_direction.prompts.sets import Prompt as Prompt
    from refusal_direction.prompts.sets import PromptSets as PromptSets
    from refusal_direction.results import Direction as Direction
    from refusal_direction.results import RunResult as RunResult

_HOMES = {
    "ChatModel": "models.chat",
    "Config": "config",
    "Direction": "results",
    "Prompt": "prompts.sets",
    "PromptSets": "prompts.sets",
    "RefusalDirectionError": "errors",
    "RunResult": "results",
    "ablated": "engine.interventions",
    "extract": "pipeline",
    "load_chat_model": "models.loading",
    "load_direction": "output.artifacts",
    "load_run": "output.artifacts",
    "load_vision_model": "models.loading",
    "steered": "engine.interventions",
}
"""The public names, and the module of each; the imports above tell type checkers the same."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
