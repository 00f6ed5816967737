"""How many rows go through a layer at once, and how many may be under way together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import PreTrainedModel

from refusal_direction.errors import ConfigurationError, OutOfMemoryError
from refusal_direction.models.placement import execution_device, is_offloaded
from refusal_direction.runtime.memory import free_bytes, keep_freed

__all__ = ["Budget", "halving", "must_fit"]

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_CPU_TOKENS = 3072  # a few per cent quicker than half as many
_DEVICE_TOKENS = 16384  # enough to fill a large GPU; more only costs memory
_HIDDEN_BYTES = 512 << 20  # where weights stay in memory, more rows under way save nothing
_LOGIT_BYTES = 256 << 20
_OPERATIONS = {"cpu": 3e14, "mps": 3e15}
"""That a pass may take, by the kind of device: an interruption costs half an hour of two cores, two minutes of a large GPU.
Shorter passes have too few rows of a length to fill microbatches, and run baseline rows anew, for steered ones to branch off."""
_DEVICE_OPERATIONS = 5e16
_TIMES_OFFLOADED = 2  # each pass reads the weights


class Budget:
    """Row and memory limits of one run, derived from the model and from free memory.

    Args:
        model: whose layers and vocabulary decide what a token costs.
        layers: its decoder layers.
        batch_size: at most so many rows go through a layer at once; None leaves it to free memory.
        memory: at most so many bytes may be held beside the model; None: as much as pays.
        reserved_bytes: of these, what the caller keeps of the results.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        *,
        batch_size: int | None = None,
        memory: int | None = None,
        reserved_bytes: int = 0,
    ) -> None:
        self._model, self._layers, self._memory, self._batch_size = model, layers, memory, batch_size
        self.reserved_bytes = reserved_bytes
        self._widest = max(_width(module) for layer in layers for module in layer.modules())
        self._vocab = model.config.get_text_config().vocab_size
        self._shrunk = 1.0
        self.hidden_bytes = 0
        """What the hidden states of all rows under way may take."""
        self.reserve(0)

    def reserve(self, held: int) -> None:
        """Set the limits, when `held` bytes of the memory that may be used are taken besides what the caller keeps.

        Raises ConfigurationError where the rest of a memory that was asked for is not enough for one row.
        """
        device, itemsize = execution_device(self._model), self._model.dtype.itemsize
        free = free_bytes(device)
        held += self.reserved_bytes
        memory = free if self._memory is None else min(free, self._memory - held)
        a_token, a_row_of_logits = 8 * self._widest * itemsize, 40 * self._vocab  # with their softmax in float64
        if self._memory is not None and memory < (least := 8 * max(64 * a_token, a_row_of_logits)):
            raise ConfigurationError(
                f"--memory_budget {self._memory / 2**20:g}MiB is too little for this model and these prompts: they need at least "
                f"{ceil((held + least) / 2**20)}MiB. Raise it, or take fewer prompts (--n_train, --n_val)."
            )
        most = _CPU_TOKENS if device.type == "cpu" else _DEVICE_TOKENS
        self._tokens = min(most, max(1, int(0.2 * memory) // a_token))
        self._logit_rows = max(1, min(1024, min(_LOGIT_BYTES, int(0.2 * memory)) // a_row_of_logits))
        most_hidden = memory // 3 if is_offloaded(self._model) else min(memory // 4, _HIDDEN_BYTES)
        most_hidden = most_hidden if self._memory is None else memory // 2
        self.hidden_bytes = min(most_hidden, self._bytes_of_a_pass(device))
        if device.type == "cpu":
            keep_freed(self._tokens * a_token)

    def _bytes_of_a_pass(self, device: torch.device) -> int:
        """The hidden states of as many rows as are worth keeping when they are through (`--resume`)."""
        operations = _OPERATIONS.get(device.type, _DEVICE_OPERATIONS)
        operations *= _TIMES_OFFLOADED if is_offloaded(self._model) else 1
        tokens = operations / (2 * sum(weight.numel() for weight in self._layers.parameters()))
        return int(tokens * self._model.get_input_embeddings().weight.shape[-1] * self._model.dtype.itemsize)

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens go through a layer at once."""
        rows = max(1, self._tokens // length)
        return max(1, int(min(rows, self._batch_size or rows) / self._shrunk))

    def logit_rows(self) -> int:
        """How many rows of logits, with their float64 softmax, are made at once."""
        return max(1, int(self._logit_rows / self._shrunk))

    def chunks(self, rows: Sequence[_T], sizes: Sequence[int]) -> Iterator[Sequence[_T]]:
        """Consecutive rows whose hidden states fit into memory together; each chunk is a pass over the weights."""
        begin, held = 0, 0
        for end, size in enumerate(sizes):
            held += size
            if held > self.hidden_bytes and end > begin:
                yield rows[begin:end]
                begin, held = end, size
        if begin < len(rows):
            yield rows[begin:]

    def shrink(self, limit: Callable[[], int], tried: int) -> None:
        """Lower all limits in the proportion that brings `limit` to half of what was tried."""
        wanted = max(1, tried // 2)
        while limit() > wanted:
            self._shrunk *= max(1.01, limit() / (wanted + 0.5))


def _width(module: nn.Module) -> int:
    """The widest that its input or output is; quantised weights are packed, so their shapes do not tell."""
    if isinstance(module, nn.Linear):
        return max(module.in_features, module.out_features)
    return max((max(weight.shape[-2:]) for weight in module.parameters(recurse=False) if weight.ndim), default=1)


def halving(through: Callable[[slice], None], total: int, budget: Budget, *, limit: Callable[[], int]) -> None:
    """Call `through` on consecutive slices of `total` rows; out of memory, go on from there with half the rows.

    Raises OutOfMemoryError where a single row does not fit.
    """
    begin = 0
    while begin < total:
        left = total - begin
        tried = ceil(left / ceil(left / limit()))  # slices of even size: a last one of a few rows would be slow
        try:
            with must_fit(halvable=tried > 1):
                through(slice(begin, begin + tried))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            budget.shrink(limit, tried)
            _release()
            log.warning("Out of memory with %d rows at once; going on with half of them.", tried)
            continue
        begin += tried


@contextmanager
def must_fit(halvable: bool = False) -> Iterator[None]:
    """Explain running out of memory, unless fewer rows at once may still help."""
    try:
        yield
    except RuntimeError as error:
        if halvable or not should_reduce_batch_size(error):
            raise
        raise OutOfMemoryError(
            "Out of memory, with a single row at once or with what all rows hold together. Use a smaller model, --dtype "
            "bfloat16, fewer prompts (--n_val), a machine with more memory, or close what else uses it."
        ) from error


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
