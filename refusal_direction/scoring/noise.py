"""The effect of rounding on scores, measured.

A few rows run twice in one pass, the second time with a perturbed direction: its elements are off by at most one rounding of
the model's dtype. No arithmetic could tell the two apart, so any difference between their scores is noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from refusal_direction.candidates import Candidates
from refusal_direction.scoring.metrics import Measure
from refusal_direction.scoring.scores import ScoreRequest

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Noise", "Repeats", "perturbed"]

_CANDIDATES = 8  # the most promising ones, which are compared with each other
_ROWS = 16  # for each measure


@dataclass(frozen=True)
class Noise:
    """Twice the root mean square difference between repeated measurements of a score: 95% of differences are smaller.

    Errors of one candidate on several prompts may agree, since they share its direction; so the noise of a mean is taken
    to be that of one score, and not less. NaN where nothing was repeated.
    """

    ablation_refusal: float
    steering_refusal: float
    kl_div: float

    def of(self, measure: Measure) -> float:
        """The noise of one measure."""
        return float(getattr(self, measure.value))


def perturbed(vectors: Float[Tensor, "candidate d_model"], dtype: torch.dtype) -> Float[Tensor, "candidate d_model"]:
    """The vectors with each element off by at most one rounding of `dtype`; deterministic."""
    generator = torch.Generator().manual_seed(0)
    shift = 2 * torch.rand(vectors.shape, generator=generator, dtype=torch.float64) - 1
    return (vectors.double().cpu() * (1 + torch.finfo(dtype).eps * shift)).to(vectors)


class Repeats:
    """Repeated measurements, and the differences between them.

    Args:
        originals: the candidates.
        dtype: the dtype in which the model computes.
        order: candidates worth repeating, the most promising first.
    """

    def __init__(self, originals: Candidates, dtype: torch.dtype, order: Sequence[int]) -> None:
        copies = Candidates(perturbed(originals.vectors, dtype), originals.labels)
        self.candidates = Candidates.concatenate([originals, copies])
        """The candidates, followed by their perturbed copies."""
        self._order = order
        self._original = dict(enumerate(range(len(originals)), start=len(originals)))  # by the copy's index
        self._copy = {original: copy for copy, original in self._original.items()}
        self._differences: dict[Measure, list[float]] = {measure: [] for measure in Measure}

    @property
    def count(self) -> int:
        """Number of repeated measurements so far."""
        return sum(map(len, self._differences.values()))

    def plan(self, requests: Sequence[ScoreRequest]) -> list[ScoreRequest]:
        """Perturbed repeats to add to these requests, up to `_ROWS` per measure over all passes."""
        repeats: list[ScoreRequest] = []
        for measure, seen in self._differences.items():
            of_measure = [request for request in requests if request.measure is measure]
            present = {request.candidate for request in of_measure}
            promising = set([candidate for candidate in self._order if candidate in present][:_CANDIDATES])
            eligible = [request for request in of_measure if request.candidate in promising]
            repeats += random.Random(0).sample(eligible, min(_ROWS - len(seen), len(eligible)))
        return [repeat._replace(candidate=self._copy[repeat.candidate]) for repeat in repeats]

    def record(self, repeats: Sequence[ScoreRequest], values: Sequence[float], originals: Sequence[float]) -> None:
        """Record the values of repeated requests beside those of the originals."""
        for repeat, value, original in zip(repeats, values, originals, strict=True):
            self._differences[repeat.measure].append(value - original)

    def original(self, repeat: ScoreRequest) -> ScoreRequest:
        """The request that this one repeats."""
        return repeat._replace(candidate=self._original[repeat.candidate])

    @property
    def noise(self) -> Noise:
        """The noise as known so far."""
        return Noise(**{measure.value: _spread(seen) for measure, seen in self._differences.items()})


def _spread(differences: Sequence[float]) -> float:
    finite = [value for value in differences if math.isfinite(value)]
    return 2 * math.sqrt(sum(value**2 for value in finite) / len(finite)) if finite else math.nan
