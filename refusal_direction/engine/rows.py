"""Rows that go through the layers, and their layout in memory.

A row is one prompt under one intervention. Rows of equal length form a length group: one tensor of hidden states, sorted by
the layer at which rows enter. The rows under way at a layer are then the first ones, and microbatches are slices. No row is
padded, and none is copied between layers.
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
from refusal_direction.engine.kept import KeptRows

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Intervention", "LengthGroup", "Row", "Tables", "lay_out"]


class Intervention(Enum):
    """Intervention on a row: none, directional ablation, or activation addition (steering)."""

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
    """The candidates' directions in the stream's dtype and on its device; an extra last row of zeros stands for none."""

    added: Float[Tensor, "candidate+1 d_model"]
    """r, not normalised."""
    units: Float[Tensor, "candidate+1 d_model"]
    """u, of unit length."""

    @classmethod
    def of(cls, candidates: Candidates | None, like: Tensor) -> Tables:
        """Tables of the candidates; without candidates, the row of zeros alone."""
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
    """Rows of equal length on their way through the layers."""

    group: int
    """Index of the prompt group to which the rows' prompts belong."""
    rows: list[Row | None]
    """None: a baseline row that was not asked for, and only serves steered rows as their branch point."""
    places: Int[Tensor, "row"]
    """Each row's prompt, as an index into the prompt group."""
    starts: list[int]
    """The layer at which each row enters, ascending."""
    parents: list[int]
    """Each row's branch point, the baseline stream that it copies if it enters above layer 0: an index into those kept from
    earlier passes, followed by this pass's."""
    added: Int[Tensor, "row"]
    """Index into `tables` of the candidate that is added where the row enters."""
    ablated: Int[Tensor, "row"]
    """Index into `tables` of the candidate that is ablated."""
    tables: Tables
    kept: KeptRows[int] = field(default_factory=KeptRows)
    """Branch points kept from earlier passes, by prompt."""
    prefix_rows: Int[Tensor, "row"] | None = None
    """Each row's row in the length group of the shared prefix, if prompts share one."""
    hidden: Float[Tensor, "row token d_model"] = field(default_factory=lambda: torch.empty(0))

    @property
    def n_baseline(self) -> int:
        """Number of baseline rows that were asked for; they come first."""
        return sum(row is not None and row.intervention is Intervention.BASELINE for row in self.rows)

    @property
    def n_branch_points(self) -> int:
        """Number of baseline rows that were not asked for; they come next."""
        return sum(row is None for row in self.rows)

    @property
    def any_ablated(self) -> bool:
        """Whether any row is ablated."""
        return any(row is not None and row.intervention is Intervention.ABLATION for row in self.rows)

    def entered(self, layer: int) -> int:
        """Number of rows under way at `layer`, including those that enter there."""
        return bisect_right(self.starts, layer)

    def units(self, rows: slice) -> Float[Tensor, "row d_model"]:
        """Each row's u; zero for rows that are not ablated."""
        return self.tables.units[self.ablated[rows]]

    def _branch_points(self, layer: int) -> Float[Tensor, "branch token d_model"]:
        """The streams that steered rows may copy at `layer`: those kept from earlier passes, and this pass's."""
        asked, own = self.n_baseline, self.n_branch_points
        if layer == 0 or not (own or self.starts[-1]):
            return self.hidden[:0]
        unasked = (self.hidden[asked : asked + own],) if own else ()
        return torch.cat([*self.kept.joined(layer, unasked), self.hidden[:asked]])

    def enter(self, layer: int, embedded: Float[Tensor, "prompt token d_model"], at_once: int) -> None:
        """Fill in the rows that enter at `layer`: from the embedding at layer 0, above it from their branch point.

        A direction that is added is added at every position; ablated rows lose the embedding's component along u.

        Args:
            layer: index of the layer.
            embedded: the embedded prompts of the prompt group.
            at_once: number of rows to copy at a time.
        """
        if layer == 0:
            self.hidden = embedded.new_empty(len(self.rows), *embedded.shape[1:])
        branch_points = self._branch_points(layer)
        for begin in range(self.entered(layer - 1), self.entered(layer), at_once):
            new = slice(begin, min(begin + at_once, self.entered(layer)))
            entering = embedded[self.places[new]] if layer == 0 else branch_points[self.parents[new]]
            entering += self.tables.added[self.added[new]].unsqueeze(1)
            self.hidden[new] = ablate(entering, self.units(new)) if self.any_ablated else entering


def lay_out(
    rows: Sequence[Row],
    placed: Mapping[int, tuple[int, int]],
    candidates: Candidates | None,
    *,
    tables: Tables,
    kept: Sequence[KeptRows[int]],
) -> Iterator[LengthGroup]:
    """Sort rows into length groups.

    Args:
        rows: rows to sort.
        placed: for each prompt, the index of its prompt group and its place there.
        candidates: the directions that rows refer to by index.
        tables: the same directions, in the stream's dtype.
        kept: for each prompt group, the branch points of earlier passes.
    """
    by_group: dict[int, list[Row]] = {}
    for row in rows:
        by_group.setdefault(placed[row.prompt][0], []).append(row)
    layers = () if candidates is None else candidates.layers
    for group, members in by_group.items():
        places = {row.prompt: placed[row.prompt][1] for row in members}
        yield _length_group(group, members, places, layers, tables=tables, kept=kept[group])


def _length_group(
    group: int,
    members: list[Row],
    places: dict[int, int],
    layers: tuple[int, ...],
    *,
    tables: Tables,
    kept: KeptRows[int],
) -> LengthGroup:
    """Order: baseline rows, baseline rows added as branch points, ablated rows, steered rows by layer."""
    baseline = [row for row in members if row.intervention is Intervention.BASELINE]
    ablated = [row for row in members if row.intervention is Intervention.ABLATION]
    steered = sorted(
        (row for row in members if row.intervention is Intervention.STEERING), key=lambda row: layers[row.candidate]
    )
    present = {row.prompt for row in baseline} | kept.places.keys()
    missing = [prompt for prompt in dict.fromkeys(row.prompt for row in steered) if prompt not in present]
    own = [*missing, *(row.prompt for row in baseline)]
    branch_points = {**{prompt: kept.count + index for index, prompt in enumerate(own)}, **kept.places}
    prompts = [*(row.prompt for row in baseline), *missing, *(row.prompt for row in (*ablated, *steered))]
    none, n_unsteered = len(tables.units) - 1, len(own) + len(ablated)
    return LengthGroup(
        group=group,
        rows=[*baseline, *(None for _ in missing), *ablated, *steered],
        places=torch.tensor([places[prompt] for prompt in prompts]),
        starts=[0] * n_unsteered + [layers[row.candidate] for row in steered],
        parents=[branch_points.get(prompt, -1) for prompt in prompts],
        added=torch.tensor([none] * n_unsteered + [row.candidate for row in steered]),
        ablated=torch.tensor([none] * len(own) + [row.candidate for row in ablated] + [none] * len(steered)),
        tables=tables,
        kept=kept,
    )
