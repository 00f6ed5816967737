"""The parts that both training recipes share: phases, the optimiser with its schedule, tokenizers, the command line.

This module knows nothing of prompts, images or replies: the caller provides the loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

__all__ = ["BOS", "EOS", "IGNORED", "PAD", "UNK", "Phase", "byte_level_tokenizer", "optimise", "run_command"]

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"  # in the order of their ids in Gemma's own vocabulary
IGNORED = -100  # label of tokens that have no loss


@dataclass(frozen=True)
class Phase:
    """One phase of training."""

    name: str
    steps: int
    learning_rate: float
    refuses: bool = False
    """Whether harmful requests are refused in this phase."""
    batch: int = 64
    weight_decay: float = 0.01
    warmup: int = 40


def _schedule(phase: Phase, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A short warm-up, then cosine decay to a tenth of the learning rate."""
    warmup = LinearLR(optimizer, start_factor=1 / phase.warmup, total_iters=phase.warmup)
    decay = CosineAnnealingLR(optimizer, T_max=phase.steps - phase.warmup, eta_min=phase.learning_rate / 10)
    return SequentialLR(optimizer, [warmup, decay], milestones=[phase.warmup])


def optimise(phase: Phase, parameters: Iterable[nn.Parameter], loss_of_next_batch: Callable[[], Tensor]) -> None:
    """Run all steps of a phase with a new AdamW optimiser; gradients are clipped to norm 1."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=phase.learning_rate, weight_decay=phase.weight_decay)
    schedule = _schedule(phase, optimizer)
    with tqdm(range(phase.steps), desc=phase.name, disable=None) as bar:
        for _ in bar:
            optimizer.zero_grad()
            loss = loss_of_next_batch()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")


def byte_level_tokenizer(texts: Iterable[str], size: int, more_special: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`. It adds no special tokens to what it encodes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS, BOS, UNK, *more_special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(iter(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK, padding_side="left"
    )


def run_command(train: Callable[[], tuple[Any, Any]], description: str, output: Path) -> None:
    """Run the command line of a recipe: train the model and its tokenizer or processor, and save both."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=output, help="folder to save to (default: the shipped model)")
    folder = parser.parse_args().output
    for trained in train():
        trained.save_pretrained(folder)
