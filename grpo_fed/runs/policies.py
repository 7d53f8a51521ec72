"""A client's policy on disk: a safetensors file, which is read together with the run's scenario."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from grpo_fed.policy.base import Policy, StackedPolicy
from grpo_fed.policy.language.adapters import AdapterPolicy
from grpo_fed.policy.language.peft_folder import write_peft_folder
from grpo_fed.policy.make import make_policy
from grpo_fed.policy.shared_names import NORMALISER, POLICIES
from grpo_fed.rl.actor import Actor
from grpo_fed.rl.evaluation import EvaluatedClients, evaluate
from grpo_fed.rl.learner import Learner
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.records import Evaluation
from grpo_fed.rl.recurrence import with_memory
from grpo_fed.rl.rng import client_seed
from grpo_fed.rl.scenario_envs import make_scenario_envs
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.runs.adapters import LoadedAdapters, load_adapters_of
from grpo_fed.runs.files import refuse_links, write_atomic
from grpo_fed.runs.folder import SCENARIO, read_scenario
from grpo_fed.runs.played_levels import PlayedLevels
from grpo_fed.scenario.importing import describe_exception
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import closest_match, did_you_mean, shorten
from grpo_fed.tasks.envs import make_action_converter, observation_flattener
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.language_task import LanguageTask
from grpo_fed.tasks.resolve import resolve_tasks
from grpo_fed.tasks.task import Task

TASK_SINCE = "task:since"
"""Name of an array [1]: the round from which the client had the task that the policy was saved with. It is left out for
the task that the client began with."""


def save_policy(
    folder: Path,
    task: Task,
    policy: Policy,
    parameters: Tensor,
    normaliser: Mapping[str, np.ndarray] | None,
    seed: int,
) -> None:
    """Write `folder/policies/<client>.safetensors`: the parameters [P] by name, and the observation normaliser's state.

    Adapters of a language model are written as a PEFT folder `folder/policies/<client>`.

    task: the client's task at the time. normaliser: its arrays, None without one. seed: the scenario's.
    """
    if isinstance(policy, AdapterPolicy):
        assert isinstance(task, LanguageTask)
        (folder / POLICIES).mkdir(exist_ok=True)
        factors = policy.frozen_factors(seed)
        write_peft_folder(folder / POLICIES / task.client, policy, parameters, factors, task.language.model)
        return
    assert isinstance(task, GymTask)
    (folder / POLICIES).mkdir(exist_ok=True)
    _write_network(folder / POLICIES, task, policy, parameters, normaliser)


def write_policy(folder: Path, policy: LoadedPolicy) -> None:
    """Write a loaded policy to `folder/<client>.safetensors`, with the bytes that its run wrote."""
    state = None if policy.normaliser is None else policy.normaliser.state(0)
    _write_network(folder, policy.task, policy.policy, policy.parameters[0], state)


def _write_network(
    folder: Path, task: GymTask, policy: Policy, parameters: Tensor, normaliser: Mapping[str, np.ndarray] | None
) -> None:
    """Write the parameters [P] by name, and the observation normaliser's state."""
    (arrays,) = policy.layout.unstack(parameters[None].cpu())
    for name, value in (normaliser or {}).items():
        arrays[NORMALISER + name] = torch.from_numpy(np.array(value))
    if task.since:
        arrays[TASK_SINCE] = torch.tensor([task.since])
    # metadata of one entry: the order of several would be random, and the file's bytes with it
    write_atomic(folder / f"{task.client}.safetensors", save(arrays, {"env": task.env}))


def save_policies(folder: Path, learner: Learner) -> dict[str, str]:
    """Write the policies of all clients of a learner, except those that diverged.

    Return the clients whose policies could not be saved, with the reason: one of them costs no other's.
    """
    problems: dict[str, str] = {}
    normaliser = learner.observation_normaliser if isinstance(learner, StackedLearner) else None
    for row, parameters in enumerate(learner.parameters):
        try:
            if bool(parameters.isfinite().all()):
                state = None if normaliser is None else normaliser.state(row)
                save_policy(folder, learner.tasks[row], learner.policy, parameters, state, learner.scenario.seed)
        except Exception as error:  # noqa: BLE001, a user's module may fail in any way
            problems[learner.names[row]] = describe_exception(error)
    return problems


