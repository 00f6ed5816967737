"""One interface over the layer-major runner and its fallback, and the check that decides between them."""

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
from refusal_direction.engine.layer_major import LayerMajor
from refusal_direction.engine.protocol import Consume, Observe, Runner, Tick, silent
from refusal_direction.engine.residency import resident
from refusal_direction.engine.rows import Intervention, Row
from refusal_direction.engine.skeleton import shape_of
from refusal_direction.errors import UnsupportedModelError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Engine"]

log = logging.getLogger(__name__)

_NO_PROBABILITY = 1e3
"""A logit this far below the largest has probability 0 in any precision, whatever value a model masks it with."""


class Engine:
    """Runs prompts through a model, unchanged or under interventions.

    In the first pass the model's own forward runs one prompt beside the layer-major runner. If their logits differ, or if
    layers share state that cannot be followed, the engine falls back to hooked forwards and logs a warning.

    Args:
        stream: the model's residual stream.
        prompts: the model's inputs for each prompt, each a batch of one: input_ids (1, token), attention_mask, ...
        batch_size: most rows that go through a layer at once; None: as many as free memory allows.
        memory: most bytes held beside the model; None: as many as are useful.
        reserved_bytes: bytes of `memory` reserved for the caller's results.
        observed_tokens: number of last tokens that observers of the baseline read; None: all of them, and then no shared
            prefix is run separately.
        keep: whether later passes return to the same interventions and prompts (`LayerMajor`).
    """

    def __init__(
        self,
        stream: ResidualStream,
        prompts: Sequence[Mapping[str, Int[Tensor, "1 token"] | Tensor]],
        *,
        batch_size: int | None = None,
        memory: int | None = None,
        reserved_bytes: int = 0,
        observed_tokens: int | None = None,
        keep: bool = False,
    ) -> None:
        self.stream, self.prompts = stream, prompts
        self.budget = Budget(
            stream.skeleton.model,
            stream.layers,
            batch_size=batch_size,
            memory=memory,
            reserved_bytes=reserved_bytes,
        )
        self._runner: Runner
        with resident(*stream.skeleton.outer, recurse=False):
            self._batched = self._can_batch()
            try:
                self._runner = LayerMajor(
                    stream, prompts, self.budget, observed_tokens=observed_tokens, batched=self._batched, keep=keep
                )
            except UnsupportedModelError as error:
                self._fall_back(str(error))

    def _can_batch(self) -> bool:
        independent = self.stream.skeleton.embeds_independently(self.prompts)
        if not independent:
            log.warning(
                "%s mixes prompts that are run together before they reach its layers, so each is embedded by itself.",
                type(self.stream.skeleton.model).__name__,
            )
        return independent

    @property
    def name(self) -> str:
        """Name of the runner: "layer-major" or "hooked"."""
        return self._runner.name

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.stream.skeleton.model.dtype

    @property
    def leak(self) -> float:
        """Largest `residual_component` of an ablated stream at a layer's output so far."""
        return self._runner.leak

    @property
    def shared(self) -> int:
        """Number of leading tokens that are run once for each intervention, for all prompts together."""
        return self._runner.shared

    def row_bytes(self, rows: Sequence[Row]) -> list[int]:
        """Memory that each row holds while it is under way."""
        return self._runner.row_bytes(rows)

    def _fall_back(self, reason: str | None) -> None:
        if reason is not None:
            log.warning("Plain hooked forwards are used, which are slower but exact. %s", reason)
        self.stream.skeleton.held.close()
        self._runner = Hooked(self.stream, self.prompts, self.budget, batched=self._batched)

    def passes(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """The rows of each pass over the weights, in order."""
        return self._runner.passes(rows)

    def adopt(self, name: str, reason: str | None = None) -> None:
        """Continue with the runner of this name, whose first pass was checked by an earlier run or another process.

        A fallback is warned of if there is a `reason`.
        """
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
        """Run prompts without an intervention, and check the layer-major runner against the model's own forward.

        Args:
            consume: receives rows and their last-position logits (row, vocab).
            observe: receives a layer's index, rows and the stream at its input (row, token, d_model).
            tick: receives the number of (row, layer) pairs just computed.
            prompts: indices of the prompts; None: all. If empty, nothing is run and nothing is checked.
        """
        rows = [Row(prompt) for prompt in (range(len(self.prompts)) if prompts is None else prompts)]
        if not rows:
            return
        tick = _at_most(len(rows) * len(self.stream.layers), tick)
        if isinstance(self._runner, LayerMajor):
            difference = self._checked_baseline(self._runner, rows, consume, observe, tick)
            tolerance = max(1e-4, 8 * torch.finfo(self.dtype).eps)
            if difference <= tolerance:
                return
            self._fall_back(
                f"Run layer by layer, this model's logits differ from those of its own forward by {difference:.1e} "
                "of the largest."
            )
        self._runner.run(rows, consume=consume, observe=observe, tick=tick)

    def same_shape(self, count: int) -> list[int]:
        """Up to `count` prompts of the shape of the longest that share a batch, for a first pass on a few prompts."""
        shape = shape_of(self.prompts[self._reference_prompt(range(len(self.prompts)))])
        return [prompt for prompt, inputs in enumerate(self.prompts) if shape_of(inputs) == shape][:count]

    def _reference_prompt(self, prompts: Sequence[int]) -> int:
        """The longest prompt, preferably among those that share a batch with others of their shape."""
        shapes = {prompt: shape_of(self.prompts[prompt]) for prompt in prompts}
        count = Counter(shapes.values())
        length = {prompt: self.prompts[prompt]["input_ids"].shape[-1] for prompt in prompts}
        return max(prompts, key=lambda prompt: (count[shapes[prompt]] > 1, length[prompt]))

    def _checked_baseline(
        self, runner: LayerMajor, rows: list[Row], consume: Consume, observe: Observe, tick: Tick
    ) -> float:
        """Run the first pass; return its distance from the model's own forward on the reference prompt (`_distance`).

        The reference prompt is also run as a row that branches off half-way with nothing added: both rows are compared.
        """
        reference_prompt = self._reference_prompt([row.prompt for row in rows])
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
        assert reference_logits is not None, "the first pass ran without its reference prompt"
        theirs = reference_logits.cpu().float()
        return max(_distance(logits.to(theirs), theirs) for logits in seen)

    def intervene(self, rows: Sequence[Row], candidates: Candidates, consume: Consume, *, tick: Tick = silent) -> None:
        """Run rows under interventions by the candidates.

        Args:
            rows: rows to run.
            candidates: the directions that rows refer to by index.
            consume: receives rows and their last-position logits (row, vocab).
            tick: receives the number of (row, layer) pairs just computed.

        Raises UnsupportedModelError if an ablated stream still has a component along its direction.
        """
        self._runner.run(rows, consume=consume, candidates=candidates, tick=tick)
        tolerance = max(1e-4, torch.finfo(self.dtype).eps)
        if self.leak > tolerance:
            raise UnsupportedModelError(
                f"After ablation {self.leak:.1%} of the residual stream still lay along the direction: a write was missed, "
                "so the scores would be wrong. Please report this model."
            )

    def depth(self, row: Row, candidates: Candidates | None) -> int:
        """Number of layers that a row goes through: steered rows start at their own layer if the runner branches."""
        n_layers = len(self.stream.layers)
        if candidates is None or row.intervention is not Intervention.STEERING or not self._runner.branches:
            return n_layers
        return n_layers - candidates.layers[row.candidate]

    def costs(self, rows: Sequence[Row], candidates: Candidates | None) -> list[int]:
        """Cost of each row: its tokens beyond the shared prefix, times its layers."""
        lengths = [inputs["input_ids"].shape[-1] - self.shared for inputs in self.prompts]
        return [lengths[row.prompt] * self.depth(row, candidates) for row in rows]

    def work(self, rows: Sequence[Row], candidates: Candidates) -> int:
        """Number of (row, layer) pairs that `intervene` will report."""
        return sum(self.depth(row, candidates) for row in rows)


def _distance(ours: Float[Tensor, "vocab"], theirs: Float[Tensor, "vocab"]) -> float:
    """Largest difference of logits, relative to the largest logit; infinite if one is NaN.

    Logits of tokens without probability (`_NO_PROBABILITY`) are not compared.
    """
    floor = theirs.max() - _NO_PROBABILITY
    kept = theirs[theirs > floor]
    if not kept.numel():
        return inf
    off = float((ours.clamp_min(floor) - theirs.clamp_min(floor)).abs().max() / kept.abs().max())
    return inf if isnan(off) else off


def _at_most(total: int, tick: Tick) -> Tick:
    """A `Tick` that reports at most `total`: the branch that is checked, and second attempts, are not progress."""
    left = total

    def capped(done: int) -> None:
        nonlocal left
        counted = min(done, left)
        left -= counted
        if counted:
            tick(counted)

    return capped
