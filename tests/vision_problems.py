"""A small instance of the method's problem on images with text, and its slow answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families.building import layers_of
from tests.families.vision import SIDE, VisionFamily, inputs_for
from tests.oracles import one_by_one, reference
from tests.problems import N_POSITIONS, REFUSAL_TOKENS, Sets

FIRST_TEXT_TOKEN = 12
LAST_TEXT_TOKEN = 139
_END_OF_PROMPT = [9, 4]  # as a template would put there; fewer than positions, so the last of these differs
_LENGTHS = (4, 7, 2, 9)  # shorter and longer than the sliding windows


class VisionProblem(Sets[dict[str, Tensor]]):
    """Prompts are the model's inputs."""

    @staticmethod
    def as_inputs(prompt: dict[str, Tensor]) -> dict[str, Tensor]:
        return prompt


def make_vision_problem(
    family: VisionFamily,
    *,
    seed: int = 0,
    n_train: int = 4,
    n_val: int = 3,
    shapes: Sequence[tuple[int, int, int]] = ((1, SIDE, SIDE),),
) -> VisionProblem:
    """Random images and questions; both differ in kind, harmful from harmless. `shapes`: (tiles, height, width) in turn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, low: int, high: int, brightness: float, shift: int) -> list[dict[str, Tensor]]:
        prompts = []
        for number in range(count):
            n_tiles, height, width = shapes[(number + shift) % len(shapes)]
            tiles = torch.randn(n_tiles, 3, height, width, generator=generator) + brightness
            length = _LENGTHS[(number + shift) % len(_LENGTHS)]
            body = torch.randint(low, high, (length,), generator=generator).tolist()
            prompts.append(inputs_for(family, [*body, *_END_OF_PROMPT], tiles))
        return prompts

    middle = (FIRST_TEXT_TOKEN + LAST_TEXT_TOKEN) // 2
    return VisionProblem(
        harmful_train=draw(n_train, middle, LAST_TEXT_TOKEN + 1, 0.5, 0),
        harmless_train=draw(n_train, FIRST_TEXT_TOKEN, middle, -0.5, 1),
        harmful_val=draw(n_val, middle, LAST_TEXT_TOKEN + 1, 0.5, 2),
        harmless_val=draw(n_val, FIRST_TEXT_TOKEN, middle, -0.5, 0),
    )


def known_vision(
    model: PreTrainedModel, family: VisionFamily, writes: tuple[str, ...] | None = None
) -> reference.Model:
    """The model as the reference implementation wants it: with the hand-written truth, or other writes."""
    return reference.Model(
        model, layers_of(model, family), writes or family.writes, adds_between_layers=family.adds_between_layers
    )


def solve_vision_slowly(model: PreTrainedModel, family: VisionFamily, problem: VisionProblem) -> reference.Report:
    """The reference implementation's answer to the same problem."""
    return one_by_one.report(
        known_vision(model, family), **problem.sets, refusal_tokens=REFUSAL_TOKENS, n_positions=N_POSITIONS
    )
