"""K clients with equally shaped policies, trained as one stacked computation.

`StackedLearner.train` is the loop that the rest of the room serves: collect, judge, update. Every client draws from its
own random streams, so what it learns does not depend on the other clients of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.policy.make import make_policy
from grpo_fed.rl.actor import Actor
from grpo_fed.rl.advantages import learning_targets
from grpo_fed.rl.batch import make_batch
from grpo_fed.rl.client_stack import (
    BEGINS_LATE,
    COST_CRITIC,
    COST_MULTIPLIER,
    ENTROPY_WEIGHTS,
    ClientStack,
    ClientTensors,
    PenaltyGroups,
    entropy_weights,
    make_client_stack,
    own_learning_rates,
)
from grpo_fed.rl.constraints import adapt_costs
from grpo_fed.rl.cost_critic import CostCritic
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.episode_groups import episode_seeds, group_episodes
from grpo_fed.rl.evaluation import EvaluatedClients, evaluate
from grpo_fed.rl.learner import Learner, State, join_states, sub_state
from grpo_fed.rl.levels import ClientLevels
from grpo_fed.rl.measurement import MeasurementStates, fisher_diagonal, measures_steps
from grpo_fed.rl.memory import keep_freed_memory
from grpo_fed.rl.records import Evaluation, TrainingReport
from grpo_fed.rl.rng import Purpose, client_seed, env_seeds, generator
from grpo_fed.rl.rollback import BeforeUpdate, Rollback
from grpo_fed.rl.scenario_envs import episode_step_limits, make_collector, make_scenario_envs
from grpo_fed.rl.start import (
    client_starts,
    first_parameters,
    first_parameters_in_federation,
    load_first_moments,
    place_starts,
    refers_to_start,
)
from grpo_fed.rl.training_record import TrainingRecord
from grpo_fed.rl.trajectories import Trajectories
from grpo_fed.rl.update import measure_penalty, update_clients
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import ClientEnvs, EnvCache
from grpo_fed.tasks.gym_task import GymTask

CHUNK = 16
"""Clients in one stack on a CPU: larger ones leave the cache."""
MEASUREMENT_STATES = "measurement_states"
CURRICULUM = "curriculum"
OBSERVATION_NORMALISER, REWARD_NORMALISER = "observation_normaliser", "reward_normaliser"
"""Names in a client's state of an array and of parts that are read without a learner."""

Rows: TypeAlias = Tensor | np.ndarray | list[np.ndarray]
"""Something with one row for each client."""


class DivergedError(RuntimeError):
    """Raised when a client's parameters are no longer finite."""


