"""The rows that go through the layers, and how they are laid out in memory.

A row is one prompt under one intervention. Rows of equal length share a lane: one tensor of hidden states whose rows are
sorted by the layer at which they enter, so that the rows under way at any layer are a prefix, and microbatches are slices.
Nothing is padded, nothing is copied between layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.directions import ablate

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Candidates", "Kind", "Lane", "Row", "lay_out"]


class Kind(Enum):
    """What is done to a row: nothing, directional ablation, or activation addition (steering)."""

    BASELINE = "baseline"
    ABLATION = "ablation"
    STEERING = "steering"


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt (its index) under one intervention by one candidate (its index; -1 for the baseline)."""

    prompt: int
    kind: Kind = Kind.BASELINE
    candidate: int = -1


@dataclass(frozen=True)
class Candidates:
    """Directions r, and the layer at whose input each was measured and is added."""

    vectors: Float[Tensor, "candidate d_model"]
    layers: tuple[int, ...]


@dataclass
class Lane:
    """Rows of equal length and like treatment, on their way through the layers."""

    group: int
    rows: list[Row | None]  # None: a baseline that is only there for steered rows to branch off
    places: Int[Tensor, "row"]  # each row's prompt, as an index into its group
    starts: list[int]  # ascending
    parents: list[int]  # for a row that starts above layer 0: the baseline row it branches off
    vectors: Float[Tensor, "row d_model"] | None  # what is added where a row starts, or u of the ablated rows
    ablated: bool
    hidden: Float[Tensor, "row token d_model"] = field(default_factory=lambda: torch.empty(0))

    def entered(self, layer: int) -> int:
        """How many rows are under way once those that start at `layer` have entered."""
        return bisect_right(self.starts, layer)

    def enter(self, layer: int, embedded: Float[Tensor, "prompt token d_model"]) -> None:
        """Let the rows that start at `layer` enter: from the embedding at layer 0, above it from their baseline row.

        An added direction is added at every position; ablated rows lose what their embedding has along u.
        """
        new = slice(self.entered(layer - 1), self.entered(layer))
        if new.start == new.stop:
            return
        if layer == 0:
            self.hidden = embedded.new_empty(len(self.rows), *embedded.shape[1:])
            self.hidden[new] = embedded[self.places[new]]
        else:
            self.hidden[new] = self.hidden[self.parents[new]]
        if self.vectors is not None:
            vectors = self.vectors[new].to(self.hidden)
            if self.ablated:
                self.hidden[new] = ablate(self.hidden[new], vectors)
            else:
                self.hidden[new] += vectors.unsqueeze(1)


def _plain_lane(group: int, rows: list[Row], places: dict[int, int], candidates: Candidates | None) -> Lane:
    steered = sorted((row for row in rows if row.kind is Kind.STEERING), key=lambda row: _start(row, candidates))
    ordered: list[Row | None] = [row for row in rows if row.kind is Kind.BASELINE]
    prompts = [row.prompt for row in ordered if row]
    for prompt in dict.fromkeys(row.prompt for row in steered):
        if prompt not in prompts:
            prompts.append(prompt)
            ordered.append(None)
    baseline = {prompt: index for index, prompt in enumerate(prompts)}
    vectors = None
    if steered and candidates is not None:
        d_model = candidates.vectors.shape[-1]
        none = candidates.vectors.new_zeros(len(ordered), d_model)
        vectors = torch.cat([none, candidates.vectors[[row.candidate for row in steered]]])
    return Lane(
        group=group,
        rows=[*ordered, *steered],
        places=torch.tensor([places[prompt] for prompt in [*prompts, *(row.prompt for row in steered)]]),
        starts=[0] * len(ordered) + [_start(row, candidates) for row in steered],
        parents=[*range(len(ordered)), *(baseline[row.prompt] for row in steered)],
        vectors=vectors,
        ablated=False,
    )


def _start(row: Row, candidates: Candidates | None) -> int:
    return candidates.layers[row.candidate] if candidates is not None and row.kind is Kind.STEERING else 0


def lay_out(
    rows: Sequence[Row],
    placed: Mapping[int, tuple[int, int]],
    candidates: Candidates | None,
    units: Float[Tensor, "candidate d_model"] | None,
) -> Iterator[Lane]:
    """Sort rows into lanes. `placed[prompt]` is the prompt's group (prompts of equal length) and its place there."""
    by_group: dict[int, list[Row]] = {}
    for row in rows:
        by_group.setdefault(placed[row.prompt][0], []).append(row)
    for group, members in by_group.items():
        places = {row.prompt: placed[row.prompt][1] for row in members}
        plain = [row for row in members if row.kind is not Kind.ABLATION]
        ablated = [row for row in members if row.kind is Kind.ABLATION]
        if plain:
            yield _plain_lane(group, plain, places, candidates)
        if ablated and units is not None:
            yield Lane(
                group=group,
                rows=list(ablated),
                places=torch.tensor([places[row.prompt] for row in ablated]),
                starts=[0] * len(ablated),
                parents=list(range(len(ablated))),
                vectors=units[[row.candidate for row in ablated]],
                ablated=True,
            )
