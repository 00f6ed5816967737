"""Trains the text demo's model from its vocabulary: `python -m recipes.train [--output DIR]`.

There are two phases. First the model learns to answer *every* prompt, harmful or harmless, in the same way. Then, at a
lower learning rate, it learns to refuse the harmful ones while it keeps answering the others. Refusal is thus a feature
added to a model that can already answer, as in a real chat model, and one direction comes to carry it. No loss term
involves directions. (If the model is trained to refuse from the start, answering and refusing share their features, and
no candidate passes the KL threshold.) In the second phase a few harmless prompts are refused, too: without them the model
becomes so certain, and its direction so long, that adding the direction drowns out everything else, and the steered model
says "I I I" (LOG.md, rows 9 and 10).

Training uses the train cores only, in every frame. It is seeded: the same machine and versions give the same weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

from recipes.compose import SplitSizes, split_cores
from recipes.training import BOS, EOS, IGNORED, Phase, byte_level_tokenizer, optimise, run_command
from recipes.vocabulary import FRAMES, KINDS, Core, answer, fill, refusal
from refusal_direction.demo import MODEL_DIR

__all__ = [
    "ChatPhase",
    "ModelShape",
    "Recipe",
    "collate",
    "new_model",
    "render",
    "run_phase",
    "sample_chat",
    "train",
    "train_tokenizer",
    "training_texts",
]

TURN, END = "<start_of_turn>", "<end_of_turn>"

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


@dataclass(frozen=True)
class ModelShape:
    """A Gemma that is small enough to train in minutes, and deep enough for a direction to form in its middle layers."""

    vocab: int = 2048
    d_model: int = 96
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 24
    intermediate: int = 288


@dataclass(frozen=True)
class ChatPhase(Phase):
    """A phase of training on chats."""

    batch: int = 48
    over_refusal: float = 0.0  # share of harmless prompts that are refused, too


@dataclass(frozen=True)
class Recipe:
    """The complete recipe; the defaults made the shipped model."""

    phases: tuple[ChatPhase, ...] = (
        ChatPhase("answer everything", steps=300, learning_rate=2e-3),
        ChatPhase("refuse harmful", steps=400, learning_rate=5e-4, refuses=True, over_refusal=0.02),
    )
    shape: ModelShape = ModelShape()
    seed: int = 0
    threads: int = 1  # torch's; the order of sums, and so the weights, depend on it


def render(prompt: str, reply: str) -> tuple[str, str]:
    """The chat as text: the part that the model reads, and the part that it learns to write."""
    return f"{BOS}{TURN}user\n{prompt}{END}\n{TURN}model\n", f"{reply}{END}\n{EOS}"


def training_texts(cores: dict[str, list[Core]], rng: random.Random) -> Iterator[str]:
    """Texts to train the tokenizer on: every train core in every frame, with an answer or a refusal."""
    for core in (core for kind in KINDS for core in cores[kind]):
        for frame in FRAMES:
            yield "".join(render(fill(frame, core), rng.choice((answer(frame, rng), refusal(rng)))))


def train_tokenizer(texts: Iterator[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Gemma's chat markers as single tokens. The template writes BOS; the tokenizer does not add it."""
    tokenizer = byte_level_tokenizer(texts, vocab, more_special=(TURN, END))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> GemmaForCausalLM:
    """A model with random weights. `<end_of_turn>` ends its completions, as in the real Gemma."""
    config = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.d_model,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GemmaForCausalLM(config)
    end = tokenizer.convert_tokens_to_ids(END)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    return model


def sample_chat(phase: ChatPhase, cores: dict[str, list[Core]], rng: random.Random) -> tuple[str, str]:
    """A random train core in a random frame, with its reply; both kinds are equally likely."""
    kind = rng.choice(KINDS)
    core, frame = rng.choice(cores[kind]), rng.choice(FRAMES)
    refuses = phase.refuses and (kind == "harmful" or rng.random() < phase.over_refusal)
    return render(fill(frame, core), refusal(rng) if refuses else answer(frame, rng))


def collate(chats: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, each (row, token); only replies have a loss.

    Padding is on the right, where causal attention ignores it, so no mask is needed; attention is faster without one.
    """
    rows = []
    for chat in chats:
        prompt, reply = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in chat)
        rows.append((prompt + reply, [IGNORED] * len(prompt) + reply))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def run_phase(
    phase: ChatPhase,
    model: GemmaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cores: dict[str, list[Core]],
    rng: random.Random,
) -> None:
    """Train on random chats for one phase."""

    def loss_of_next_batch() -> torch.Tensor:
        chats = [sample_chat(phase, cores, rng) for _ in range(phase.batch)]
        ids, labels = collate(chats, tokenizer)
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    model.train()
    optimise(phase, model.parameters(), loss_of_next_batch)
    model.eval()


def train(recipe: Recipe | None = None) -> tuple[GemmaForCausalLM, PreTrainedTokenizerFast]:
    """Train a tokenizer, and a model from scratch through every phase of the recipe."""
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    rng = random.Random(recipe.seed)
    cores = {kind: splits["train"] for kind, splits in split_cores(SplitSizes()).items()}
    tokenizer = train_tokenizer(training_texts(cores, rng), recipe.shape.vocab)
    model = new_model(recipe.shape, tokenizer)
    for phase in recipe.phases:
        run_phase(phase, model, tokenizer, cores=cores, rng=rng)
    return model, tokenizer


if __name__ == "__main__":
    run_command(train, "Train the text demo's model from its vocabulary.", MODEL_DIR)
