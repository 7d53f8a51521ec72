"""The learners of some clients: of the policy that they share and, with `personal.model`, of their second one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch

from grpo_fed.federation.messages import Train
from grpo_fed.federation.state_store import StateVersion, StoredState
from grpo_fed.rl.learner import PERSONAL, ClientPolicies, join_states, sub_state
from grpo_fed.rl.records import TrainingReport
from grpo_fed.scenario.scenario import Scenario

NOT_STORED = StateVersion("", 0, (0, 0, 0))
"""The version of a state that was trained on, and has not been stored since."""


@final
class ClientLearners:
    """Trains K clients for a round, and knows which of their stored states they are in."""

    def __init__(self, scenario: Scenario, policies: ClientPolicies, clients: Sequence[str], round: int = 1) -> None:
        """Make the learners of these clients, at the beginning of a run, in the tasks of a round."""
        self.scenario = scenario
        self.columns = policies.columns
        self.names = list(clients)
        self.round = round
        self.shared = policies.make_learner(clients, round)
        self.personal = policies.make_learner(clients, round, personal=True) if scenario.personal.model else None
        self._versions: list[StateVersion | None] = [None] * len(clients)
        """[K]: the stored states that the learners are in; None for a client at the beginning of the run."""

    def can_load(self, states: Sequence[StoredState | None]) -> bool:
        """Whether `load` can take these states up: it cannot take a client back to the beginning of the run."""
        return all(state is not None or version is None for version, state in zip(self._versions, states, strict=True))

    def load(self, states: Sequence[StoredState | None]) -> None:
        """Go on from stored states, None being the beginning of the run; does nothing if the learners are in them."""
        versions = [None if state is None else state.version for state in states]
        if versions == self._versions:
            return
        arrays = [self.state(row) if state is None else state.arrays for row, state in enumerate(states)]
        self.shared.load(arrays)
        if self.personal is not None:
            self.personal.load([sub_state(state, PERSONAL) for state in arrays])
        self._versions = versions

    def mark_stored(self, row: int, state: StoredState) -> None:
        """Take note that a client's present state was stored."""
        self._versions[row] = state.version

    def train(self, instructions: Sequence[Train]) -> tuple[list[TrainingReport], list[TrainingReport]]:
        """Train both policies for a round; gives a report of each, an empty one where there is no second policy.

        instructions: [K], of one round.
        """
        first_round = [version is None for version in self._versions]
        self._versions = [NOT_STORED] * len(self.names)
        instruction, *_ = instructions
        for row, each in enumerate(instructions):
            self._steer(row, each.curriculum)
        rounds_before, settings = instruction.start.round - 1, self.scenario
        personal_steps = round(settings.personal.steps * settings.steps) if self.personal is not None else 0
        steps = settings.steps - personal_steps
        self.shared.skip_to(rounds_before * steps)
        reports = self.shared.train(steps, instruction.begin, instruction.end)
        if self.personal is None:
            return reports, [TrainingReport(name, 0, (), {}) for name in self.names]
        is_first = torch.tensor(first_round, device=self.columns.device)[:, None]
        anchor = torch.where(is_first, self.shared.anchor, self.personal.parameters)
        self.personal.parameters.copy_(anchor)  # a second policy begins where the first one does
        anchor[:, self.columns] = self.shared.anchor[:, self.columns]
        self.personal.skip_to(rounds_before * personal_steps)
        return reports, self.personal.train(personal_steps, instruction.begin, instruction.end, anchor)

    def _steer(self, row: int, state: Sequence[float]) -> None:
        """Take the state of a curriculum that the server steers; ValueError if it is not that of this client."""
        states = {} if self.shared.levels is None else self.shared.levels.states
        size = states[row].size if self.scenario.curriculum.by == "server" and row in states else 0
        if len(state) != size:
            raise ValueError(
                f"client {self.names[row]}: the server steers a curriculum of {len(state)} numbers, and this client"
                f" expects {size}; give both the same scenario"
            )
        if size:
            states[row] = np.array(state, np.float64)

    def evidence(self, row: int) -> tuple[float, ...]:
        """What a client's returns in the last round say of its levels, for a server that steers; empty without one."""
        levels = self.shared.levels
        if levels is None or row not in levels.evidence or self.scenario.curriculum.by != "server":
            return ()
        return tuple(levels.evidence[row].ravel().tolist())

    def fisher(self, number: int) -> list[np.ndarray]:
        """The diagonal of the Fisher matrix of each client's shared blocks, [S] each."""
        return list(self.shared.fisher(number)[:, self.columns].cpu().numpy())

    def state(self, row: int) -> dict[str, np.ndarray]:
        """What one client must remember of both policies."""
        personal = {} if self.personal is None else join_states({PERSONAL: self.personal.state(row)})
        return self.shared.state(row) | personal

    def close(self) -> None:
        """Close the environments."""
        self.shared.close()
        if self.personal is not None:
            self.personal.close()
