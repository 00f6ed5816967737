"""The demo that ships with the project: a tiny trained Gemma with its own prompts, and the recipe that made both.

    cores/          the vocabulary: verbs and objects, harmful and harmless
    vocabulary.py   cores, sentence frames, stock replies
    compose.py      vocabulary -> prompts/       python -m refusal_direction.demo.compose
    prompts/        {harmful,harmless}_{train,val,test}.json: instruction and category
    train.py        prompts -> model/            python -m refusal_direction.demo.train
    training.py     what both recipes share: phases, the optimiser, tokenizers
    evaluate.py     model/ -> shares refused     python -m refusal_direction.demo.evaluate [--vlm]
    model/          GemmaForCausalLM, 1.0M parameters, float32, with tokenizer and chat template
    LOG.md          what was tried, and the figures seen

The model first learns to answer every prompt, then to refuse the harmful ones; its refusal direction arises from that
training. Importing this module is cheap: no torch.
"""

from pathlib import Path

__all__ = ["MODEL_DIR", "PROMPTS_DIR"]

MODEL_DIR: Path = Path(__file__).parent / "model"
PROMPTS_DIR: Path = Path(__file__).parent / "prompts"
