"""Tiny random models whose weights are not as initialised: every write is about as large as the stream, norms are not 1 and
biases are not 0, so that a missed write, a skipped norm or a wrong row shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.families.sizes import small

__all__ = ["SCALE", "Family", "build", "layers_of", "randomise"]

SCALE = 1.2
"""How large the matrices of decoder layers are, in units that keep the size of what they multiply; less for some recurrent
families, in which rounding grows from token to token."""
_AS_INITIALISED = ("A_log", "dt_bias", ".D")
"""Rates of decay of recurrent layers, which are only stable as they are."""


@dataclass(frozen=True)
class Family:
    """One architecture at its smallest, and what a person reads in its source."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    """In addition to, or instead of, the sizes that all families have."""
    layers: str = "model.layers"
    norms: tuple[str, ...] = ()
    """The norms of a layer that stand on the residual stream itself, rather than before or after a submodule."""
    notable: str = ""
    """What its layers have that Llama's have not."""
    refused: str = ""
    """Why no direction is computed for it: words of the error."""
    writes: tuple[str, ...] = ()
    """For some families: the submodules of a layer whose outputs are added to the stream, in that order."""
    scale: float = SCALE
    needs_position_ids: bool = False
    """Whether a left-padded batch is only right with explicit position ids (learned absolute positions)."""


def build(family: Family, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the family with random, non-degenerate weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small(family.model_type, **family.config))
    return randomise(model, family.layers, family.scale, seed).to(dtype)


@torch.no_grad()
def randomise(model: PreTrainedModel, layers: str, scale: float, seed: int) -> PreTrainedModel:
    """Give the model other weights. `layers`: the name of its decoder layers, `scale`: the size of their matrices."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:  # norms and biases
            weight += 0.0 if name.endswith(_AS_INITIALISED) else 0.3 * noise
        elif id(weight) in embeddings:
            weight.copy_(0.5 * noise)
        else:
            fan_in = weight[0].numel() if weight.ndim > 3 else weight.shape[-1]
            weight.copy_((scale if layers in name else 1.0) * noise / fan_in**0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8)
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


class _HasLayers(Protocol):
    @property
    def layers(self) -> str: ...


def layers_of(model: PreTrainedModel, family: _HasLayers) -> nn.ModuleList:
    """The decoder layers, by their name."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers
