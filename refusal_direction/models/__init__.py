"""Models: loading, chat templates, layers and residual writes, refusal tokens; independent of the engine."""
