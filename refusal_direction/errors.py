"""Every error that the command line explains. Each message says what happened and what to do.

    RefusalDirectionError
    ├── ConfigurationError         a flag or argument that cannot be used
    ├── OutputError                the output folder cannot be written, or holds no readable result
    ├── PromptError
    │   ├── PromptFileError        a prompt file is missing, empty or malformed
    │   ├── DownloadError          the published splits could not be fetched or verified
    │   └── TooFewPromptsError     fewer prompts than asked for, or too few left by the filter
    ├── ModelError
    │   ├── ModelAccessError       gated, unknown, or unreachable
    │   ├── TokenizerError         the tokenizer does not fit the model, or maps text to no usable tokens
    │   ├── ChatTemplateError      no chat template, or one that cannot be used
    │   ├── RefusalTokenError      refusal tokens that are not in the vocabulary, or that calibration does not find
    │   └── UnsupportedModelError  a model on which the method would give wrong results
    ├── NoCandidateError           no candidate direction passes every condition; results are written all the same
    └── OutOfMemoryError           the weights, or not even one row beside them, do not fit

The command line prints these and exits with 2, or 3 for NoCandidateError; any other exception is a bug and keeps its traceback.
From Python `ablated` and `steered` also raise ValueError, TypeError or IndexError for arguments that cannot be used.
"""

from __future__ import annotations

__all__ = [
    "ChatTemplateError",
    "ConfigurationError",
    "DownloadError",
    "ModelAccessError",
    "ModelError",
    "NoCandidateError",
    "OutOfMemoryError",
    "OutputError",
    "PromptError",
    "PromptFileError",
    "RefusalDirectionError",
    "RefusalTokenError",
    "TokenizerError",
    "TooFewPromptsError",
    "UnsupportedModelError",
]


class RefusalDirectionError(Exception):
    """Base class: a problem that the user can fix."""


class ConfigurationError(RefusalDirectionError):
    """A flag or argument that cannot be used."""


class OutputError(RefusalDirectionError):
    """The output folder cannot be written, or holds no readable result."""


class PromptError(RefusalDirectionError):
    """Something is wrong with the prompts."""


class PromptFileError(PromptError):
    """A prompt file is missing, empty or malformed."""


class DownloadError(PromptError):
    """The published splits could not be fetched or verified."""


class TooFewPromptsError(PromptError):
    """Fewer prompts than the computation needs."""


class ModelError(RefusalDirectionError):
    """Something is wrong with the model or its tokenizer."""


class ModelAccessError(ModelError):
    """The model is gated, unknown, or unreachable."""


class TokenizerError(ModelError):
    """The tokenizer does not fit the model, or maps text to no usable tokens."""


class ChatTemplateError(ModelError):
    """The chat template is missing or cannot be used."""


class RefusalTokenError(ModelError):
    """Refusal tokens that are not in the vocabulary, or that calibration does not find."""


class UnsupportedModelError(ModelError):
    """A model on which the method would give wrong results."""


class NoCandidateError(RefusalDirectionError):
    """No candidate direction passes every condition of the selection.

    Raised where the direction of such a run is asked for; its scores are in the result and in its files.
    """


class OutOfMemoryError(RefusalDirectionError):
    """The weights, or not even one row beside them, do not fit into memory."""
