"""Pruned search: the selected candidate without scoring every one in full, proven by bounds to be the same.

Pure decisions: nothing here knows a model. The search asks a function for the scores that it needs.

    bounds    the scores so far, and the lower bounds of means that they prove
    verdicts  the candidates that can still be selected
    planner   which scores to measure next; a matter of cost, never of the result
    search    the loop over these three
"""
