"""The vision-language demo: a tiny trained PaliGemma 2 with its own drawn images, and the recipe that made it.

    icons.py        the objects, dangerous and harmless, as lists of simple shapes
    draw.py         object -> image, varied
    vocabulary.py   questions, and the replies to them
    pairs.py        image and question, by kind and split: what the direction is fitted and tested on
    build.py        tokenizer, processor and untrained model
    train.py        all of these -> model/           python -m refusal_direction.demo.vision.train
    model/          PaliGemmaForConditionalGeneration, float32, with its processor
    LOG.md          what was tried, and the figures seen

Harm lies in the pair: only the request, asked of a dangerous object, is refused. Importing this package is cheap: no
torch and no Pillow.
"""

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR: Path = Path(__file__).parent / "model"
