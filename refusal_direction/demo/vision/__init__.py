"""The vision-language demo: a tiny trained PaliGemma 2, and image-question pairs that are made when they are needed.

    model/          PaliGemmaForConditionalGeneration with 1.0M parameters, float32, with its processor
    icons.py        dangerous and harmless objects as lists of simple shapes
    draw.py         object -> image, with random variation
    questions.py    questions by form, split into known and held-out ones
    pairs.py        objects and questions -> pairs by kind and split

Harm lies in the pair: the model refuses only a request about a dangerous object. Importing this module is cheap: it
loads neither torch nor Pillow.
"""

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR: Path = Path(__file__).parent / "model"
