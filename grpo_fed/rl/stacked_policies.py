"""The policies of clients with equally shaped networks, evaluated and measured as one stacked computation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.rl.actor import Actor
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.evaluation import EvaluatedClients, evaluate
from grpo_fed.rl.learner import (
    ADAPTED,
    PERSONAL,
    TWIN,
    ClientPolicies,
    Role,
    State,
    plain_updates,
    sub_state,
    without_sharing,
)
from grpo_fed.rl.measurement import MeasurementStates, mean_kl
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.records import Evaluation, Example
from grpo_fed.rl.rng import Purpose, client_seed
from grpo_fed.rl.scenario_envs import make_scenario_envs
from grpo_fed.rl.stacked_learner import (
    MEASUREMENT_STATES,
    OBSERVATION_NORMALISER,
    REWARD_NORMALISER,
    StackedLearner,
)
from grpo_fed.rl.start import client_starts, first_parameters, load_first_moments, place_starts
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.curriculum import uniform_curriculum
from grpo_fed.tasks.envs import ClientEnvs, EnvCache
from grpo_fed.tasks.gym_task import GymTask

MOST_BATCHES = 1000
"""More sets of episodes than are ever played to compare policies in a round."""


@final
class StackedPolicies(ClientPolicies):
    """Policies of clients as rows of one tensor, with environments that are used again when the clients change."""

    policy: StackedPolicy

    def __init__(self, tasks: Sequence[GymTask], scenario: Scenario, shared_blocks: SharedBlocks) -> None:
        """Take the clients of these tasks, whose policies have the shape of the first one's."""
        self.scenario = scenario
        self.tasks = {task.client: task for task in tasks}
        self.policy = make_policy(tasks[0], scenario.policy)
        self.device = resolve_device(scenario.device)
        self.columns = shared_blocks.columns_in(self.policy.layout).to(self.device)
        self._env_caches = {purpose: EnvCache() for purpose in ("train", PERSONAL, TWIN, ADAPTED, "evaluate")}
        """Idle environments: some take long to be made."""
        self._evaluation_envs: tuple[list[GymTask], ClientEnvs] | None = None
        """The tasks that were evaluated last, and their environments."""

    def make_learner(self, clients: Sequence[str], round: int = 1, role: Role = "shared") -> StackedLearner:
        """A learner of some clients in the tasks of a round, which begin with their first parameters."""
        tasks = [self.tasks[name].at(round) for name in clients]
        if role == "shared":
            return StackedLearner(tasks, self.scenario, None, self.columns, None, self._env_caches["train"])
        part = PERSONAL if role == "personal" else TWIN
        seeds, env_cache = self._seeds([f"{name} {part}" for name in clients]), self._env_caches[part]
        if role == "personal":
            pull = self.scenario.personal.pull
            return StackedLearner(tasks, self.scenario, seeds, self.columns, pull, env_cache)
        scenario, tasks = without_sharing(self.scenario, tasks)
        return StackedLearner(tasks, scenario, seeds, self.columns, 0.0, env_cache)

    def make_adapting_learner(
        self, clients: Sequence[str], parameters: Tensor, states: Sequence[State | None], round: int
    ) -> StackedLearner:
        """A learner that begins with copies of these policies [K, P]; running episodes are not taken over."""
        learner = StackedLearner(
            [_with_all_levels(self.tasks[name].at(round)) for name in clients],
            plain_updates(self.scenario),
            self._seeds([f"{name} {ADAPTED}" for name in clients]),
            self.columns,
            env_cache=self._env_caches[ADAPTED],
        )
        learner.parameters.copy_(parameters)
        normaliser, rewards = learner.observation_normaliser, learner.collector.reward_normaliser
        for row, state in enumerate(states):
            if state is not None:
                learner.load_constraints(row, state)
            if state is not None and normaliser is not None:
                normaliser.load(row, sub_state(state, OBSERVATION_NORMALISER))
            if state is not None and rewards is not None:
                own = sub_state(state, REWARD_NORMALISER)
                rewards.load(row, {**own, "returns": np.zeros_like(own["returns"])})
        return learner

    def parameters(self, clients: Sequence[str], states: Sequence[State | None]) -> Tensor:
        """The policies in these states, [K, P]; a client's first parameters where it has no state."""
        fresh = [name for name, state in zip(clients, states, strict=True) if state is None]
        first = iter(self._first_parameters(fresh) if fresh else ())
        rows = [next(first) if state is None else torch.from_numpy(np.array(state["parameters"])) for state in states]
        return torch.stack(rows).to(self.device)

    def evaluate(
        self,
        clients: Sequence[str],
        parameters: Tensor,
        states: Sequence[State | None],
        number: int,
        deterministic: bool,
        compared: int = 0,
        batch: int = 0,
    ) -> list[Evaluation]:
        """Play `evaluate.episodes` episodes of every client without learning."""
        settings = self.scenario.evaluate
        return evaluate(
            Actor(self.policy, parameters),
            self._envs_for([self.tasks[name].at(number) for name in clients]),
            EvaluatedClients(clients, self._seeds(clients), self._normaliser(clients, states)),
            compared or settings.episodes,
            settings.step_limit,
            deterministic,
            number * MOST_BATCHES + batch if compared else number,
            Purpose.COMPARISON if compared else Purpose.EVALUATION,
        )

    def can_measure(self, state: State) -> bool:
        """Whether a state has observations of its last batch."""
        return len(state.get(MEASUREMENT_STATES, ())) > 0

    def measure_kl(self, states: Sequence[State], old: Tensor, new: Iterable[Tensor]) -> Tensor:
        """The mean KL(old, new) on each client's measurement states, [K, P], M of [K, P] -> [M, K]."""
        observations = MeasurementStates.of([state[MEASUREMENT_STATES] for state in states], self.device)
        return mean_kl(self.policy, observations, old, new)

    def observation_moments(self, client: str, state: State | None) -> State | None:
        """The moments that a policy's observations are normalised with, as arrays; None without them."""
        normaliser = self._normaliser([client], [state])
        return None if normaliser is None else normaliser.state(0)

    def examples(self, client: str, parameters: Tensor) -> Sequence[Example]:
        """None: the run's films show episodes."""
        return ()

    def close(self) -> None:
        """Close the environments."""
        if self._evaluation_envs is not None:
            self._evaluation_envs[1].close()
            self._evaluation_envs = None
        for env_cache in self._env_caches.values():
            env_cache.close()

    def _seeds(self, names: Sequence[str]) -> list[int]:
        return [client_seed(self.scenario.seed, name) for name in names]

    def _first_parameters(self, clients: Sequence[str]) -> Tensor:
        """The parameters that these clients begin with, [K, P]."""
        starts = client_starts(self.scenario, clients, self.policy, self.columns)
        return place_starts(self.policy, first_parameters(self.policy, self.scenario, self._seeds(clients)), starts)

    def _envs_for(self, tasks: list[GymTask]) -> ClientEnvs:
        """Environments to evaluate on; the last ones if they are of these tasks."""
        if self._evaluation_envs is None or self._evaluation_envs[0] != tasks:
            previous, self._evaluation_envs = self._evaluation_envs, None
            if previous is not None:
                previous[1].close()
            self._evaluation_envs = tasks, make_scenario_envs(tasks, self.scenario, self._env_caches["evaluate"])
        return self._evaluation_envs[1]

    def _normaliser(self, clients: Sequence[str], states: Sequence[State | None]) -> ObservationNormaliser | None:
        settings = self.scenario.normalise
        if not settings.observations:
            return None
        normaliser = ObservationNormaliser(len(states), self.policy.observation_size, settings.clip)
        for row, (client, state) in enumerate(zip(clients, states, strict=True)):
            if state is not None:
                normaliser.load(row, sub_state(state, OBSERVATION_NORMALISER))
            else:
                (start,) = client_starts(self.scenario, [client], self.policy, self.columns)
                load_first_moments(normaliser, {row: start})
        return normaliser


def _with_all_levels(task: GymTask) -> GymTask:
    """The task with levels from all ranges alike, as it is when a policy is adapted to it."""
    return replace(task, curriculum=None if task.curriculum is None else uniform_curriculum(task.curriculum))
