"""Limits on the rows that go through a layer at once, and on the rows under way in one pass."""

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

_CPU_TOKENS = 3072  # a few per cent faster than half as many
_DEVICE_TOKENS = 16384  # fills a large GPU; more tokens only take memory
_HIDDEN_BYTES = 512 << 20  # if weights stay in memory, more rows under way save no time
_LOGIT_BYTES = 256 << 20
_OPERATIONS = {"cpu": 3e14, "mps": 3e15}
"""Maximum FLOPs per pass, by device: an interruption loses half an hour on two cores, or two minutes on a large GPU.
Shorter passes have too few rows of one length to fill microbatches, and rerun baseline rows as branch points."""
_DEVICE_OPERATIONS = 5e16
_OFFLOADED_FACTOR = 2  # since each pass reads the weights again


class Budget:
    """Row and memory limits of one run, derived from the model and from free memory.

    Args:
        model: the model, from which the memory of a token follows.
        layers: its decoder layers.
        batch_size: most rows that go through a layer at once; None: as many as free memory allows.
        memory: most bytes held beside the model; None: as many as are useful.
        reserved_bytes: bytes of `memory` reserved for the caller's results.
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
        self.kept_bytes = 0
        """Most bytes for rows kept from one pass for the next (`engine.kept`)."""
        self.hidden_bytes = 0
        """Most bytes for the hidden states of all rows under way."""
        self.reserve(0)

    def reserve(self, held: int) -> None:
        """Set the limits, given that `held` bytes of the memory are in use besides those reserved for the caller.

        Raises ConfigurationError if the rest of an explicit memory budget is too small for one row.
        """
        device, itemsize = execution_device(self._model), self._model.dtype.itemsize
        free = free_bytes(device)
        held += self.reserved_bytes
        memory = free if self._memory is None else min(free, self._memory - held)
        a_token, a_row_of_logits = 8 * self._widest * itemsize, 40 * self._vocab  # with their softmax in float64
        if self._memory is not None and memory < (least := 8 * max(64 * a_token, a_row_of_logits)):
            raise ConfigurationError(
                f"--memory_budget {self._memory / 2**20:g}MiB is too little for this model and these prompts, which need at least "
                f"{ceil((held + least) / 2**20)}MiB. Raise it, or use fewer prompts (--n_train, --n_val)."
            )
        most = _CPU_TOKENS if device.type == "cpu" else _DEVICE_TOKENS
        self._tokens = min(most, max(1, int(0.2 * memory) // a_token))
        self._logit_rows = max(1, min(1024, min(_LOGIT_BYTES, int(0.2 * memory)) // a_row_of_logits))
        most_hidden = memory // 3 if is_offloaded(self._model) else min(memory // 4, _HIDDEN_BYTES)
        most_hidden = most_hidden if self._memory is None else memory // 2
        self.hidden_bytes = min(most_hidden, self._bytes_of_a_pass(device))
        self.kept_bytes = memory // 20  # while it is extended, twice as much
        if device.type == "cpu":
            keep_freed(self._tokens * a_token)

    def _bytes_of_a_pass(self, device: torch.device) -> int:
        """Bytes of the hidden states of one pass, if a pass is as long as an interrupted run may lose (`--resume`)."""
        operations = _OPERATIONS.get(device.type, _DEVICE_OPERATIONS)
        operations *= _OFFLOADED_FACTOR if is_offloaded(self._model) else 1
        tokens = operations / (2 * sum(weight.numel() for weight in self._layers.parameters()))
        return int(tokens * self._model.get_input_embeddings().weight.shape[-1] * self._model.dtype.itemsize)

    def rows(self, length: int) -> int:
        """Most rows of `length` tokens that go through a layer at once."""
        rows = max(1, self._tokens // length)
        return max(1, int(min(rows, self._batch_size or rows) / self._shrunk))

    def logit_rows(self) -> int:
        """Most rows of logits, with their float64 softmax, that are computed at once."""
        return max(1, int(self._logit_rows / self._shrunk))

    def passes(self, rows: Sequence[_T], sizes: Sequence[int]) -> Iterator[Sequence[_T]]:
        """Split rows into passes: consecutive rows whose hidden states fit into memory together."""
        begin, held = 0, 0
        for end, size in enumerate(sizes):
            held += size
            if held > self.hidden_bytes and end > begin:
                yield rows[begin:end]
                begin, held = end, size
        if begin < len(rows):
            yield rows[begin:]

    def shrink(self, limit: Callable[[], int], tried: int) -> None:
        """Lower all limits in proportion, until `limit` returns at most half of `tried`."""
        wanted = max(1, tried // 2)
        while limit() > wanted:
            self._shrunk *= max(1.01, limit() / (wanted + 0.5))


def _width(module: nn.Module) -> int:
    """The larger of input and output width, also of linear layers whose quantised weights are packed into other shapes."""
    if isinstance(module, nn.Linear):
        return max(module.in_features, module.out_features)
    return max((max(weight.shape[-2:]) for weight in module.parameters(recurse=False) if weight.ndim), default=1)


def halving(run_slice: Callable[[slice], None], total: int, budget: Budget, *, limit: Callable[[], int]) -> None:
    """Call `run_slice` on consecutive slices of `total` rows; when out of memory, continue with half the rows at once.

    Args:
        run_slice: runs the rows of one slice.
        total: number of rows.
        budget: the limits to lower when out of memory.
        limit: returns the most rows of a slice, by the budget.

    Raises OutOfMemoryError if a single row does not fit.
    """
    begin = 0
    while begin < total:
        left = total - begin
        tried = ceil(left / ceil(left / limit()))  # slices of equal size, since one of a few rows would be slow
        try:
            with must_fit(halvable=tried > 1):
                run_slice(slice(begin, begin + tried))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            budget.shrink(limit, tried)
            _release()
            log.warning("Out of memory with %d rows at once; continuing with half as many.", tried)
            continue
        begin += tried


@contextmanager
def must_fit(halvable: bool = False) -> Iterator[None]:
    """Raise OutOfMemoryError when memory runs out, unless fewer rows at once (`halvable`) may still fit."""
    try:
        yield
    except RuntimeError as error:
        if halvable or not should_reduce_batch_size(error):
            raise
        raise OutOfMemoryError(
            "Out of memory: a single row, or the hidden states of all rows together, do not fit beside the model. Use a smaller "
            "model, --dtype bfloat16, fewer prompts (--n_val) or a machine with more memory, or close other programs."
        ) from error


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
