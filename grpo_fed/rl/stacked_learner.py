"""A fleet: K clients with equally shaped policies, trained as one stacked computation.

`Fleet.train` is the loop that the rest of the library serves: collect, judge, update. Every client draws from its own
random streams, so what it becomes does not depend on who else is in the fleet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import Policy
from grpo_fed.policy.groups import cut_groups
from grpo_fed.policy.make import make_policy
from grpo_fed.rl.adam import Adam
from grpo_fed.rl.advantages import learning_targets, similarity_groups
from grpo_fed.rl.batch import make_batch
from grpo_fed.rl.device import resolve_device
from grpo_fed.rl.evaluation import EvaluatedClients, Evaluation, evaluate
from grpo_fed.rl.memory import keep_freed_memory
from grpo_fed.rl.normalise import ObservationNormaliser, RewardNormaliser
from grpo_fed.rl.rng import Purpose, client_seed, env_seeds, generator
from grpo_fed.rl.rollout import Actor, Collector, Episode, Trajectories
from grpo_fed.rl.trust_region import trust_budgets
from grpo_fed.rl.update import ClientStack, update_clients
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import ClientEnvs, EnvCache, episode_step_limit, make_client_envs
from grpo_fed.tasks.gym import find_env_spec
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import group_by_policy_shape, resolve_tasks
from grpo_fed.tasks.task import Task

CHUNK = 16
"""Clients in one stack on a CPU: larger ones leave the cache."""


@dataclass(frozen=True)
class TrainingReport:
    """What one client did in one call of `train`."""

    client: str
    steps: int
    """Environment steps."""
    episodes: tuple[Episode, ...]
    """Those that finished."""
    losses: Mapping[str, float]
    """Means over the updates."""


class DivergedError(RuntimeError):
    """A client's parameters are no longer numbers."""


