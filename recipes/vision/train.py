"""Trains the vision-language demo from scratch: `python -m recipes.vision.train [--output DIR]`.

There are three phases. First the vision tower learns to tell the drawn objects apart, with a classifier that is then
discarded (as a SigLIP tower is trained before PaliGemma); afterwards the tower is frozen. Second, the rest of the model
learns to answer *every* pair, whatever the object. Third, at a lower learning rate, it learns to refuse requests about
dangerous objects while it keeps answering all other questions. Refusal is thus a feature added to a model that can
already answer, and one direction comes to carry it. No loss term involves directions.

Training is seeded: the same machine and versions give the same weights.
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

from recipes.training import IGNORED, Phase, optimise, run_command
from recipes.vision.build import ModelShape, new_model, new_processor
from recipes.vision.replies import answer, refusal
from refusal_direction.demo.vision import MODEL_DIR
from refusal_direction.demo.vision.draw import draw
from refusal_direction.demo.vision.icons import DANGEROUS, HARMLESS, OBJECTS
from refusal_direction.demo.vision.questions import FORMS, questions

__all__ = [
    "Recipe",
    "ReplyPhase",
    "collate",
    "draw_images",
    "run_reply_phase",
    "run_vision_phase",
    "sample_example",
    "sample_pixels",
    "tokenizer_texts",
    "train",
]

Example = tuple[str, str, str]  # object, question, reply


@dataclass(frozen=True)
class ReplyPhase(Phase):
    """A phase of training on replies."""

    shares: tuple[float, ...] = (0.3, 0.4, 0.3)  # of the forms of questions: request, neutral, danger
    frozen: tuple[str, ...] = ()  # a parameter is frozen if its name contains one of these


@dataclass(frozen=True)
class Recipe:
    """The complete recipe; the defaults made the shipped model."""

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
    drawings: int = 1500  # for each object
    seed: int = 0
    threads: int = 1  # torch's; the order of sums, and so the weights, depend on it


def _rng(recipe: Recipe, phase: Phase) -> random.Random:
    """A random generator for one phase, so that a change to the phase does not affect the others."""
    return random.Random(f"{recipe.seed} {phase.name}")


def draw_images(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Object -> images [count, 3, height, width], as bytes."""
    drawings = {}
    for thing in tqdm(OBJECTS, desc="draw", disable=None):
        images = [draw(thing, random.Random(f"train {seed} {thing} {number}")) for number in range(count)]
        drawings[thing] = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return drawings


def sample_pixels(drawings: dict[str, torch.Tensor], things: list[str], rng: random.Random) -> torch.Tensor:
    """A random drawing of each object, scaled to [-1, 1] like the processor's pixels."""
    sample = torch.stack([rng.choice(drawings[thing]) for thing in things])
    return sample.float() / 127.5 - 1


def sample_example(phase: ReplyPhase, rng: random.Random) -> Example:
    """A random question about a random object with its reply; dangerous and harmless objects are equally likely."""
    form = rng.choices(FORMS, phase.shares)[0]
    thing = rng.choice(list(rng.choice((DANGEROUS, HARMLESS))))
    question = rng.choice(questions(form, held_out=False))
    refused = phase.refuses and form == "request" and thing in DANGEROUS
    return thing, question.text, refusal(rng) if refused else answer(question, thing, rng)


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Texts to train the tokenizer on: every question used in training, with an answer and a refusal."""
    rng = random.Random(f"{seed} words")
    for form in FORMS:
        for question in questions(form, held_out=False):
            yield f"answer en {question.text}\n"
            yield answer(question, rng.choice(OBJECTS), rng)
            yield refusal(rng)


def run_vision_phase(
    phase: Phase, model: PaliGemmaForConditionalGeneration, drawings: dict[str, torch.Tensor], *, rng: random.Random
) -> None:
    """Train the vision tower to classify objects, with a linear classifier that is then discarded."""
    tower = model.model.vision_tower
    classifier = nn.Linear(tower.config.hidden_size, len(OBJECTS))

    def loss_of_next_batch() -> torch.Tensor:
        labels = torch.tensor([rng.randrange(len(OBJECTS)) for _ in range(phase.batch)])
        seen = tower(sample_pixels(drawings, [OBJECTS[label] for label in labels], rng)).last_hidden_state
        return functional.cross_entropy(classifier(seen.mean(1)), labels)

    optimise(phase, [*tower.parameters(), *classifier.parameters()], loss_of_next_batch)


def collate(examples: list[Example], processor: PaliGemmaProcessor) -> dict[str, torch.Tensor]:
    """Model inputs without pixels, and `labels`, each (row, token).

    Prompts are padded on the left and replies on the right. So every reply starts in the same column, and logits are
    needed only from that column on.
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


def run_reply_phase(
    phase: ReplyPhase,
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    *,
    drawings: dict[str, torch.Tensor],
    rng: random.Random,
) -> None:
    """Train on random examples for one phase."""

    def loss_of_next_batch() -> torch.Tensor:
        examples = [sample_example(phase, rng) for _ in range(phase.batch)]
        inputs = collate(examples, processor)
        labels = inputs.pop("labels")
        images = sample_pixels(drawings, [thing for thing, _, _ in examples], rng)
        logits = model(**inputs, pixel_values=images, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in phase.frozen))
    optimise(phase, (parameter for parameter in model.parameters() if parameter.requires_grad), loss_of_next_batch)
    model.eval()


def train(recipe: Recipe | None = None) -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    """Train a processor's tokenizer, and a model from scratch through every phase of the recipe."""
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    processor = new_processor(tokenizer_texts(recipe.seed), recipe.shape)
    model = new_model(recipe.shape, processor)
    drawings = draw_images(recipe.drawings, recipe.seed)
    run_vision_phase(recipe.see, model, drawings, rng=_rng(recipe, recipe.see))
    for phase in (recipe.answer, recipe.refuse):
        run_reply_phase(phase, model, processor, drawings=drawings, rng=_rng(recipe, phase))
    return model, processor


if __name__ == "__main__":
    run_command(train, "Train the vision-language demo model from scratch.", MODEL_DIR)
