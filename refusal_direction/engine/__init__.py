"""Running rows of prompts under interventions: one interface over the layer-major engine and its fallback."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import inf, isnan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refusal_direction.candidates import CandidateLabel, Candidates
from refusal_direction.engine.budget import Budget
from refusal_direction.engine.hooked import Hooked
from refusal_direction.engine.interventions import ResidualStream
from refusal_direction.engine.layer_major import Consume, LayerMajor, Observe, Tick, silent
from refusal_direction.engine.residency import resident
from refusal_direction.engine.rows import Intervention, Row
from refusal_direction.engine.skeleton import shape_of
from refusal_direction.errors import UnsupportedModelError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Engine", "Intervention", "Row", "Tick", "silent"]

log = logging.getLogger(__name__)

_NEVER = 1e3


class Engine:
    """Runs prompts through a model, as they are and under interventions.

    The first pass is watched by the model's own forward. Where that disagrees with the layer-major result, or layers do
    something that cannot be followed, the engine falls back to plain hooked forwards and says so.

    Args:
        stream: the model's residual stream.
        prompts: the model's inputs for each prompt, a batch of one each.
        batch_size: at most so many rows go through a layer at once; None leaves it to free memory.
        memory: at most so many bytes may be held beside the model; None: as much as pays.
        reserved_bytes: of these, what the caller keeps of the results.
        observed_tokens: how many of a prompt's last tokens observers of the baseline look at; None: all, so that nothing
            that prompts have in common can be run apart.
    """

    def __init__(
        self,
        stream: ResidualStream,
        prompts: Sequence[Mapping[str, Tensor]],
        *,
        batch_size: int | None = None,
        memory: int | None = None,
        reserved_bytes: int = 0,
        observed_tokens: int | None = None,
    ) -> None:
        self.stream, self.prompts = stream, prompts
        self.budget = Budget(
            stream.skeleton.model,
            stream.layers,
            batch_size=batch_size,
            memory=memory,
            reserved_bytes=reserved_bytes,
        )
        self._runner: LayerMajor | Hooked
        with resident(*stream.skeleton.outer, recurse=False):
            self._apart = self._keeps_apart()
            try:
                self._runner = LayerMajor(
                    stream, prompts, self.budget, observed_tokens=observed_tokens, together=self._apart
                )
            except UnsupportedModelError as error:
                self._fall_back(str(error))

    def _keeps_apart(self) -> bool:
        apart = self.stream.skeleton.keeps_apart(self.prompts)
        if not apart:
            log.warning(
                "%s mixes prompts that are run together before they reach its layers, so each is embedded by itself.",
                type(self.stream.skeleton.model).__name__,
            )
        return apart

    @property
    def name(self) -> str:
        """Which engine runs: "layer-major" or "hooked"."""
        return self._runner.name

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return self.stream.skeleton.model.dtype

    @property
    def leak(self) -> float:
        """Largest `share_along` of an ablated stream at a layer's output."""
        return self._runner.leak

    @property
    def shared(self) -> int:
        """How many tokens all prompts begin with that are run once for each intervention."""
        return self._runner.shared

    def row_bytes(self, rows: Sequence[Row]) -> list[int]:
        """What each row holds in memory while it is under way."""
        return self._runner.row_bytes(rows)

    def _fall_back(self, reason: str | None) -> None:
        if reason is not None:
            log.warning("Plain hooked forwards are used, which is slower but exact. %s", reason)
        self.stream.skeleton.held.close()
        self._runner = Hooked(self.stream, self.prompts, self.budget, together=self._apart)

    def passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows as they go through together: each part is a pass over the weights of its own."""
        return self._runner.passes(rows)

    def adopt(self, name: str, reason: str | None = None) -> None:
        """Go on as an engine of this name, whose first pass was verified elsewhere; warn of a fallback if there is a reason."""
        if name == "hooked" and self.name != name:
            self._fall_back(reason)
        self.stream.skeleton.held.close()

    def baseline(
        self,
        consume: Consume,
        observe: Observe,
        tick: Tick = silent,
        *,
        prompts: Sequence[int] | None = None,
    ) -> None:
        """Run every prompt, or those of `prompts`, as it is.

        Args:
            consume: receives rows and their last-position logits (row, vocab).
            observe: receives a layer's index, rows and the stream at its input (row, token, d_model).
            tick: receives the number of (row, layer) pairs just done.
        """
        rows = [Row(prompt) for prompt in (range(len(self.prompts)) if prompts is None else prompts)]
        tick = _at_most(len(rows) * len(self.stream.layers), tick)
        if isinstance(self._runner, LayerMajor):
            difference = self._watched_baseline(self._runner, rows, consume, observe, tick)
            tolerance = max(1e-4, 8 * torch.finfo(self.dtype).eps)
            if difference <= tolerance:
                return
            self._fall_back(
                f"Run layer by layer, this model's logits differ from its own forward's by {difference:.1e} of the largest."
            )
        self._runner.run(rows, consume=consume, observe=observe, tick=tick)

    def rehearse(self) -> None:
        """Run a few prompts as the first pass would, so that the engine is the one that a run ends up with."""
        reference_prompt = self._witness(range(len(self.prompts)))
        shape = shape_of(self.prompts[reference_prompt])
        alike = [prompt for prompt, inputs in enumerate(self.prompts) if shape_of(inputs) == shape]
        self.baseline(lambda rows, logits: None, lambda layer, rows, hidden: None, prompts=alike[:4])

    def _witness(self, prompts: Sequence[int]) -> int:
        """The longest of the prompts that run together with others of their shape, if there are any."""
        shapes = {prompt: shape_of(self.prompts[prompt]) for prompt in prompts}
        alike = Counter(shapes.values())
        length = {prompt: self.prompts[prompt]["input_ids"].shape[-1] for prompt in prompts}
        return max(prompts, key=lambda prompt: (alike[shapes[prompt]] > 1, length[prompt]))

    def _watched_baseline(
        self, runner: LayerMajor, rows: list[Row], consume: Consume, observe: Observe, tick: Tick
    ) -> float:
        """The first pass; returns how far it is from the model's own forward on one prompt, relative to the logits.

        The prompt also goes through as a row that branches off half-way with nothing added: it must come out alike.
        """
        reference_prompt = self._witness([row.prompt for row in rows])
        d_model = self.stream.skeleton.d_model
        nothing = Candidates(torch.zeros(1, d_model), (CandidateLabel("none", len(self.stream.layers) // 2),))
        branch = Row(reference_prompt, Intervention.STEERING, 0)
        seen: list[Tensor] = []

        def watch(some: list[Row], logits: Tensor) -> None:
            seen.extend(logits[i] for i, row in enumerate(some) if row.prompt == reference_prompt)
            ours = [i for i, row in enumerate(some) if row is not branch]
            if ours:
                consume([some[i] for i in ours], logits[ours])

        reference_logits = runner.run(
            [*rows, branch],
            consume=watch,
            candidates=nothing,
            observe=observe,
            tick=tick,
            reference_prompt=reference_prompt,
        )
        assert reference_logits is not None, "the first pass ran without its witness"
        theirs = reference_logits.cpu().float()
        return max(_distance(logits.to(theirs), theirs) for logits in seen)

    def intervene(self, rows: Sequence[Row], candidates: Candidates, consume: Consume, *, tick: Tick = silent) -> None:
        """Run rows under the interventions of the candidates.

        Raises UnsupportedModelError where an ablated stream still holds some of its direction.
        """
        self._runner.run(rows, consume=consume, candidates=candidates, tick=tick)
        tolerance = max(1e-4, torch.finfo(self.dtype).eps)
        if self.leak > tolerance:
            raise UnsupportedModelError(
                f"After ablation {self.leak:.1%} of the residual stream still lay along the direction: a write was missed, "
                "so the scores would be wrong. Please report this model."
            )

    def depth(self, row: Row, candidates: Candidates | None) -> int:
        """How many layers a row goes through: steered rows branch off at their own, unless forwards are hooked."""
        n_layers = len(self.stream.layers)
        if candidates is None or row.intervention is not Intervention.STEERING or not self._runner.branches:
            return n_layers
        return n_layers - candidates.layers[row.candidate]

    def costs(self, rows: Sequence[Row], candidates: Candidates | None) -> list[int]:
        """What each row costs, in tokens (those that are not shared) times layers."""
        lengths = [inputs["input_ids"].shape[-1] - self.shared for inputs in self.prompts]
        return [lengths[row.prompt] * self.depth(row, candidates) for row in rows]

    def work(self, rows: Sequence[Row], candidates: Candidates) -> int:
        """The number of (row, layer) pairs that `intervene` will report."""
        return sum(self.depth(row, candidates) for row in rows)


def _distance(ours: Float[Tensor, "vocab"], theirs: Float[Tensor, "vocab"]) -> float:
    """The largest difference of logits, relative to the largest; infinite where one is not a number.

    What is `_NEVER` below the likeliest has no probability in any precision, by whatever number a model masks it.
    """
    floor = theirs.max() - _NEVER
    kept = theirs[theirs > floor]
    if not kept.numel():
        return inf
    off = float((ours.clamp_min(floor) - theirs.clamp_min(floor)).abs().max() / kept.abs().max())
    return inf if isnan(off) else off


def _at_most(total: int, tick: Tick) -> Tick:
    """Checks and second tries are not progress: report no more than was announced."""
    left = total

    def capped(done: int) -> None:
        nonlocal left
        counted = min(done, left)
        left -= counted
        if counted:
            tick(counted)

    return capped
