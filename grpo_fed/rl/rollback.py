"""Updates that are taken back, since the policy plays worse after them: `trust.rollback`.

Both policies play the same episodes, from the same start states and with the same random numbers for their actions, so
that what differs is the update. K clients, P parameters of one policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.rl.actor import Actor
from grpo_fed.rl.client_stack import ClientTensors
from grpo_fed.rl.evaluation import EvaluatedClients, evaluate
from grpo_fed.rl.rng import Purpose
from grpo_fed.rl.scenario_envs import make_scenario_envs
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import ClientEnvs
from grpo_fed.tasks.gym_task import GymTask


@dataclass(frozen=True, eq=False)
class BeforeUpdate:
    """Copies of what an update moves: the policies, and the optimiser's moments and steps.

    What limits the next update is left out, the weight and the limit of the KL and the constraints' multipliers: they
    have learned from the update, so the next one is another one.
    """

    parameters: Tensor
    """[K, P]."""
    mean: Tensor
    square: Tensor
    count: np.ndarray
    phase_counts: np.ndarray

    @classmethod
    def of(cls, tensors: ClientTensors) -> Self:
        """Copy what the next update will move."""
        adam = tensors.adam
        return cls(
            tensors.parameters.clone(),
            adam.mean.clone(),
            adam.square.clone(),
            adam.count.copy(),
            tensors.phase_counts.copy(),
        )

    def put_back(self, tensors: ClientTensors, clients: np.ndarray) -> None:
        """Put some clients, [K] bool, back to where they were, bit for bit."""
        rows = torch.from_numpy(np.flatnonzero(clients)).to(tensors.parameters.device)
        now = (tensors.parameters, tensors.adam.mean, tensors.adam.square)
        for tensor, before in zip(now, (self.parameters, self.mean, self.square), strict=True):
            tensor[rows] = before[rows]
        tensors.adam.count[clients] = self.count[clients]
        tensors.phase_counts[clients] = self.phase_counts[clients]


@final
class Rollback:
    """Plays before and after each update, and takes back the updates after which a client's return fell too far."""

    def __init__(
        self,
        scenario: Scenario,
        tasks: Sequence[GymTask],
        policy: StackedPolicy,
        clients: EvaluatedClients,
        tensors: ClientTensors,
    ) -> None:
        """tensors: of the clients, which are put back in place."""
        self.scenario, self.tasks, self.policy, self.clients, self.tensors = scenario, tasks, policy, clients, tensors
        self._envs: ClientEnvs | None = None

    def take_back(self, before: BeforeUpdate, active: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Take back the bad updates of the active clients [K] bool; gives the clients, [K] bool, that were put back.

        numbers: [K], how many updates each client has made: they name its episodes. An update after which a policy is
        not finite is taken back without playing.
        """
        bound = self.scenario.trust.rollback
        assert bound is not None, "updates may be taken back"
        after = self.tensors.parameters
        finite = after.isfinite().all(1)
        playable = torch.where(finite[:, None], after, before.parameters)
        returns = [self._returns(parameters, numbers) for parameters in (before.parameters, playable)]
        bad = active & ((returns[0] - returns[1] > bound) | ~finite.cpu().numpy())
        if bad.any():
            before.put_back(self.tensors, bad)
        return np.asarray(bad)

    def _returns(self, parameters: Tensor, numbers: np.ndarray) -> np.ndarray:
        """The mean returns of these policies [K, P] in the episodes of an update, [K]."""
        if self._envs is None:
            self._envs = make_scenario_envs(self.tasks, self.scenario, None)
        evaluations = evaluate(
            Actor(self.policy, parameters),
            self._envs,
            self.clients,
            self.scenario.trust.rollback_episodes,
            self.scenario.evaluate.step_limit,
            deterministic=False,
            number=numbers.tolist(),
            purpose=Purpose.ROLLBACK,
        )
        return np.array([evaluation.score for evaluation in evaluations])

    def close(self) -> None:
        """Close the environments."""
        if self._envs is not None:
            self._envs.close()
