"""Scores: from logits to what each candidate direction does to each prompt.

metrics   logits -> refusal score, KL divergence
baseline  pass 1: the model without intervention
scores    per-prompt scores of candidates, their means, and requests for them
requests  pass 2: requests for scores -> rows of the engine -> scores
noise     the effect of rounding on scores, measured by repeated rows
passes    all passes of a run, with the scores and counts so far
"""
