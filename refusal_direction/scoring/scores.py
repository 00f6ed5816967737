"""Scores of candidate directions: per prompt, and their means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from refusal_direction.candidates import CandidateLabel
from refusal_direction.scoring.metrics import Measure

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

__all__ = ["CandidateScore", "ScoreRequest", "Scores"]


class ScoreRequest(NamedTuple):
    """One score: of a candidate, by a measure, on one of the validation prompts of the measure's kind."""

    candidate: int
    measure: Measure
    prompt: int
    """The index among those prompts."""


@dataclass(frozen=True)
class CandidateScore:
    """Mean scores of a candidate over the validation prompts; NaN where not measured on all of them."""

    label: CandidateLabel
    ablation_refusal: float
    steering_refusal: float
    kl_div: float

    @property
    def position(self) -> int | None:
        """The candidate's position."""
        return self.label.position

    @property
    def layer(self) -> int:
        """The candidate's layer."""
        return self.label.layer

    def of(self, measure: Measure) -> float:
        """The mean score by one measure."""
        return float(getattr(self, measure.value))


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of every candidate, prompt by prompt, in float64; NaN where not measured."""

    ablation: Float[Tensor, "candidate harmful"]
    """Refusal scores of the harmful validation prompts under directional ablation."""
    steering: Float[Tensor, "candidate harmless"]
    """Refusal scores of the harmless validation prompts under activation addition."""
    kl: Float[Tensor, "candidate harmless"]
    """KL divergence of the harmless validation prompts under directional ablation, in nats."""

    def of(self, measure: Measure) -> Float[Tensor, "candidate prompt"]:
        """The scores by one measure."""
        return {Measure.ABLATION: self.ablation, Measure.KL: self.kl, Measure.STEERING: self.steering}[measure]

    def with_values(self, requests: Sequence[ScoreRequest], values: Iterable[float]) -> Scores:
        """These scores with the values of the requests filled in."""
        filled = {measure: self.of(measure).clone() for measure in Measure}
        for (candidate, measure, prompt), value in zip(requests, values, strict=True):
            filled[measure][candidate, prompt] = value
        return Scores(filled[Measure.ABLATION], filled[Measure.STEERING], filled[Measure.KL])

    def means(self, labels: Sequence[CandidateLabel]) -> tuple[CandidateScore, ...]:
        """Mean scores of each candidate."""
        columns = {measure.value: self.of(measure).mean(dim=1).tolist() for measure in Measure}
        return tuple(
            CandidateScore(label, **{name: column[index] for name, column in columns.items()})
            for index, label in enumerate(labels)
        )

    @classmethod
    def unmeasured(
        cls,
        zero: Bool[Tensor, "candidate"],
        harmful: Float[Tensor, "harmful"],
        harmless: Float[Tensor, "harmless"],
    ) -> Scores:
        """NaN for every candidate but those of length zero, which change nothing: theirs are the baseline's.

        Args:
            zero: which candidates are zero.
            harmful: baseline refusal scores of the harmful validation prompts.
            harmless: baseline refusal scores of the harmless ones.
        """
        start = torch.where(zero, 0.0, torch.nan).double().unsqueeze(1)
        return cls(start + harmful, start + harmless, start + torch.zeros_like(harmless))