@dataclass(frozen=True)
class LoadedPolicy:
    """Holds a client's policy from a run's folder: it maps observations of its environment to actions."""

    scenario: Scenario
    """The run's scenario."""
    task: GymTask
    """The client's task at the time when the policy was saved."""
    first_task: GymTask
    """The task that the client began with."""
    policy: StackedPolicy
    """The network without its parameters."""
    parameters: Tensor
    """[1, P]: the network's parameters."""
    normaliser: ObservationNormaliser | None
    """Normalises observations; None if the scenario does not."""

    def predict(
        self, observation: Any, deterministic: bool = True, generator: np.random.Generator | None = None
    ) -> Any:
        """Choose an action for an observation: the likeliest one, or one that is sampled with `generator`.

        A policy with memory remembers the observations since `forget` was called, or since it was loaded.
        ValueError for a value that is no observation of the environment.
        """
        inputs = self._flatten(observation)
        if self.normaliser is not None:
            inputs = self.normaliser.apply_one(0, inputs)
        begins = self._actor.memory.shape[1] == 0
        outputs = self._actor(with_memory(inputs[None, None], self._actor, begins))
        distribution = self.policy.distribution
        if deterministic:
            action = distribution.mode(outputs)
        else:
            noise = distribution.draw_noise(generator or np.random.default_rng(), (1, 1))
            action = distribution.sample(outputs, noise)
        return self._converter(action[0])[0]

    def forget(self) -> None:
        """Forget what a policy with memory has seen, where another episode begins; others have nothing to forget."""
        self._actor.forget()

    def play(
        self,
        episodes: int | None = None,
        deterministic: bool = True,
        seed: int | None = None,
        levels: PlayedLevels | None = None,
    ) -> Evaluation:
        """Evaluate the policy; with the run's seed and number of episodes this repeats the run's own evaluation.

        levels: of the episodes, over which they are spread; by default all of the task's, as in evaluations.
        """
        settings = self.scenario
        envs = make_scenario_envs([self.task], settings, None)
        seeds = [client_seed(settings.seed if seed is None else seed, self.task.client)]
        clients = EvaluatedClients([self.task.client], seeds, self.normaliser)
        count = settings.evaluate.episodes if episodes is None else episodes
        try:
            if levels is not None:
                copies = range(settings.rollout.num_envs)
                spread = levels.spread(min(len(copies), count))
                envs.set_levels({copy: spread[copy % len(spread)] for copy in copies})
            actor = Actor(self.policy, self.parameters)
            (evaluation,) = evaluate(actor, envs, clients, count, settings.evaluate.step_limit, deterministic)
        finally:
            envs.close()
        return evaluation

    @cached_property
    def _actor(self) -> Actor:
        return Actor(self.policy, self.parameters)

    @cached_property
    def _converter(self) -> Callable[[np.ndarray], Sequence[Any] | np.ndarray]:
        return make_action_converter(self.task, self.scenario.policy.squash)

    @cached_property
    def _flattener(self) -> Callable[[Any], np.ndarray]:
        return observation_flattener(self.task)

    def _flatten(self, observation: Any) -> np.ndarray:
        """Flatten an observation to [D] float32; ValueError if it is none of the task."""
        space, prefix = self.task.observation_space, f"client {self.task.client}: {self.task.env}"
        try:
            flat = self._flattener(observation)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise ValueError(f"{prefix}: {observation!r} is no observation from {space}: {error}") from error
        if flat.shape != (self.task.observation_size,):
            raise ValueError(f"{prefix}: an observation of shape {flat.shape}; those from {space} have another")
        if not np.isfinite(flat).all():
            raise ValueError(f"{prefix}: an observation that is not finite: {observation!r}")
        return flat


def load_policy(folder: str | Path, client: str | None = None) -> LoadedPolicy | LoadedAdapters:
    """Load a client's policy from a run's folder; `client` may be left out if the run has only one.

    ValueError if the folder holds no such policy, or a file that does not fit the scenario.
    """
    folder = Path(folder)
    scenario = read_scenario(folder)
    task = _task(folder, scenario, client)
    if isinstance(task, LanguageTask):
        return load_adapters_of(folder / POLICIES, scenario, task)
    assert isinstance(task, GymTask)
    return _load_network(folder, scenario, task)


def load_network(folder: str | Path, client: str | None = None) -> LoadedPolicy:
    """Load the policy of a client with an environment, as `load_policy`; ValueError for one with prompts."""
    policy = load_policy(folder, client)
    if not isinstance(policy, LoadedPolicy):
        raise ValueError(f"{folder}: client {policy.task.client} has adapters of a language model, not a network")
    return policy


def _load_network(folder: Path, scenario: Scenario, first_task: GymTask) -> LoadedPolicy:
    """Load the policy of a client that began with this task."""
    policy = make_policy(first_task, scenario.policy)
    path = folder / POLICIES / f"{first_task.client}.safetensors"
    refuse_links(folder, path)
    arrays = _read_arrays(path)
    task = first_task.at(int(arrays.pop(TASK_SINCE, torch.zeros(1))))
    normaliser = None
    try:
        names = [name for name in arrays if name.startswith(NORMALISER)]
        state = {name.removeprefix(NORMALISER): arrays.pop(name).numpy() for name in names}
        (parameters,) = policy.layout.stack([arrays])
        if not bool(parameters.isfinite().all()):
            raise ValueError("some parameters are not finite")
        if scenario.normalise.observations:
            normaliser = ObservationNormaliser(1, policy.observation_size, scenario.normalise.clip)
            normaliser.load(0, state)
        elif state:
            raise ValueError("it has a normaliser, and the scenario beside it has normalise.observations = false")
    except ValueError as error:
        raise ValueError(f"{path}: does not fit {folder / SCENARIO}: {error}") from error
    return LoadedPolicy(scenario, task, first_task, policy, parameters[None], normaliser)


def _task(folder: Path, scenario: Scenario, client: str | None) -> Task:
    """Resolve the task that a client began with, without making the environments of other clients."""
    names = [name for settings in scenario.clients for name in settings.names]
    if client is None:
        if len(names) > 1:
            raise ValueError(f"{folder}: has several clients, name one of them: {shorten(', '.join(names))}")
        client = names[0]
    for settings in scenario.clients:
        if client in settings.names:
            reduced = scenario.model_copy(update={"clients": [settings]})
            return next(task for task in resolve_tasks(reduced) if task.client == client)
    close = closest_match(client, names)
    cure = did_you_mean(close) or f"; there are {shorten(', '.join(names))}"
    raise ValueError(f"{folder}: has no client {client}{cure}")


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Read a policy's file; ValueError if it is missing or damaged."""
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; did the run end before it saved its policies?") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is damaged, or no policy: {error}") from None
