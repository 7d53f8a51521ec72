"""How fast a policy adapts to its client's task: it is played again after each of some local updates.

The updates are made on a copy, with an optimiser and random streams of their own, so nothing that a client learns or
remembers depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from grpo_fed.rl.learner import ClientPolicies, State


def adapted_returns(
    policies: ClientPolicies,
    clients: Sequence[str],
    parameters: Tensor,
    states: Sequence[State | None],
    number: int,
    updates: int,
) -> list[tuple[float, ...]]:
    """Play the evaluation's episodes after each of so many updates; return the mean returns of each client, [K, U].

    parameters: [K, P], the policies that are adapted. states, number: as for `ClientPolicies.evaluate`.
    """
    learner = policies.make_adapting_learner(clients, parameters, states, number)
    returns: list[list[float]] = [[] for _ in clients]
    try:
        for _ in range(updates):
            learner.steps_due[:] = learner.steps_done  # whatever is over from the batch before, one more is due
            learner.train(1, anchor=parameters)
            adapted = [learner.state(row) for row in range(len(clients))]
            evaluations = policies.evaluate(clients, learner.parameters, adapted, number, deterministic=True)
            for row, evaluation in enumerate(evaluations):
                returns[row].append(float(np.mean(evaluation.scores)))
    finally:
        learner.close()
    return [tuple(values) for values in returns]
