"""What both demos are trained with: phases, the optimiser with its schedule, and byte-level tokenizers.

It knows of no prompts, images or replies: a caller brings its loss.
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

__all__ = ["BOS", "EOS", "IGNORED", "PAD", "UNK", "Phase", "byte_level_tokenizer", "command", "optimise"]

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"  # in the order of their ids in Gemma's own vocabulary
IGNORED = -100  # label of tokens without a loss


@dataclass(frozen=True)
class Phase:
    """One stage of training: how long, how fast, and whether what is harmful is refused in it."""

    name: str
    steps: int
    learning_rate: float
    refuses: bool = False
    batch: int = 64
    weight_decay: float = 0.01
    warmup: int = 40


def _schedule(phase: Phase, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """A short warm-up, then cosine decay to a tenth."""
    warmup = LinearLR(optimizer, start_factor=1 / phase.warmup, total_iters=phase.warmup)
    decay = CosineAnnealingLR(optimizer, T_max=phase.steps - phase.warmup, eta_min=phase.learning_rate / 10)
    return SequentialLR(optimizer, [warmup, decay], milestones=[phase.warmup])


def optimise(phase: Phase, parameters: Iterable[nn.Parameter], loss_of_next_batch: Callable[[], Tensor]) -> None:
    """Every step of a phase, by AdamW with a fresh state; gradients are clipped to norm 1."""
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
    """Byte-level BPE that has learnt its merges from `texts`; it adds no special tokens by itself."""
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


def command(train: Callable[[], tuple[Any, Any]], description: str, output: Path) -> None:
    """The command line of a recipe: train a model with its tokenizer or processor, and save both (by default to `output`)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=output, help="folder to save to (default: the shipped model)")
    folder = parser.parse_args().output
    for part in train():
        part.save_pretrained(folder)
