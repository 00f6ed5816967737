"""What is notable about families, and why some are refused: words that several rows of the tables share."""

from __future__ import annotations

SLIDING = "sliding and full attention"
LATENT = "latent attention"
EXPERTS = "mixture of experts"
LINEAR = "linear and full attention"
NORMS_AFTER = "norms after both blocks"
PARALLEL = "attention and MLP in parallel"
STATE_SPACE = "state-space layers"
HYBRID = "state-space and attention layers"
CONVOLUTIONS = "convolutions and full attention"
MULTIPLIER = "residual multiplier"
SHARING = "shared keys and values; inputs for each layer"
NORMED_STREAM = "norms on the stream itself"

# why no direction is computed: words of the error
SEVERAL_STREAMS = "several residual streams side by side"
NOT_FOUND = "residual writes of .* were not found"
NO_STACK = "No stack of decoder layers"
LOOPED = "runs layer 0 again"
