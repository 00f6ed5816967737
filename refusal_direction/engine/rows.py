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

from refusal_direction.candidates import Candidates
from refusal_direction.directions import ablate, unit

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Intervention", "LengthGroup", "Row", "Tables", "lay_out"]


class Intervention(Enum):
    """What is done to a row: nothing, directional ablation, or activation addition (steering)."""

    BASELINE = "baseline"
    ABLATION = "ablation"
    STEERING = "steering"


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt (its index) under one intervention by one candidate (its index; -1 for the baseline)."""

    prompt: int
    intervention: Intervention = Intervention.BASELINE
    candidate: int = -1


@dataclass(frozen=True)
class Tables:
    """The candidates' directions in the dtype and on the device of the stream, with a last row of zeros: "none"."""

    added: Float[Tensor, "candidate+1 d_model"]
    units: Float[Tensor, "candidate+1 d_model"]

    @classmethod
    def of(cls, candidates: Candidates | None, like: Tensor) -> Tables:
        """r to add and u to ablate; of no candidates, the zeros alone."""
        if candidates is None:
            nothing = like.new_zeros(1, like.shape[-1])
            return cls(nothing, nothing)
        wide = candidates.vectors.to(torch.promote_types(candidates.vectors.dtype, torch.float32))
        added, units = (
            torch.nn.functional.pad(table, (0, 0, 0, 1)).to(like.dtype).to(like.device) for table in (wide, unit(wide))
        )
        return cls(added, units)


@dataclass
class LengthGroup:
    """Rows of equal length, on their way through the layers."""

    group: int
    rows: list[Row | None]
    """None: a baseline that is only there for steered rows to branch off."""
    places: Int[Tensor, "row"]
    """Each row's prompt, as an index into its group."""
    starts: list[int]
    """The layer at which each row enters, ascending."""
    parents: list[int]
    """The baseline row that a row branches off if it starts above layer 0."""
    added: Int[Tensor, "row"]
    """Which candidate is added where the row starts; the tables' last: none."""
    ablated: Int[Tensor, "row"]
    """Which candidate is ablated, likewise."""
    tables: Tables
    leads: Int[Tensor, "row"] | None = None
    """Each row's row in the lane of the common prefix, if there is one."""
    hidden: Float[Tensor, "row token d_model"] = field(default_factory=lambda: torch.empty(0))

    @property
    def n_baseline(self) -> int:
        """Rows that are run as they are and asked for; they stand first."""
        return sum(row is not None and row.intervention is Intervention.BASELINE for row in self.rows)

    @property
    def any_ablated(self) -> bool:
        return any(row is not None and row.intervention is Intervention.ABLATION for row in self.rows)

    def entered(self, layer: int) -> int:
        """How many rows are under way once those that start at `layer` have entered."""
        return bisect_right(self.starts, layer)

    def units(self, rows: slice) -> Float[Tensor, "row d_model"]:
        """Each row's u; zero where nothing is ablated."""
        return self.tables.units[self.ablated[rows]]

    def enter(self, layer: int, embedded: Float[Tensor, "prompt token d_model"], at_once: int) -> None:
        """Let the rows that start at `layer` enter: from the embedding at layer 0, above it from their baseline row.

        An added direction is added at every position; ablated rows lose what their embedding has along u. So many rows
        are copied `at_once`.
        """
        if layer == 0:
            self.hidden = embedded.new_empty(len(self.rows), *embedded.shape[1:])
        for begin in range(self.entered(layer - 1), self.entered(layer), at_once):
            new = slice(begin, min(begin + at_once, self.entered(layer)))
            entering = embedded[self.places[new]] if layer == 0 else self.hidden[self.parents[new]]
            entering += self.tables.added[self.added[new]].unsqueeze(1)
            self.hidden[new] = ablate(entering, self.units(new)) if self.any_ablated else entering


def lay_out(
    rows: Sequence[Row], placed: Mapping[int, tuple[int, int]], candidates: Candidates | None, *, tables: Tables
) -> Iterator[LengthGroup]:
    """Sort rows into lanes. `placed[prompt]` is the prompt's group (prompts of equal length) and its place there."""
    by_group: dict[int, list[Row]] = {}
    for row in rows:
        by_group.setdefault(placed[row.prompt][0], []).append(row)
    layers = () if candidates is None else candidates.layers
    for group, members in by_group.items():
        yield _lane(group, members, {row.prompt: placed[row.prompt][1] for row in members}, layers, tables)


def _lane(
    group: int, members: list[Row], places: dict[int, int], layers: tuple[int, ...], tables: Tables
) -> LengthGroup:
    baseline = [row for row in members if row.intervention is Intervention.BASELINE]
    ablated = [row for row in members if row.intervention is Intervention.ABLATION]
    steered = sorted(
        (row for row in members if row.intervention is Intervention.STEERING), key=lambda row: layers[row.candidate]
    )
    there = dict.fromkeys(row.prompt for row in baseline)
    missing = [prompt for prompt in dict.fromkeys(row.prompt for row in steered) if prompt not in there]
    branch_point = {prompt: index for index, prompt in enumerate([*there, *missing])}  # what steered rows branch off
    prompts = [*branch_point, *(row.prompt for row in (*ablated, *steered))]
    none, n_trunk = len(tables.units) - 1, len(branch_point)
    return LengthGroup(
        group=group,
        rows=[*baseline, *(None for _ in missing), *ablated, *steered],
        places=torch.tensor([places[prompt] for prompt in prompts]),
        starts=[0] * (n_trunk + len(ablated)) + [layers[row.candidate] for row in steered],
        parents=[branch_point.get(prompt, -1) for prompt in prompts],
        added=torch.tensor([none] * (n_trunk + len(ablated)) + [row.candidate for row in steered]),
        ablated=torch.tensor([none] * n_trunk + [row.candidate for row in ablated] + [none] * len(steered)),
        tables=tables,
    )
