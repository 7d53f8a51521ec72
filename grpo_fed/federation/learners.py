"""The learners of some clients: of the policy that they share and, where the scenario has them, of their others.

With `personal.model` a client has a second policy that is pulled to the shared one, and with `evaluate.twins` a twin
that learns alone. Nothing that the shared policy does depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.federation.messages import Train
from grpo_fed.federation.state_store import StateVersion, StoredState
from grpo_fed.rl.learner import PERSONAL, TWIN, ClientPolicies, Learner, join_states, sub_state
from grpo_fed.rl.records import TrainingReport
from grpo_fed.scenario.scenario import Scenario

NOT_STORED = StateVersion("", 0, (0, 0, 0))
"""The version of a state that was trained on, and has not been stored since."""


def has_twins(scenario: Scenario) -> bool:
    """Decide whether clients have twins: where nothing is shared, every client learns alone anyway."""
    return scenario.evaluate.twins and bool(scenario.policy.shared)


@dataclass(frozen=True)
class RoundReports:
    """What a client's learners report of a round."""

    shared: TrainingReport
    personal: TrainingReport
    """Of the second policy; an empty report where there is none."""
    twin: TrainingReport | None
    """Of the twin; None where there is none."""

    @property
    def steps(self) -> int:
        """The steps that the client learned from; those of its twin are none of the federation's."""
        return self.shared.steps + self.personal.steps

    @property
    def episodes(self) -> int:
        """The training episodes that finished, without those of the twin."""
        return len(self.shared.episodes) + len(self.personal.episodes)

    @property
    def evaluated(self) -> TrainingReport:
        """The report of the policy that evaluations use."""
        return self.personal if self.personal.steps else self.shared


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
        self.personal = policies.make_learner(clients, round, "personal") if scenario.personal.model else None
        self.twins = policies.make_learner(clients, round, "twin") if has_twins(scenario) else None
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
        for part, learner in self._others.items():
            learner.load([sub_state(state, part) for state in arrays])
        self._versions = versions

    def mark_stored(self, row: int, state: StoredState) -> None:
        """Take note that a client's present state was stored."""
        self._versions[row] = state.version

    def train(self, instructions: Sequence[Train]) -> list[RoundReports]:
        """Train all policies for a round; gives each client's reports.

        instructions: [K], of one round.
        """
        first_round = [version is None for version in self._versions]
        self._versions = [NOT_STORED] * len(self.names)
        instruction, *_ = instructions
        for row, each in enumerate(instructions):
            self._steer(row, each.curriculum)
        for learner in (self.shared, *self._others.values()):
            learner.scale_learning_rates(np.array([each.rate for each in instructions]))
        is_first = torch.tensor(first_round, device=self.columns.device)[:, None]
        shared = self._train_shared(instruction)
        personal = [TrainingReport(name, 0, (), {}) for name in self.names]
        if self.personal is not None:
            personal = self._train_personal(self.personal, instruction, is_first)
        twins: Sequence[TrainingReport | None] = [None] * len(self.names)
        if self.twins is not None:
            twins = self._train_twins(self.twins, instruction, is_first)
        return [RoundReports(*reports) for reports in zip(shared, personal, twins, strict=True)]

    @property
    def _others(self) -> dict[str, Learner]:
        """The learners beside that of the shared policies, by the name of their part of a client's state."""
        learners = {PERSONAL: self.personal, TWIN: self.twins}
        return {part: learner for part, learner in learners.items() if learner is not None}

    @property
    def _personal_steps(self) -> int:
        """The steps of a round that are made with the second policy."""
        settings = self.scenario
        return round(settings.personal.steps * settings.steps) if self.personal is not None else 0

    def _train_shared(self, instruction: Train) -> list[TrainingReport]:
        steps = self.scenario.steps - self._personal_steps
        self.shared.skip_to((instruction.start.round - 1) * steps)
        return self.shared.train(steps, instruction.begin, instruction.end)

    def _train_personal(self, learner: Learner, instruction: Train, is_first: Tensor) -> list[TrainingReport]:
        """Train second policies; in its client's first round [K, 1] one begins where the shared one did."""
        anchor = torch.where(is_first, self.shared.anchor, learner.parameters)
        learner.parameters.copy_(anchor)
        anchor[:, self.columns] = self.shared.anchor[:, self.columns]
        learner.skip_to((instruction.start.round - 1) * self._personal_steps)
        return learner.train(self._personal_steps, instruction.begin, instruction.end, anchor)

    def _train_twins(self, learner: Learner, instruction: Train, is_first: Tensor) -> list[TrainingReport]:
        """Train twins on all of a round's steps; in its client's first round [K, 1] one begins where that one did."""
        learner.parameters.copy_(torch.where(is_first, self.shared.anchor, learner.parameters))
        learner.skip_to((instruction.start.round - 1) * self.scenario.steps)
        return learner.train(self.scenario.steps, instruction.begin, instruction.end)

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
        """What one client must remember of its policies."""
        return self.shared.state(row) | join_states({part: each.state(row) for part, each in self._others.items()})

    def close(self) -> None:
        """Close the environments."""
        for learner in (self.shared, *self._others.values()):
            learner.close()
