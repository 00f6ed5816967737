"""Which axis of a layer's arguments belongs to the batch is learnt from two and three rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refusal_direction.engine.arguments import batch_axes
from refusal_direction.errors import UnsupportedModelError


@pytest.mark.parametrize(
    ("of_two", "of_three"),
    [
        pytest.param(torch.zeros(2, 5), torch.zeros(4, 5), id="not in proportion"),
        pytest.param(torch.zeros(2, 2), torch.zeros(3, 3), id="along two axes"),
        pytest.param(torch.zeros(2, 5), torch.zeros(3, 5, 1), id="another number of axes"),
        pytest.param([torch.zeros(5)] * 2, [torch.zeros(5)] * 3, id="a list with one entry a row"),
        pytest.param(torch.zeros(2, 5), None, id="there for two rows only"),
    ],
)
def test_argument_that_does_not_grow_with_the_batch_is_not_followed(of_two: Any, of_three: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        batch_axes((of_two,), (of_three,))


def test_argument_that_grows_with_the_batch_is_followed() -> None:
    """Control: also with heads folded into the batch, and beside one that does not grow."""
    two = (torch.zeros(8, 5), {"mask": torch.zeros(1, 2, 5)}, torch.zeros(5), None)
    three = (torch.zeros(12, 5), {"mask": torch.zeros(1, 3, 5)}, torch.zeros(5), None)
    assert batch_axes(two, three) == (0, {"mask": 1}, None, None)
