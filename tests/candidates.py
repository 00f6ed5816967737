"""Candidates for tests that care for vectors and layers alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from refusal_direction.candidates import CandidateLabel, Candidates


def at_layers(vectors: Tensor, layers: Iterable[int]) -> Candidates:
    """Candidates [candidate, d_model] of these layers."""
    return Candidates(vectors, tuple(CandidateLabel("test", layer) for layer in layers))
