"""Corrects the drift of clients between two merges, as SCAFFOLD does (1910.06378), without a message more.

SCAFFOLD lets client k subtract from each gradient c_k - c, where c_k is its own mean gradient in the last round and c
the mean of all. Written as steps of the parameters, with u_k the mean step of client k's optimiser and u that of all,
each step has u - u_k added. So it serves any optimiser, and with plain gradient steps it is SCAFFOLD's option II.

If every client takes part and the server goes all the way to their mean, u follows from the shared blocks that a client
gets anyway: their move since the last round, divided by the number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.federation.loaded_client import ROUND_SHARED, LoadedClient
from grpo_fed.rl.learner import Learner

OWN_STEP, STEPS = "round.own_step", "round.steps"
"""The arrays of a client's state with its own mean step [S] of the last round, and with the number of steps."""


@final
class RoundDrift:
    """The corrections of some clients in a round; none without `merge.correct_drift`."""

    def __init__(self, learner: Learner, columns: Tensor, clients: Sequence[LoadedClient]) -> None:
        """Tell a learner of these clients what each of its steps adds. columns: [S], of what they share."""
        self._learner, self._clients = learner, clients
        self._steps_before = learner.optimiser_steps.copy()
        self._corrections: list[np.ndarray] = []
        """[S] for each client."""
        for row, client in enumerate(clients if learner.drift is not None else ()):
            assert learner.drift is not None
            shared, state = client.start.shared, client.remembered if client.remembers(client.start.round - 1) else {}
            self._corrections.append(step_correction(shared, state.get(ROUND_SHARED, shared), state))
            learner.drift[row, columns] = torch.from_numpy(self._corrections[-1]).to(learner.drift.device)

    def arrays(self, row: int, point: np.ndarray) -> dict[str, np.ndarray]:
        """Give what a client has to remember for the next round, by name. point: [S], where its training ended."""
        if not self._corrections:
            return {}
        steps = float((self._learner.optimiser_steps - self._steps_before)[row, 0])
        return own_step(self._clients[row].start.shared, point, self._corrections[row], steps)


def step_correction(shared: np.ndarray, last_shared: np.ndarray, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute what a client adds to each step of a round, u - u_k, [S].

    shared, last_shared: [S], the shared blocks as this round begins and as the last one began. state: what `own_step`
    gave in the last round; an empty one gives 0.
    """
    if OWN_STEP not in state or not state[STEPS]:
        return np.zeros_like(shared)
    return np.asarray((shared - last_shared) / state[STEPS] - state[OWN_STEP])


def own_step(shared: np.ndarray, point: np.ndarray, correction: np.ndarray, steps: float) -> dict[str, np.ndarray]:
    """Compute a client's own mean step in a round, without the correction that was added, as arrays of its state.

    shared, point, correction: [S], the shared blocks before and after its training, and what was added to each of its
    `steps` steps.
    """
    step = (point - shared) / max(steps, 1.0) - correction
    return {OWN_STEP: step.astype(shared.dtype), STEPS: np.array(steps, shared.dtype)}