@final
class StackedLearner(Learner):
    """Trains K clients as rows of the same tensors."""

    levels: ClientLevels

    def __init__(
        self,
        tasks: Sequence[GymTask],
        scenario: Scenario,
        seeds: Sequence[int] | None = None,
        shared: Tensor | None = None,
        proximal_weight: float | None = None,
        env_cache: EnvCache | None = None,
    ) -> None:
        """Make the clients' first policies and their environments.

        tasks: of clients with equally shaped policies, as they are in one round.
        seeds: name the clients' random streams; by default they follow from the scenario's seed and the names.
        shared: [S] int64, the columns that clients share; by default those of all blocks that may be shared.
        proximal_weight: how strongly these are pulled to the anchor; by default `penalty.squared`.
        env_cache: environments to train on are taken from it, and returned to it when the learner is closed.
        """
        keep_freed_memory()
        self.scenario = scenario
        self.tasks: Sequence[GymTask] = tuple(tasks)
        self.names = [task.client for task in tasks]
        self.seeds = [client_seed(scenario.seed, name) for name in self.names] if seeds is None else list(seeds)
        self.device = resolve_device(scenario.device)
        self.policy: StackedPolicy = make_policy(self.tasks[0], scenario.policy)
        self.max_episode_steps = episode_step_limits(self.tasks, scenario)
        layout, starts = self.policy.layout, client_starts(scenario, self.names, self.policy, shared)
        self._tensors = ClientTensors.start(
            place_starts(self.policy, first_parameters(self.policy, scenario, self.seeds), starts).to(self.device),
            scenario,
            layout.mask(layout.shared).nonzero().squeeze(1) if shared is None else shared,
            scenario.penalty.squared if proximal_weight is None else proximal_weight,
            entropy_weights(self.tasks, self.policy.distribution.components, scenario),
            layout.frozen,
        )
        self.parameters, self.anchor = self._tensors.parameters, self._tensors.anchor
        self.drift, self.optimiser_steps = self._tensors.drift, self._tensors.adam.count
        self.cost_critic = self._make_cost_critic()
        self.stacks = self._make_stacks(shared)
        self.collector = make_collector(self.tasks, self.seeds, self.policy, scenario, env_cache)
        self.levels = ClientLevels(self.tasks, self.seeds, scenario, self.collector)
        self.observation_normaliser = self.collector.observation_normaliser
        load_first_moments(self.observation_normaliser, dict(enumerate(starts)))
        self.evaluated = EvaluatedClients(self.names, self.seeds, self.observation_normaliser)
        self.rollback = None
        if scenario.trust.rollback is not None:
            self.rollback = Rollback(scenario, self.tasks, self.policy, self.evaluated, self._tensors)
        counts = np.zeros((len(tasks), 3), np.int64)
        self.steps_done, self.updates_done, self.steps_due = counts.T
        """[K] each: a batch may take a client beyond the steps that are due, and the next round has less to do then."""
        self.measurement_states = [np.zeros((0, self.policy.input_size), self.collector.observation_dtype)] * len(tasks)
        """For each client observations of its last batch, [n, D] as its policy saw them, to measure server steps on."""
        self._state_arrays: Mapping[str, Rows] = {
            "parameters": self.parameters,
            "adam.mean": self._tensors.adam.mean,
            "adam.square": self._tensors.adam.square,
            "adam.count": self._tensors.adam.count,
            "kl_coefficient": self._tensors.kl_coefficient[:, None],
            "kl_limit": self._tensors.kl_limit[:, None],
            "progress": counts,
            **({"adam.turns": self._tensors.phase_counts} if scenario.personal.first else {}),
            **({ENTROPY_WEIGHTS: self._tensors.entropy} if scenario.objective.entropy_target is not None else {}),
            **self._cost_arrays(),
            **({MEASUREMENT_STATES: self.measurement_states} if measures_steps(scenario) else {}),
        }
        """A client's state is its row of each, and the states of its environments and normalisers."""
        normalisers = {
            OBSERVATION_NORMALISER: self.collector.observation_normaliser,
            REWARD_NORMALISER: self.collector.reward_normaliser,
        }
        self._normalisers = {name: normaliser for name, normaliser in normalisers.items() if normaliser is not None}
        self._evaluation_envs: ClientEnvs | None = None

    def train(
        self, steps: int, begin: float = 0.0, end: float = 0.0, anchor: Tensor | None = None
    ) -> list[TrainingReport]:
        """Train every client on `steps` more steps of its task; schedules go from progress `begin` to `end`."""
        self.anchor.copy_(self.parameters if anchor is None else anchor)
        self.steps_due += steps
        records = [TrainingRecord() for _ in self.tasks]
        if self.levels.curricula:
            self._begin_episodes()
            self.levels.begin_round(self.updates_done, begin)
        while (behind := self.steps_done < self.steps_due).any():
            progress = begin + (end - begin) * (1 - (self.steps_due - self.steps_done).clip(0) / steps)
            trajectories, groups = self.collect(behind)
            if self.scenario.objective.cost.limit is not None:
                multiplier, settings = self._tensors.cost_multiplier, self.scenario.objective.cost
                adapt_costs(multiplier, trajectories.episodes, behind, settings)
            before = None if self.rollback is None else BeforeUpdate.of(self._tensors)
            for stack in self.stacks:
                rows = stack.rows
                if not behind[rows].any():
                    continue
                batch = make_batch(
                    self.policy, stack.views, trajectories, rows, groups is None, cost_critic=stack.cost_critic
                )
                longest = torch.from_numpy(self.max_episode_steps[rows]).to(self.device)
                of_stack = None if groups is None else groups[rows]
                targets = learning_targets(batch, of_stack, longest, self.scenario, stack.cost_multiplier)
                self.levels.observe_errors(rows, behind[rows], batch, targets)
                active = None if behind[rows].all() else torch.from_numpy(behind[rows]).to(self.device)
                losses = update_clients(stack, batch, targets, active, self.updates_done[rows], progress[rows])
                for client in np.flatnonzero(behind[rows]):
                    records[rows.start + client].losses.append(losses.client(int(client)))
                    records[rows.start + client].constraints.append(losses.client_constraints(int(client)))
            for client in np.flatnonzero(behind):
                records[client].steps += int(trajectories.steps[client])
                records[client].episodes.extend(trajectories.episodes[client])
                records[client].trajectories = trajectories
            if self.rollback is not None and before is not None:
                taken_back = self.rollback.take_back(before, behind, self.updates_done)
                for client in np.flatnonzero(behind):
                    records[client].rollbacks.append(bool(taken_back[client]))
            self._refuse_divergence()
            # a segment is as long for all clients, and includes the steps in which an environment only resets itself:
            # were these not counted, other clients' environments would be stepped on while they wait for this one
            counted = trajectories.valid[0].size if groups is None else trajectories.steps
            self.steps_done += np.where(behind, counted, 0)
            self.updates_done += behind
        self._sample_measurement_states([record.trajectories for record in records])
        penalties = [metrics for stack in self.stacks for metrics in measure_penalty(stack)]
        reports = [
            record.report(name, metrics, self.scenario)
            for record, name, metrics in zip(records, self.names, penalties, strict=True)
        ]
        return [
            replace(report, more={**report.more, **self.levels.end_round(row, report.episodes, begin)})
            for row, report in enumerate(reports)
        ]

    def collect(self, behind: np.ndarray) -> tuple[Trajectories, Tensor | None]:
        """Collect a batch of trajectories and, where episodes are judged in groups, the group [K, N] of each.

        behind: [K] bool, the clients that need one; whole episodes are collected for these alone.
        """
        settings, actor = self.scenario, Actor(self.policy, self.parameters)
        copies = settings.rollout.num_envs
        if settings.objective.advantage == "gae":
            self._begin_episodes()
            return self.collector.collect_steps(actor, settings.rollout.horizon, self.updates_done), None
        seeds = episode_seeds(settings.group, self.seeds, copies, self.updates_done)
        trajectories = self.collector.collect_episodes(actor, self.max_episode_steps, self.updates_done, seeds, behind)
        groups = group_episodes(
            settings.group,
            trajectories,
            self.collector.envs,
            self.policy,
            self.parameters,
            self.seeds,
            self.updates_done,
        )
        return trajectories, groups

    def scale_learning_rates(self, factors: np.ndarray) -> None:
        """Multiply the clients' own learning rates by factors [K] from now on."""
        for stack in self.stacks:
            stack.learning_rate[:] = own_learning_rates(self.tasks[stack.rows]) * factors[stack.rows, None]

    def evaluate(self, episodes: int | None = None, deterministic: bool = True, number: int = 0) -> list[Evaluation]:
        """Play episodes of every client without learning.

        episodes: by default `evaluate.episodes`.
        number: names the episodes; these are the same for any policy.
        """
        settings = self.scenario.evaluate
        if self._evaluation_envs is None:
            self._evaluation_envs = make_scenario_envs(self.tasks, self.scenario, None)
        return evaluate(
            Actor(self.policy, self.parameters),
            self._evaluation_envs,
            self.evaluated,
            episodes or settings.episodes,
            settings.step_limit,
            deterministic,
            number,
        )

    def fisher(self, number: int) -> Tensor:
        """The diagonal of each policy's Fisher matrix on the client's measurement states, [K, P]."""
        states = MeasurementStates.of(self.measurement_states, self.device)
        return fisher_diagonal(self.policy, states, self.parameters, self.seeds, number)

    def skip_to(self, steps: int) -> None:
        """Count every client as one that was trained for `steps` steps in all, whether it took part or not.

        Batches of whole episodes have no fixed size: with these, every client goes by the steps that it did.
        """
        if self.scenario.objective.advantage == "gae":
            batch = self.scenario.rollout.num_envs * self.scenario.rollout.horizon
            self.steps_due[:] = steps
            self.steps_done[:] = -(-steps // batch) * batch

    def state(self, row: int) -> dict[str, np.ndarray]:
        """Copies of all that one client needs to go on, bit for bit, in another process."""
        parts: dict[str, State] = {"rollout": self.collector.state(row)}
        parts |= {name: normaliser.state(row) for name, normaliser in self._normalisers.items()}
        arrays = {name: _read_row(rows, row) for name, rows in self._state_arrays.items()}
        arrays |= {CURRICULUM: self.levels.states[row]} if row in self.levels.states else {}
        return {name: np.array(array) for name, array in (arrays | join_states(parts)).items()}

    def load(self, states: Sequence[State]) -> None:
        """Go on from one state for each client, some of which may not have stepped yet."""
        for row, state in enumerate(states):
            for name, rows in self._state_arrays.items():
                if name in state or name not in BEGINS_LATE:
                    _write_row(rows, row, state[name])
            if row in self.levels.states:
                self.levels.states[row] = state[CURRICULUM]
            for name, normaliser in self._normalisers.items():
                normaliser.load(row, sub_state(state, name))
        self.collector.load([sub_state(state, "rollout") for state in states], self._first_streams())

    def load_constraints(self, row: int, state: State) -> None:
        """Go on from the constraints of a client's state alone: for a copy of its policy that is adapted."""
        for name in BEGINS_LATE & self._state_arrays.keys() & state.keys():
            _write_row(self._state_arrays[name], row, state[name])

    def client_parameters(self, client: int) -> dict[str, Tensor]:
        """One client's parameters by name, copied to the CPU."""
        return {name: value[client].cpu().clone() for name, value in self.policy.layout.views(self.parameters).items()}

    def close(self) -> None:
        """Close the environments."""
        self.collector.envs.close()
        if self.rollback is not None:
            self.rollback.close()
        if self._evaluation_envs is not None:
            self._evaluation_envs.close()

    def _make_stacks(self, shared: Tensor | None) -> list[ClientStack]:
        """The clients in chunks that fit the cache; on a GPU, all together."""
        first = self.parameters.clone() if refers_to_start(self.scenario) else None
        if first is not None and shared is not None:
            first = first_parameters_in_federation(self.policy, self.scenario, self.names, shared).to(self.device)
        try:
            groups = PenaltyGroups.resolve(self.policy, self.scenario, self.device)
        except ValueError as error:
            raise ValueError(f"client {self.names[0]} ({self.tasks[0].env}): {error}") from error
        clients = len(self.tasks)
        chunk = CHUNK if self.device.type == "cpu" else clients
        return [
            make_client_stack(
                self.policy,
                self.scenario,
                self.tasks,
                self.seeds,
                self._tensors,
                groups,
                slice(start, min(start + chunk, clients)),
                first,
                self.cost_critic,
            )
            for start in range(0, clients, chunk)
        ]

    def _begin_episodes(self) -> None:
        """Begin the first episodes, unless some run already or every batch begins its own."""
        if self.collector.observations is None and self.scenario.objective.advantage == "gae":
            self.collector.begin(self._first_streams())

    def _make_cost_critic(self) -> CostCritic | None:
        """The critic of the costs; None where these have no limit, and without a critic of returns."""
        objective = self.scenario.objective
        if objective.cost.limit is None or objective.advantage != "gae":
            return None
        return CostCritic.start(self.scenario, self.seeds, self.policy.input_size, self.device)

    def _cost_arrays(self) -> dict[str, Rows]:
        """What a client's state has of a limit on its costs."""
        critic = self.cost_critic
        own = () if critic is None else (critic.parameters, critic.adam.mean, critic.adam.square, critic.adam.count)
        arrays: dict[str, Rows] = dict(zip(COST_CRITIC, own, strict=False))
        if self.scenario.objective.cost.limit is not None:
            arrays[COST_MULTIPLIER] = self._tensors.cost_multiplier[:, None]
        return arrays

    def _first_streams(self) -> np.ndarray:
        """Names of the streams of episodes that the copies begin their tasks with, [K * N] uint64.

        A client's first task has the stream 0, later ones have that of the round in which they began.
        """
        copies, clients = self.scenario.rollout.num_envs, zip(self.seeds, self.tasks, strict=True)
        return np.concatenate([env_seeds(seed, Purpose.EPISODES, copies, task.since) for seed, task in clients])

    def _refuse_divergence(self) -> None:
        if math.isfinite(self.parameters.sum()):  # far cheaper than looking at each
            return
        for task, number, finite in zip(self.tasks, self.updates_done, self.parameters.isfinite().all(1), strict=True):
            if not finite:
                raise DivergedError(
                    f"client {task.client}: its policy is no longer finite after update {number + 1}; lower its"
                    f" learning_rate, which is {task.learning_rate:g}, or objective.max_grad_norm, or set"
                    " normalise.observations or normalise.rewards"
                )

    def _sample_measurement_states(self, batches: Sequence[Trajectories | None]) -> None:
        """Keep some observations of each client's last batch, drawn from its own stream."""
        if not measures_steps(self.scenario):
            return
        for client, batch in enumerate(batches):
            if batch is None:
                continue
            observations = batch.observations[client][batch.valid[client]]
            draws = generator(self.seeds[client], Purpose.STATES, int(self.updates_done[client]))
            count = min(self.scenario.proximity.states, len(observations))
            self.measurement_states[client] = observations[draws.choice(len(observations), count, replace=False)]


def _read_row(rows: Rows, row: int) -> np.ndarray:
    return rows[row].cpu().numpy() if isinstance(rows, Tensor) else rows[row]


def _write_row(rows: Rows, row: int, array: np.ndarray) -> None:
    if isinstance(rows, Tensor):
        rows[row] = torch.from_numpy(array)
    else:
        rows[row] = array
