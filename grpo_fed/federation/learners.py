"""The learners of a chunk of clients: that of the shared policy and, where there is one, that of a client's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.federation.messages import (
    Train,
)
from grpo_fed.federation.state_store import Arrays
from grpo_fed.rl.measurement import MeasurementStates, fisher_diagonal
from grpo_fed.rl.rng import client_seed
from grpo_fed.rl.stacked_learner import StackedLearner, TrainingReport, sub_state
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import EnvCache
from grpo_fed.tasks.gym_task import GymTask

OWN = "own"
"""Before the names of the second policy's arrays, and in the name of its random streams."""


@final
class ClientLearners:
    """Some clients' fleet, that of their second policies where they have them, and where both stand."""

    def __init__(
        self,
        tasks: Sequence[GymTask],
        scenario: Scenario,
        columns: Tensor,
        sheds: Sequence[EnvCache | None] = (None, None),
    ) -> None:
        """The sheds are for either policy's environments."""
        self.scenario = scenario
        self.columns = columns
        self.shared = StackedLearner(tasks, scenario, shared=columns, shed=sheds[0])
        self.personal: StackedLearner | None = None
        if scenario.personal.model:
            seeds = [client_seed(scenario.seed, f"{task.client} {OWN}") for task in tasks]
            self.personal = StackedLearner(tasks, scenario, seeds, columns, scenario.personal.pull, sheds[1])
        self.states: list[Arrays | None] = [None] * len(tasks)
        """[K]: what they stand at, which is the very arrays that were loaded or written down; None at the beginning."""

    def can_load(self, states: Sequence[Arrays | None]) -> bool:
        """Whether nobody is to begin anew who has begun already: for that there is a new crew."""
        return all(theirs is not None or mine is None for mine, theirs in zip(self.states, states, strict=True))

    def load(self, states: Sequence[Arrays | None]) -> None:
        """Go on from these, unless everybody stands there."""
        if all(mine is theirs for mine, theirs in zip(self.states, states, strict=True)):
            return
        given = [self.state(row) if state is None else state for row, state in enumerate(states)]
        self.shared.load(given)
        if self.personal is not None:
            self.personal.load([sub_state(state, OWN) for state in given])
        self.states = list(states)

    def train(self, order: Train, fresh: Sequence[bool]) -> tuple[list[TrainingReport], list[TrainingReport]]:
        """A round of both policies; of the second, what did nothing where there is none."""
        before, settings = order.start.round - 1, self.scenario
        beside = round(settings.personal.steps * settings.steps) if self.personal is not None else 0
        steps = settings.steps - beside
        self.shared.skip_to(before * steps)
        reports = self.shared.train(steps, order.begin, order.end)
        if self.personal is None:
            return reports, [TrainingReport(name, 0, (), {}) for name in self.shared.names]
        anchor = torch.where(self._column(fresh), self.shared.anchor, self.personal.parameters)
        self.personal.parameters.copy_(anchor)  # a policy of one's own begins where the other one does
        anchor[:, self.columns] = self.shared.anchor[:, self.columns]
        self.personal.skip_to(before * beside)
        return reports, self.personal.train(beside, order.begin, order.end, anchor)

    def fisher(self, number: int) -> list[np.ndarray]:
        """[S] of each client: the diagonal of its policy's Fisher matrix."""
        fleet = self.shared
        states = MeasurementStates.of(fleet.measurement_states, fleet.device)
        found = fisher_diagonal(fleet.policy, states, fleet.parameters, fleet.seeds, number)
        return list(found[:, self.columns].cpu().numpy())

    def state(self, row: int) -> dict[str, np.ndarray]:
        """What one client must remember of both."""
        own = {} if self.personal is None else self.personal.state(row)
        return self.shared.state(row) | {f"{OWN}.{name}": array for name, array in own.items()}

    def close(self) -> None:
        """Close the environments."""
        self.shared.close()
        if self.personal is not None:
            self.personal.close()

    def _column(self, fresh: Sequence[bool]) -> Tensor:
        """[K, 1]."""
        return torch.tensor(fresh, device=self.shared.device)[:, None]
