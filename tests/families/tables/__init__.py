"""The configurations of the support matrix, as data."""

from tests.families.tables.attention import ATTENTION
from tests.families.tables.core import CORE
from tests.families.tables.hybrid import HYBRID
from tests.families.tables.singular import SINGULAR
from tests.families.tables.untried import UNTRIED
from tests.families.tables.vision import VISION_FAMILIES

__all__ = ["CORE", "TEXT_FAMILIES", "UNTRIED", "VISION_FAMILIES"]

TEXT_FAMILIES = {**ATTENTION, **HYBRID, **SINGULAR}
