"""The demo that ships with the package: two tiny trained models and their prompts.

    model/      GemmaForCausalLM with 1.0M parameters, float32, with its tokenizer and chat template
    prompts/    {harmful,harmless}_{train,val,test}.json: lists of {"instruction", "category"}
    vision/     the vision-language demo: its model, and the code that draws its image-question pairs

The recipes that made them are in `recipes/`, beside this package in the repository. Importing this module is cheap: it
loads neither torch nor Pillow.
"""

from pathlib import Path

__all__ = ["MODEL_DIR", "PROMPTS_DIR"]

MODEL_DIR: Path = Path(__file__).parent / "model"
PROMPTS_DIR: Path = Path(__file__).parent / "prompts"
