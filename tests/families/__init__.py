"""Every architecture that the tests know: tiny random models, and what a person reads in each family's source.

`python -m tests.families` writes docs/families.md, the support matrix. Nothing but `examination` imports the package under
test.
"""

import pytest

from tests.families.building import Family, build, layers_of
from tests.families.sizes import D_MODEL, N_LAYERS, VOCAB
from tests.families.tables import TEXT_FAMILIES

__all__ = [
    "D_MODEL",
    "FAMILIES",
    "N_LAYERS",
    "SHARING_FAMILY",
    "TEXT_FAMILIES",
    "VOCAB",
    "Family",
    "build",
    "each_family",
    "layers_of",
]

SHARING_FAMILY = TEXT_FAMILIES["gemma4_text"]
"""A family whose upper layers reuse the keys and values of lower ones, so that rows cannot go layer by layer."""

FAMILIES = {name: family for name, family in TEXT_FAMILIES.items() if family.writes and family is not SHARING_FAMILY}
"""Families that run layer-major and whose writes are known."""


_ALWAYS = ("llama", "gemma2", "gpt2", "bloom", "mixtral", "opt")
"""Families that differ most: norms before, around and after, learnt and relative positions, experts."""


def each_family(name: str = "name") -> pytest.MarkDecorator:
    """One test for each of `FAMILIES`, of which the default run takes those that differ most."""
    each = [pytest.param(one, marks=() if one in _ALWAYS else pytest.mark.extended) for one in FAMILIES]
    return pytest.mark.parametrize(name, each)
