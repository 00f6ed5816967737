"""Engine that runs prompts under interventions: layer by layer, or by hooked forwards where a model needs them."""

from __future__ import annotations

from refusal_direction.engine.engine import Engine
from refusal_direction.engine.protocol import Tick, silent
from refusal_direction.engine.rows import Intervention, Row

__all__ = ["Engine", "Intervention", "Row", "Tick", "silent"]
