"""The recipe of the vision-language demo. Its images and questions are drawn by `refusal_direction/demo/vision`.

replies.py        answers and refusals
build.py          tokenizer, processor and untrained model
train.py          all of these -> demo/vision/model/     python -m recipes.vision.train [--output DIR]
LOG.md            every training run, with its figures
"""
