"""The conditions that a candidate must meet, and the reasons for which candidates are rejected: defined once, here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from math import inf, isnan

from refusal_direction.config import Config, Thresholds
from refusal_direction.errors import ConfigurationError
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.scores import CandidateScore

__all__ = ["Conditions", "Rejection", "check_layers", "layer_limit"]


class Rejection(Enum):
    """Why a candidate is not selected. If several reasons apply, the first in the order of `Conditions.violations` counts."""

    ZERO_LENGTH = "zero_length"
    NAN = "nan"
    """A score is NaN."""
    LAYER = "layer"
    KL = "kl"
    RANK = "rank"
    """Not among the candidates of lowest KL that are considered."""
    STEERING = "steering"
    NOT_BEST = "not_best"
    """Meets every condition, but another has a lower ablation score, or an equal one and comes first."""


def layer_limit(n_layers: int, thresholds: Thresholds) -> int:
    """The first layer from which candidates are discarded."""
    return int(round(n_layers * (1.0 - thresholds.prune_layers), 9))  # 10 * (1.0 - 0.9) is a little less than 1


def check_layers(config: Config, n_layers: int) -> None:
    """Raise ConfigurationError if --prune_layers leaves no layer, unless the condition can be dropped."""
    if layer_limit(n_layers, config.thresholds) < 1 and not config.rules.relaxing:
        raise ConfigurationError(
            f"--prune_layers {config.thresholds.prune_layers:g} leaves none of {n_layers} layers to select from. Lower it."
        )


@dataclass(frozen=True)
class Conditions:
    """The conditions of the selection for one model and its baseline (paper, appendix C)."""

    layer_limit: float
    """Candidates from this layer on are rejected."""
    kl_threshold: float
    """Candidates with a larger mean KL divergence are rejected."""
    induce_threshold: float
    """Candidates with a smaller mean steering score are rejected; as an absolute score (the setting may count from the
    baseline)."""
    top_k_candidates: int | None
    """Only this many of lowest KL are considered, of those that meet the conditions on layer and KL; None for all."""
    asked: Thresholds
    """The thresholds as configured, for messages."""
    relaxing: bool
    """Whether conditions that no candidate meets are dropped (images with text)."""

    @classmethod
    def of(cls, config: Config, n_layers: int, harmless_baseline: float) -> Conditions:
        """The conditions that a configuration asks for.

        Args:
            config: the configuration.
            n_layers: of the model.
            harmless_baseline: mean baseline refusal score of the harmless validation prompts.
        """
        thresholds, relative = config.thresholds, config.rules.relaxing
        return cls(
            layer_limit=float(layer_limit(n_layers, thresholds)),
            kl_threshold=thresholds.kl_threshold,
            induce_threshold=thresholds.induce_threshold + (harmless_baseline if relative else 0.0),
            top_k_candidates=thresholds.top_k_candidates,
            asked=thresholds,
            relaxing=relative,
        )

    def violations(self, score: CandidateScore, *, zero: bool = False, ahead: int = 0) -> Iterator[Rejection]:
        """Every condition that a candidate violates.

        Args:
            score: its mean scores, or the best that they may be. NaN is a violation; where only the candidates of lowest KL
                are considered, ablation and steering scores matter for those alone.
            zero: whether its length is zero.
            ahead: the number of candidates that come before it by KL.
        """
        ranked = self.relaxing
        if zero:
            yield Rejection.ZERO_LENGTH
        broken = isnan(score.ablation_refusal) or isnan(score.steering_refusal)
        if isnan(score.kl_div) or (broken and not ranked):
            yield Rejection.NAN
        if score.layer >= self.layer_limit:
            yield Rejection.LAYER
        if score.kl_div > self.kl_threshold:
            yield Rejection.KL
        if self.top_k_candidates is not None and ahead >= self.top_k_candidates:
            yield Rejection.RANK
        if broken and ranked:
            yield Rejection.NAN
        if score.steering_refusal < self.induce_threshold:
            yield Rejection.STEERING

    def rejection(self, score: CandidateScore, *, zero: bool = False, ahead: int = 0) -> Rejection | None:
        """The first violation; None if the candidate meets every condition."""
        return next(self.violations(score, zero=zero, ahead=ahead), None)

    def fits(self, score: CandidateScore, *, zero: bool = False) -> bool:
        """Whether a candidate meets the conditions on length, layer and KL."""
        early = (Rejection.ZERO_LENGTH, Rejection.LAYER, Rejection.KL)
        return not isnan(score.kl_div) and not any(found in early for found in self.violations(score, zero=zero))

    def widened(self, noise: Mapping[Measure, float], by: float) -> Conditions:
        """The conditions relaxed by `by` times the noise of each measure; tightened, if that is negative."""
        return replace(
            self,
            kl_threshold=self.kl_threshold + by * noise[Measure.KL],
            induce_threshold=self.induce_threshold - by * noise[Measure.STEERING],
        )

    def without_layer_and_kl(self) -> Conditions:
        """The conditions on layer and KL dropped."""
        return replace(self, layer_limit=inf, kl_threshold=inf)

    def without_steering(self) -> Conditions:
        """The condition on the steering score dropped."""
        return replace(self, induce_threshold=-inf)

    def reason(self, rejection: Rejection, n_layers: int) -> str:
        """A rejection in words."""
        asked = self.asked
        induce = asked.induce_threshold
        relative = (
            f"steering score < baseline + {induce:g} (--induce_threshold)"
            if induce
            else "steering score below the baseline"
        )
        return {
            Rejection.ZERO_LENGTH: "length zero",
            Rejection.NAN: "a score is NaN",
            Rejection.LAYER: f"layer >= {layer_limit(n_layers, asked)} (--prune_layers {asked.prune_layers:g})",
            Rejection.KL: f"KL > {asked.kl_threshold:g} (--kl_threshold)",
            Rejection.RANK: "not among those of lowest KL",
            Rejection.STEERING: relative if self.relaxing else f"steering score < {induce:g} (--induce_threshold)",
            Rejection.NOT_BEST: "another's ablation score is lower",
        }[rejection]
