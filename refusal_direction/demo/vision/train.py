"""Trains the vision-language demo from nothing: `python -m refusal_direction.demo.vision.train [--output DIR]`.

Three phases. The vision tower first learns to tell the drawn objects apart, under a throw-away classifier (as a SigLIP
tower is trained before PaliGemma is); from then on it stays as it is. Then the rest learns to answer *every* pair,
dangerous or not. Then, at a lower learning rate, it learns to refuse requests about dangerous objects while it goes on
answering all else. Refusal is thus a feature added on top of a model that can answer, and one direction comes to carry it.
No loss term knows of directions.

Seeded; the same machine and versions give the same weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from refusal_direction.demo.training import IGNORED, Phase, command, optimise
from refusal_direction.demo.vision import MODEL_DIR
from refusal_direction.demo.vision.build import ModelShape, new_model, new_processor
from refusal_direction.demo.vision.draw import draw
from refusal_direction.demo.vision.icons import DANGEROUS, HARMLESS, OBJECTS
from refusal_direction.demo.vision.vocabulary import FORMS, answer, questions, refusal

__all__ = [
    "Recipe",
    "ReplyPhase",
    "collate",
    "draw_pool",
    "example",
    "learn_to_reply",
    "learn_to_see",
    "pixels",
    "tokenizer_texts",
    "train",
]

Example = tuple[str, str, str]  # object, question, reply


@dataclass(frozen=True)
class ReplyPhase(Phase):
    """One stage of training on replies: how often each form of question, and what stays as it is."""

    shares: tuple[float, ...] = (0.3, 0.4, 0.3)  # of the forms: request, neutral, danger
    frozen: tuple[str, ...] = ()  # parameters with one of these in their names


@dataclass(frozen=True)
class Recipe:
    """The whole recipe; the defaults made the model that ships."""

    see: Phase = field(default=Phase("tell objects apart", steps=2500, learning_rate=2e-3, batch=128))
    answer: ReplyPhase = ReplyPhase("answer everything", steps=900, learning_rate=2e-3, frozen=("vision_tower",))
    refuse: ReplyPhase = ReplyPhase(
        "refuse harmful",
        steps=350,
        learning_rate=8e-4,
        refuses=True,
        shares=(0.4, 0.4, 0.2),
        frozen=("vision_tower", "multi_modal_projector", "layers.5.", "layers.6.", "layers.7."),
    )
    shape: ModelShape = field(default_factory=ModelShape)
    drawings: int = 1500  # of each object
    seed: int = 0
    threads: int = 1  # of torch: sums, and so the weights, depend on it


def _rng(recipe: Recipe, phase: Phase) -> random.Random:
    """A generator of the phase's own: changing one phase leaves the others as they were."""
    return random.Random(f"{recipe.seed} {phase.name}")


def draw_pool(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Object -> images [count, 3, height, width], as bytes."""
    pool = {}
    for thing in tqdm(OBJECTS, desc="draw", disable=None):
        images = [draw(thing, random.Random(f"train {seed} {thing} {number}")) for number in range(count)]
        pool[thing] = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return pool


def pixels(pool: dict[str, torch.Tensor], things: list[str], rng: random.Random) -> torch.Tensor:
    """A random drawing of each object, scaled to [-1, 1] as the processor does it."""
    chosen = torch.stack([rng.choice(pool[thing]) for thing in things])
    return chosen.float() / 127.5 - 1


def example(phase: ReplyPhase, rng: random.Random) -> Example:
    """A random question about a random object, dangerous half of the time, with its reply."""
    form = rng.choices(FORMS, phase.shares)[0]
    thing = rng.choice(list(rng.choice((DANGEROUS, HARMLESS))))
    question = rng.choice(questions(form, held_out=False))
    refused = phase.refuses and form == "request" and thing in DANGEROUS
    return thing, question.text, refusal(rng) if refused else answer(question, thing, rng)


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Every question to train on, with replies of either kind: what the tokenizer learns its merges from."""
    rng = random.Random(f"{seed} words")
    for form in FORMS:
        for question in questions(form, held_out=False):
            yield f"answer en {question.text}\n"
            yield answer(question, rng.choice(OBJECTS), rng)
            yield refusal(rng)


def learn_to_see(
    phase: Phase, model: PaliGemmaForConditionalGeneration, pool: dict[str, torch.Tensor], *, rng: random.Random
) -> None:
    """Trains the vision tower to name objects, under a linear classifier that is then thrown away."""
    tower = model.model.vision_tower
    classifier = nn.Linear(tower.config.hidden_size, len(OBJECTS))

    def loss_of_next_batch() -> torch.Tensor:
        labels = torch.tensor([rng.randrange(len(OBJECTS)) for _ in range(phase.batch)])
        seen = tower(pixels(pool, [OBJECTS[label] for label in labels], rng)).last_hidden_state
        return functional.cross_entropy(classifier(seen.mean(1)), labels)

    optimise(phase, [*tower.parameters(), *classifier.parameters()], loss_of_next_batch)


def collate(examples: list[Example], processor: PaliGemmaProcessor) -> dict[str, torch.Tensor]:
    """Model inputs without pixels, and `labels`, each (row, token): prompts padded on the left, replies on the right.

    So every reply starts in the same column, and logits are needed only from there on.
    """
    tokenizer = processor.tokenizer
    start = processor.image_token * processor.image_seq_length + tokenizer.bos_token
    prompts = [f"{start}answer en {question}\n" for _, question, _ in examples]
    replies = [reply + tokenizer.eos_token for _, _, reply in examples]
    left = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    right = tokenizer(replies, padding=True, padding_side="right", return_tensors="pt")
    return {
        "input_ids": torch.cat([left["input_ids"], right["input_ids"]], dim=1),
        "attention_mask": torch.cat([left["attention_mask"], right["attention_mask"]], dim=1),
        "token_type_ids": torch.cat([torch.zeros_like(left["input_ids"]), torch.ones_like(right["input_ids"])], dim=1),
        "labels": right["input_ids"].masked_fill(right["attention_mask"] == 0, IGNORED),
    }


def learn_to_reply(
    phase: ReplyPhase,
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    *,
    pool: dict[str, torch.Tensor],
    rng: random.Random,
) -> None:
    """Trains on the replies of the phase."""

    def loss_of_next_batch() -> torch.Tensor:
        examples = [example(phase, rng) for _ in range(phase.batch)]
        inputs = collate(examples, processor)
        labels = inputs.pop("labels")
        images = pixels(pool, [thing for thing, _, _ in examples], rng)
        logits = model(**inputs, pixel_values=images, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in phase.frozen))
    optimise(phase, (parameter for parameter in model.parameters() if parameter.requires_grad), loss_of_next_batch)
    model.eval()


def train(recipe: Recipe | None = None) -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    """Processor and model, trained from nothing through every phase of the recipe."""
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    processor = new_processor(tokenizer_texts(recipe.seed), recipe.shape)
    model = new_model(recipe.shape, processor)
    pool = draw_pool(recipe.drawings, recipe.seed)
    learn_to_see(recipe.see, model, pool, rng=_rng(recipe, recipe.see))
    for phase in (recipe.answer, recipe.refuse):
        learn_to_reply(phase, model, processor, pool=pool, rng=_rng(recipe, phase))
    return model, processor


if __name__ == "__main__":
    command(train, "Train the vision-language demo model from nothing.", MODEL_DIR)
