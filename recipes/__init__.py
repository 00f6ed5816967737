"""Recipes that made the demo models and prompts in `refusal_direction/demo`. They are not part of the installed package.

    cores/            verbs and objects that the text demo's prompts are made of, harmful and harmless
    vocabulary.py     cores, sentence frames and stock replies
    compose.py        vocabulary -> demo/prompts/            python -m recipes.compose
    train.py          vocabulary -> demo/model/              python -m recipes.train [--output DIR]
    training.py       phases, optimiser, tokenizer and command line, shared with vision/train.py
    evaluate.py       refusal rates on held-out prompts      python -m recipes.evaluate [--vlm]
    LOG.md            every training run of the text demo, with its figures
    vision/           the recipe of the vision-language demo

Run them from the root of the repository. Each model first learns to answer every prompt, and then to refuse the harmful
ones; its refusal direction arises from that training.
"""
