"""Models: loading, chat templates, layers and residual writes, refusal tokens. Nothing here knows the engine."""
