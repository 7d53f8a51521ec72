"""A client's policy on disk, and read back to be used: a safetensors file beside the run's scenario."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from grpo_fed.policy.make import make_policy
from grpo_fed.rl.evaluation import EvaluatedClients, Evaluation, evaluate
from grpo_fed.rl.normalise import ObservationNormaliser
from grpo_fed.rl.rng import client_seed
from grpo_fed.rl.rollout import Actor
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import POLICIES, SCENARIO, read_scenario
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.toml.text import closest_match, did_you_mean, shorten
from grpo_fed.tasks.envs import ActionConverter, make_client_envs, observation_flattener
from grpo_fed.tasks.gym_task import GymTask
from grpo_fed.tasks.resolve import resolve_tasks

NORMALISER = "normaliser:"
"""Before the names of the observation normaliser's arrays; no parameter's name has a colon."""


def save_policy(
    folder: Path, task: GymTask, policy: Policy, parameters: Tensor, normaliser: Mapping[str, np.ndarray] | None
) -> None:
    """Write `folder/policies/<client>.safetensors`: parameters [P] by name, and what the normaliser remembers."""
    (arrays,) = policy.layout.unstack(parameters[None].cpu())
    for name, value in (normaliser or {}).items():
        arrays[NORMALISER + name] = torch.from_numpy(np.array(value))
    (folder / POLICIES).mkdir(exist_ok=True)
    # one entry, for the order of several would be chance and the file not the same twice
    write_atomic(folder / POLICIES / f"{task.client}.safetensors", save(arrays, {"env": task.env}))


def save_policies(folder: Path, fleet: StackedLearner) -> None:
    """Those of a fleet as it is, but for those that diverged."""
    for client, parameters in enumerate(fleet.parameters):
        if bool(parameters.isfinite().all()):
            normaliser = fleet.observation_normaliser
            moments = None if normaliser is None else normaliser.state(client)
            save_policy(folder, fleet.tasks[client], fleet.policy, parameters, moments)


@dataclass(frozen=True)
class LoadedPolicy:
    """One client's policy as it was saved; takes the observations that its environment gives, and gives its actions."""

    scenario: Scenario
    """Of the run."""
    task: GymTask
    policy: StackedPolicy
    parameters: Tensor
    """[1, P]."""
    normaliser: ObservationNormaliser | None

    def predict(
        self, observation: Any, deterministic: bool = True, generator: np.random.Generator | None = None
    ) -> Any:
        """An action for the environment from one of its observations; a sampled one is drawn from `generator`."""
        seen = self._seen(observation)
        if self.normaliser is not None:
            seen = self.normaliser.apply_one(0, seen)
        said = self._actor(seen[None, None])
        distribution = self.policy.distribution
        if deterministic:
            action = distribution.mode(said)
        else:
            action = distribution.sample(said, distribution.draw_noise(generator or np.random.default_rng(), (1, 1)))
        return self._actions(action[0])[0]

    def play(self, episodes: int | None = None, deterministic: bool = True, seed: int | None = None) -> Evaluation:
        """Play without learning; with the run's own seed and number of episodes, the run's own evaluation again."""
        settings = self.scenario
        squash, limit = settings.policy.squash, settings.rollout.episode_limit
        lanes = make_client_envs([self.task], settings.rollout.num_envs, squash, limit)
        seeds = [client_seed(settings.seed if seed is None else seed, self.task.client)]
        players = EvaluatedClients([self.task.client], seeds, self.normaliser)
        count = settings.evaluate.episodes if episodes is None else episodes
        try:
            (played,) = evaluate(self._actor, lanes, players, count, settings.evaluate.step_limit, deterministic)
        finally:
            lanes.close()
        return played

    @cached_property
    def _actor(self) -> Actor:
        return Actor(self.policy, self.parameters)

    @cached_property
    def _actions(self) -> ActionConverter:
        return ActionConverter(self.task, self.scenario.policy.squash)

    @cached_property
    def _flat(self) -> Callable[[Any], np.ndarray]:
        return observation_flattener(self.task)

    def _seen(self, observation: Any) -> np.ndarray:
        """[D] float32; ValueError if it is no observation of the task's."""
        space, where = self.task.observation_space, f"client {self.task.client}: {self.task.env}"
        try:
            flat = self._flat(observation)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise ValueError(f"{where}: {observation!r} is no observation from {space}: {error}") from error
        if flat.shape != (self.task.observation_size,):
            raise ValueError(f"{where}: an observation of shape {flat.shape}; one from {space} has another")
        if not np.isfinite(flat).all():
            raise ValueError(f"{where}: an observation that is not finite: {observation!r}")
        return flat


def load_policy(folder: str | Path, client: str | None = None) -> LoadedPolicy:
    """The policy of a client from a run folder; the client may be left out where there is only one."""
    folder = Path(folder)
    scenario = read_scenario(folder)
    task = _task(folder, scenario, client)
    policy = make_policy(task, scenario.policy)
    path = folder / POLICIES / f"{task.client}.safetensors"
    arrays = _arrays(path)
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
    return LoadedPolicy(scenario, task, policy, parameters[None], normaliser)


def _task(folder: Path, scenario: Scenario, client: str | None) -> GymTask:
    """Of a client, without asking the other clients' environments for anything."""
    names = [name for settings in scenario.clients for name in settings.names]
    if client is None:
        if len(names) > 1:
            raise ValueError(f"{folder}: it has several clients, say which: {shorten(', '.join(names))}")
        client = names[0]
    for settings in scenario.clients:
        if client in settings.names:
            alone = scenario.model_copy(update={"clients": [settings]})
            return next(task for task in resolve_tasks(alone) if task.client == client)
    close = closest_match(client, names)
    cure = did_you_mean(close) or f"; there are {shorten(', '.join(names))}"
    raise ValueError(f"{folder}: it has no client {client}{cure}")


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; did the run end before it saved its policies?") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is damaged, or no policy: {error}") from None
