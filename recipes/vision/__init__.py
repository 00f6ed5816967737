"""The recipe of the vision-language demo.

    replies.py        answers and refusals
    build.py          tokenizer, processor and untrained model
    train.py          all of these -> demo/vision/model/     python -m recipes.vision.train [--output DIR]
    LOG.md            every training run, with its figures

Images and questions are in `refusal_direction/demo/vision`, since the package makes its prompts of them.
"""
