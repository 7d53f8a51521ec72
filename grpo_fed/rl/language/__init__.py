"""Group-relative learning of language models, K clients at once.

    objective.py   the loss of completions, token by token, and what each is learned with

Begin with `completion_targets` and `completion_loss`.
"""