class StackedLearner:
    """K clients as rows of the same tensors."""

    def __init__(
        self,
        tasks: Sequence[GymTask],
        scenario: Scenario,
        seeds: Sequence[int] | None = None,
        shared: Tensor | None = None,
        squared: float | None = None,
        shed: EnvCache | None = None,
    ) -> None:
        """`seeds` name the clients' random streams; by default they come from the scenario's seed and the names.

        `shared` [S] int64 are the columns that clients share, by default those of all blocks that may be shared, and
        `squared` is how these are drawn to where the round began, by default `penalty.squared`. In the shed it finds
        environments to train on, and leaves them there when it is closed.
        """
        keep_freed_memory()
        self.scenario = scenario
        self.tasks = tuple(tasks)
        self.names = [task.client for task in tasks]
        drawn = (client_seed(scenario.seed, name) for name in self.names)
        self.seeds = list(drawn if seeds is None else seeds)
        self.device = resolve_device(scenario.device)
        self.policy = make_policy(self.tasks[0], scenario.policy)
        layout = self.policy.layout
        self.shared = layout.mask(layout.shared).nonzero().squeeze(1) if shared is None else shared
        self.proximal_weight = scenario.penalty.squared if squared is None else squared
        self._env_cache = shed
        self._make_tensors()
        self._make_envs()
        self._evaluation_envs: ClientEnvs | None = None
        self.max_episode_steps = episode_step_limits(self.tasks, scenario)
        self.stacks = list(self._stacks())
        self.steps_done = np.zeros(len(tasks), np.int64)
        self.steps_due = np.zeros(len(tasks), np.int64)
        self.updates_done = np.zeros(len(tasks), np.int64)
        self.measurement_states = [np.zeros((0, self.policy.observation_size), np.float32) for _ in tasks]
        """Of each client some states of its last batch, [n, D] as its policy sees them, to measure its steps on."""

    def train(
        self, steps: int, begin: float = 0.0, end: float = 0.0, anchor: Tensor | None = None
    ) -> list[TrainingReport]:
        """Every client learns from `steps` more steps of its task; schedules go from progress `begin` to `end`.

        `anchor` [K, P] is what penalties and KL hold a client to; by default where it stands.
        """
        self.anchor.copy_(self.parameters if anchor is None else anchor)
        self.steps_due += steps
        notes = [_Progress() for _ in self.tasks]
        while (behind := self.steps_done < self.steps_due).any():
            progress = begin + (end - begin) * (1 - (self.steps_due - self.steps_done).clip(0) / steps)
            trajectories, groups = self._collect(behind)
            for stack in self.stacks:
                rows = stack.rows
                if not behind[rows].any():
                    continue
                batch = make_batch(self.policy, stack.views, trajectories, rows, critic=groups is None)
                longest = torch.from_numpy(self.max_episode_steps[rows]).to(self.device)
                judged = learning_targets(batch, None if groups is None else groups[rows], longest, self.scenario)
                active = None if behind[rows].all() else torch.from_numpy(behind[rows]).to(self.device)
                losses = update_clients(stack, batch, judged, active, self.updates_done[rows], progress[rows])
                for client in np.flatnonzero(behind[rows]):
                    notes[rows.start + client].losses.append(losses.client(int(client)))
            for client in np.flatnonzero(behind):
                notes[client].steps += int(trajectories.steps[client])
                notes[client].episodes.extend(trajectories.episodes[client])
                notes[client].last = trajectories
            self._refuse_divergence()
            # a segment is as long for all, with the steps that a lane may need to reset itself: were these not counted,
            # the other clients' environments would be stepped on while they wait for this one
            counted = trajectories.valid[0].size if groups is None else trajectories.steps
            self.steps_done += np.where(behind, counted, 0)
            self.updates_done += behind
        self._keep_states([note.last for note in notes])
        return [note.report(name) for note, name in zip(notes, self.names, strict=True)]

    def evaluate(self, episodes: int | None = None, deterministic: bool = True, number: int = 0) -> list[Evaluation]:
        """Every client plays without learning; the `number`-th call has its own episodes, the same for any policy."""
        settings = self.scenario.evaluate
        if self._evaluation_envs is None:
            self._evaluation_envs = self._training_envs(self.scenario.rollout.num_envs)
        return evaluate(
            Actor(self.policy, self.parameters),
            self._evaluation_envs,
            EvaluatedClients(self.names, self.seeds, self.observation_normaliser),
            episodes or settings.episodes,
            settings.step_limit,
            deterministic,
            number,
        )

    def skip_to(self, steps: int) -> None:
        """Owe what every client does that was given so many steps in all, whether it was there or not.

        Batches seldom come out even with the steps of a round, and what is over goes on to the next. Where a batch is
        as long for all, clients so stay in step, and nobody's environments wait for another's.
        """
        if self.scenario.objective.advantage == "gae":
            samples = self.scenario.rollout.num_envs * self.scenario.rollout.horizon
            self.steps_due[:] = steps
            self.steps_done[:] = -(-steps // samples) * samples

    def state(self, client: int) -> dict[str, np.ndarray]:
        """All that one client must remember to go on, bit for bit, in another process."""
        arrays = {
            "parameters": self.parameters[client].cpu().numpy(),
            "adam.mean": self.adam.mean[client].cpu().numpy(),
            "adam.square": self.adam.square[client].cpu().numpy(),
            "adam.count": self.adam.count[client],
            "kl_coefficient": self.kl_coefficient[client, None].cpu().numpy(),
            "kl_limit": self.kl_limit[client, None].cpu().numpy(),
            "progress": np.array([self.steps_done[client], self.updates_done[client], self.steps_due[client]]),
        }
        if self.turns:
            arrays["adam.turns"] = np.array([adam.count[client, 0] for adam in self.turns])
        if self._keeps_states:
            arrays["kept"] = self.measurement_states[client]
        parts = {"rollout": self.collector.state(client)}
        if self.observation_normaliser is not None:
            parts["observation_normaliser"] = self.observation_normaliser.state(client)
        if self.collector.reward_normaliser is not None:
            parts["reward_normaliser"] = self.collector.reward_normaliser.state(client)
        named = {f"{part}.{name}": array for part, state in parts.items() for name, array in state.items()}
        return {name: np.array(array) for name, array in (arrays | named).items()}

    def load(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Go on where `state` of every client was, some of which may not have stepped yet."""
        for client, state in enumerate(states):
            for row, name in (
                (self.parameters, "parameters"),
                (self.adam.mean, "adam.mean"),
                (self.adam.square, "adam.square"),
                (self.kl_coefficient[:, None], "kl_coefficient"),
                (self.kl_limit[:, None], "kl_limit"),
            ):
                row[client] = torch.from_numpy(state[name])
            self.adam.count[client] = state["adam.count"]
            self.steps_done[client], self.updates_done[client], self.steps_due[client] = state["progress"].tolist()
            for adam, count in zip(self.turns, state.get("adam.turns", ()), strict=True):
                adam.count[client] = count
            if self._keeps_states:
                self.measurement_states[client] = state["kept"]
            if self.observation_normaliser is not None:
                self.observation_normaliser.load(client, sub_state(state, "observation_normaliser"))
            if self.collector.reward_normaliser is not None:
                self.collector.reward_normaliser.load(client, sub_state(state, "reward_normaliser"))
        first = self._env_seeds(Purpose.EPISODES, [0] * len(self.tasks))
        self.collector.load([sub_state(state, "rollout") for state in states], first)

    def client_parameters(self, client: int) -> dict[str, Tensor]:
        """One client's parameters by name, copied to the CPU."""
        return {name: value[client].cpu().clone() for name, value in self.policy.layout.views(self.parameters).items()}

    def close(self) -> None:
        """Close the environments."""
        self.collector.envs.close()
        if self._evaluation_envs is not None:
            self._evaluation_envs.close()

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

    @property
    def _keeps_states(self) -> bool:
        """Whether anybody is going to measure on them."""
        return self.scenario.proximity.mode != "off" or self.scenario.merge.rule == "fisher"

    def _keep_states(self, last: Sequence[Trajectories | None]) -> None:
        """Some of each client's last batch, drawn from its own stream."""
        for client, lived in enumerate(last):
            if lived is None or not self._keeps_states:
                continue
            states = lived.observations[client][lived.valid[client]]
            draws = generator(self.seeds[client], Purpose.STATES, int(self.updates_done[client]))
            count = min(self.scenario.proximity.states, len(states))
            self.measurement_states[client] = states[draws.choice(len(states), count, replace=False)]

    def _collect(self, behind: np.ndarray) -> tuple[Trajectories, Tensor | None]:
        """A batch of trajectories, and with whole episodes the group [K, E] of each."""
        settings = self.scenario.rollout
        actor = Actor(self.policy, self.parameters)
        if self.scenario.objective.advantage == "gae":
            if self.collector.observations is None:
                self.collector.begin(self._env_seeds(Purpose.EPISODES, [0] * len(self.tasks)))
            return self.collector.collect_steps(actor, settings.horizon, self.updates_done), None
        seeds = self._group_seeds()
        trajectories = self.collector.collect_episodes(actor, self.max_episode_steps, self.updates_done, seeds, behind)
        return trajectories, self._groups(trajectories)

    def _groups(self, trajectories: Trajectories) -> Tensor:
        """[K, N]: the group of each copy's episode."""
        settings, (clients, copies) = self.scenario.group, self.collector.shape
        if settings.by == "task":
            groups = np.zeros((clients, copies), np.int64)
        elif settings.by == "start":
            groups = np.broadcast_to(np.arange(copies) // settings.size, (clients, copies)).copy()
        elif settings.by == "context":
            keys = self.collector.envs.reset_infos(settings.key).reshape(clients, copies)
            groups = np.stack([np.unique(row, return_inverse=True)[1] for row in keys])
        else:
            first = torch.from_numpy(np.ascontiguousarray(trajectories.observations[:, 0])).to(self.device)
            with torch.no_grad():
                features = self.policy.features(self.policy.layout.views(self.parameters), first).cpu()
            found = [
                similarity_groups(one, settings.clusters, generator(seed, Purpose.CLUSTERS, int(number)))
                for one, seed, number in zip(features, self.seeds, self.updates_done, strict=True)
            ]
            return torch.stack(found).to(self.device)
        return torch.from_numpy(groups).to(self.device)

    def _group_seeds(self) -> np.ndarray:
        """[L]: new episodes for every copy; those of one group begin alike where groups are made by start."""
        if self.scenario.group.by != "start":
            return self._env_seeds(Purpose.EPISODES, self.updates_done)
        size, copies = self.scenario.group.size, self.collector.shape[1]
        seeds = [
            env_seeds(seed, Purpose.EPISODES, copies // size, int(number)).repeat(size)
            for seed, number in zip(self.seeds, self.updates_done, strict=True)
        ]
        return np.concatenate(seeds)

    def _env_seeds(self, purpose: Purpose, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        copies = self.collector.shape[1]
        pairs = zip(self.seeds, numbers, strict=True)
        return np.concatenate([env_seeds(seed, purpose, copies, int(number)) for seed, number in pairs])

    def _training_envs(self, copies: int, shed: EnvCache | None = None) -> ClientEnvs:
        return make_client_envs(
            self.tasks, copies, self.scenario.policy.squash, self.scenario.rollout.episode_limit, shed
        )

    def _make_envs(self) -> None:
        settings, (clients, size) = self.scenario, (len(self.tasks), self.policy.observation_size)
        lanes = self._training_envs(settings.rollout.num_envs, self._env_cache)
        if settings.objective.advantage == "group" and settings.group.by == "start" and not lanes.reproducible:
            task = next(task for task in self.tasks if find_env_spec(task).entry_point is None)
            raise ValueError(
                f'client {task.client}: group.by = "start" needs episodes that begin as they are told, and {task.env}'
                " resets itself: set another group.by, or give its vector environment AutoresetMode.DISABLED"
            )
        scale = settings.normalise
        self.observation_normaliser = ObservationNormaliser(clients, size, scale.clip) if scale.observations else None
        reward_normaliser = None
        if scale.rewards:
            copies, gamma = settings.rollout.num_envs, settings.objective.gamma
            reward_normaliser = RewardNormaliser(clients, copies, gamma, scale.clip)
        self.collector = Collector(
            lanes, self.names, self.seeds, self.policy.distribution, self.observation_normaliser, reward_normaliser
        )

    def _make_tensors(self) -> None:
        """Parameters, moments and weights of all clients, [K, ...]."""
        settings = self.scenario
        self.parameters = first_parameters(self.policy, settings, self.seeds).to(self.device)
        self.anchor = self.parameters.clone()
        clients, size = self.parameters.shape
        self.adam = Adam.start(clients, size, settings.objective.adam_epsilon, self.device)
        is_shared = torch.zeros(size, dtype=torch.bool).index_fill_(0, self.shared.cpu(), True).to(self.device)
        self.pull = is_shared * self.proximal_weight if self.proximal_weight else None
        self.turns: tuple[Adam, ...] = ()
        """With `personal.first`: of private and of shared blocks."""
        if settings.personal.first:
            parts = (~is_shared, is_shared)
            self.turns = tuple(self.adam.for_columns(part.nonzero().squeeze(1)) for part in parts)
        self.kl_coefficient = torch.full((clients,), settings.trust.coefficient, device=self.device)
        self.kl_limit = torch.full((clients,), settings.trust.target, device=self.device)

    def _stacks(self) -> Iterator[ClientStack]:
        """The clients in chunks that fit the cache; on a GPU, all together."""
        settings, layout = self.scenario, self.policy.layout
        try:
            chosen = layout.select(settings.penalty.blocks, "penalty.blocks")
            groups = cut_groups(layout, settings.policy.groups, only=chosen).to(self.device)
            budgets = trust_budgets(layout, settings.trust.blocks)
        except ValueError as error:
            raise ValueError(f"client {self.names[0]} ({self.tasks[0].env}): {error}") from error
        chunk = CHUNK if self.device.type == "cpu" else len(self.tasks)
        for start in range(0, len(self.tasks), chunk):
            rows = slice(start, min(start + chunk, len(self.tasks)))
            tasks = self.tasks[rows]
            yield ClientStack(
                policy=self.policy,
                scenario=settings,
                rows=rows,
                seeds=self.seeds[rows],
                parameters=self.parameters[rows],
                views=layout.views(self.parameters[rows]),
                gradient=(gradient := torch.zeros_like(self.parameters[rows])),
                gradient_views=layout.views(gradient),
                anchor=self.anchor[rows],
                adam=self.adam.rows(rows),
                learning_rate=np.array([[task.learning_rate] for task in tasks]),
                entropy=torch.stack([entropy_weights(task, self.policy, settings) for task in tasks]).to(self.device),
                penalty=torch.tensor([[task.penalty] for task in tasks]).to(self.device),
                kl_coefficient=self.kl_coefficient[rows],
                kl_limit=self.kl_limit[rows],
                groups=groups,
                budgets=budgets,
                proximal_weight=self.pull,
                phase_optimisers=tuple(adam.rows(rows) for adam in self.turns),
            )


@dataclass
class _Progress:
    """What is written down about a client while it trains."""

    steps: int = 0
    episodes: list[Episode] = field(default_factory=list)
    losses: list[Mapping[str, float]] = field(default_factory=list)
    last: Trajectories | None = None

    def report(self, client: str) -> TrainingReport:
        names = self.losses[0] if self.losses else {}
        means = {name: float(np.mean([loss[name] for loss in self.losses])) for name in names}
        return TrainingReport(client, self.steps, tuple(self.episodes), means)


def sub_state(state: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays of one part of a client's state."""
    return {key.removeprefix(f"{name}."): array for key, array in state.items() if key.startswith(f"{name}.")}


def first_parameters(policy: Policy, scenario: Scenario, seeds: Sequence[int]) -> Tensor:
    """[K, P]: where clients with these seeds begin."""
    starts = [scenario.seed if scenario.policy.same_start else seed for seed in seeds]
    drawn = {start: policy.initial(start) for start in dict.fromkeys(starts)}
    return torch.stack([drawn[start] for start in starts])


def episode_step_limits(tasks: Sequence[GymTask], scenario: Scenario) -> np.ndarray:
    """[K]: steps that an episode of each client may have; 0 for a client whose episodes nothing cuts."""
    limits = [episode_step_limit(task, scenario.rollout.episode_limit) for task in tasks]
    settings = scenario.objective
    if 0 in limits and (settings.advantage == "group" or settings.average == "total"):
        task = tasks[limits.index(0)]
        why = (
            'advantage = "group" needs whole ones'
            if settings.advantage == "group"
            else 'average = "total" needs a limit'
        )
        raise ValueError(
            f"client {task.client}: {task.env} may never end an episode, and objective.{why}: set rollout.episode_limit"
        )
    return np.array(limits)


def entropy_weights(task: Task, policy: Policy, scenario: Scenario) -> Tensor:
    """[C]: the weight of each action component's entropy for one client."""
    settings = scenario.objective
    components = policy.distribution.components
    weights = torch.full((components,), task.entropy)
    for name, members in settings.entropy_groups.items():
        beyond = [member for member in members if not 0 <= member < components]
        if beyond:
            raise ValueError(
                f"client {task.client}: objective.entropy_groups.{name} = {members}: {task.description} has action"
                f" components 0 to {components - 1}; leave out {beyond}"
            )
        if name in settings.entropy_weights:
            weights[members] = settings.entropy_weights[name]
    return weights


def make_learners(scenario: Scenario) -> list[StackedLearner]:
    """The scenario's clients, those with equally shaped policies together."""
    return [
        StackedLearner(tasks, scenario) for tasks in group_by_policy_shape(resolve_tasks(scenario), scenario.policy)
    ]
