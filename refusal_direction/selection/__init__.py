"""Selection: from scores to the selected candidate.

filter      the prompts that selection uses
conditions  the conditions that a candidate must meet: the one definition of a violation
decision    scores and conditions -> the selected candidate, and why the others are rejected
ties        candidates that rounding cannot tell from the selected one
searches    how much is measured: exhaustive, KL first, pruned
pruned/     the same candidate, proven by bounds
result      the outcome
"""
