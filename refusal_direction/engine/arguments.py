"""Selection of rows from the recorded layer arguments.

A prelude records the arguments for its own prompts. A microbatch runs other rows, in which one prompt may appear many
times, so every tensor with one slice per prompt must be indexed. Position embeddings, masks, ALiBi biases with heads folded
into the batch and per-layer inputs have this axis in different places. It is found once, by comparing a batch of two prompts
with a batch of three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refusal_direction.errors import UnsupportedModelError

if TYPE_CHECKING:
    from jaxtyping import Int

__all__ = ["batch_axes", "concatenate", "map_tensors", "take_rows"]


def map_tensors(visit: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply `visit` to corresponding tensors of nested tuples, lists and mappings; keep other leaves of the first tree.

    Where the first tree has no tensor, those of the others are ignored: short prompts may lack a mask that long ones have.

    Raises UnsupportedModelError if corresponding sequences differ in length.
    """
    if isinstance(tree, Tensor):
        return visit(tree, *others)
    if isinstance(tree, (tuple, list)):
        if any(len(other) != len(tree) for other in others):
            raise UnsupportedModelError("The number of elements of a layer argument depends on the number of rows.")
        return type(tree)(map_tensors(visit, *parts) for parts in zip(tree, *others, strict=True))
    if isinstance(tree, Mapping):
        return {name: map_tensors(visit, tree[name], *(other[name] for other in others)) for name in tree}
    return tree


def _axis(of_two: Tensor, of_three: Tensor | None) -> int | None:
    if of_three is None or of_two.ndim != of_three.ndim:
        raise UnsupportedModelError("The number of dimensions of a layer argument depends on the number of rows.")
    differing = [axis for axis, (a, b) in enumerate(zip(of_two.shape, of_three.shape, strict=True)) if a != b]
    if len(differing) > 1 or any(of_two.shape[axis] * 3 != of_three.shape[axis] * 2 for axis in differing):
        raise UnsupportedModelError(
            f"A layer argument of shape {tuple(of_two.shape)} does not grow in proportion to the batch."
        )
    return differing[0] if differing else None


def batch_axes(of_two: Any, of_three: Any) -> Any:
    """For each tensor the axis with one slice a prompt, or None, from preludes of two and of three prompts.

    Raises UnsupportedModelError if the two cannot be compared.
    """
    return map_tensors(_axis, of_two, of_three)


def take_rows(tree: Any, axes: Any, rows: Int[Tensor, "row"], *, prompts: int) -> Any:
    """Arguments for `rows`, each an index into the prompts (`prompts` of them) that were recorded together."""

    def take(tensor: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return tensor
        split = tensor.unflatten(axis, (prompts, tensor.shape[axis] // prompts))
        return split.index_select(axis, rows.to(tensor.device)).flatten(axis, axis + 1)

    return map_tensors(take, tree, axes)


def concatenate(trees: list[Any], axes: Any, joined: dict[int, Tensor]) -> Any:
    """Concatenate the arguments of several preludes.

    Layers share tensors, and a mask can be large. `joined` therefore keeps the results of earlier layers, by the identity of
    the first prelude's tensor.
    """

    def join(tensor: Tensor, axis: int | None, *others: Tensor) -> Tensor:
        if axis is None or not others:
            return tensor
        if id(tensor) not in joined:
            joined[id(tensor)] = torch.cat([tensor, *others], axis)
        return joined[id(tensor)]

    return map_tensors(join, trees[0], axes, *trees[1:])
