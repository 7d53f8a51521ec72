"""Every family as a gymnasium environment: many lanes in one vectorised call, or one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, final

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array

from grpo_fed.scenario.toml.text import suggest_name
from grpo_fed.tasks.families.base import Array, Family, Flags, Floats, Painter, Picture, read_parameters
from grpo_fed.tasks.families.catalogue import FAMILIES
from grpo_fed.tasks.families.noise import Noise

NO_STEP_LIMIT = -1  # max_episode_steps of episodes without a limit, as in gymnasium.make
Seeds = int | Sequence[int | None] | None


@final
class FamilyVectorEnv(VectorEnv[Array, Array, Array]):
    """Lanes of one family with unlike parameters, stepped together; what a lane lives through depends on no other.

    `family` is one, or the name it is registered by; a parameter is one value, or a list with one for each lane. With
    autoreset DISABLED a lane that ended sleeps, its numbers unchanged and its reward 0, until a `reset` whose
    `options["reset_mask"]` names it; NEXT_STEP and SAME_STEP do as gymnasium's SyncVectorEnv does. Discrete actions are
    taken as they come, unchecked.
    """

    def __init__(
        self,
        family: Family | str,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.DISABLED,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **parameters: Any,
    ) -> None:
        self.family = _family(family, parameters) if isinstance(family, str) else family
        self.num_envs = num_envs
        self.parameters = read_parameters(self.family, parameters, num_envs)
        """[L, ...] each."""
        self.constants = self.family.prepare(self.parameters)
        """What the family made of them."""
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**FamilyEnv.metadata, "autoreset_mode": self.autoreset_mode}
        self.max_episode_steps = _limit(self.family.episode_limit if max_episode_steps is None else max_episode_steps)
        self.render_mode = render_mode

        self.single_action_space = self.family.action_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.single_observation_space = _sensed_space(self.family.observation_space, self.parameters)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

        self._mirror = _mirror(self.single_action_space, self.parameters["swap_actions"] > 0)
        self._sources = _sources(self.single_observation_space, self.parameters["permute"].astype(np.int64))
        self._deviations = self.parameters["sensor_noise"][:, None]
        self._sensor, self._dice = None, None
        if self.parameters["sensor_noise"].any():
            entries = self.parameters["permute"].shape[1]
            self._sensor = Noise(num_envs, entries, np.random.Generator.standard_normal)
        if self.family.noise_size:
            self._dice = Noise(num_envs, self.family.noise_size, np.random.Generator.random)

        self.generators: list[np.random.Generator | None] = [None] * num_envs
        self.state: Floats = np.zeros((num_envs, self.family.state_size))
        self._all = np.arange(num_envs)
        self._observations: Array = np.asarray(create_empty_array(self.single_observation_space, num_envs))
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._ended: Flags = np.ones(num_envs, dtype=np.bool_)
        self._flags = (np.zeros(num_envs, dtype=np.bool_), np.zeros(num_envs, dtype=np.bool_))
        self._any_ended = True
        self._painters: list[Painter] = []

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Actions [L] or [L, A] -> observations, rewards, terminated and truncated [L], infos."""
        ended = self._ended if self._any_ended else None
        if ended is not None and not any(self.generators):
            raise ResetNeeded(f"{self}: call reset before step")
        awake = self._all if ended is None else np.flatnonzero(~ended)
        if self._mirror is not None:
            actions = self._mirror[0] * actions + self._mirror[1]
        noise = np.zeros((self.num_envs, 0)) if self._dice is None else self._dice.take(awake)
        state, rewards, terminated = self.family.step(self.state, actions, self.constants, noise)
        self._steps += 1
        truncated: Flags = self._steps >= self.max_episode_steps
        if ended is not None:
            rewards[ended] = 0.0
            if self.autoreset_mode is AutoresetMode.DISABLED:
                state[ended] = self.state[ended]
                terminated[ended], truncated[ended] = self._flags[0][ended], self._flags[1][ended]
            else:
                terminated[ended] = truncated[ended] = False
        self.state = state
        if ended is not None and self.autoreset_mode is not AutoresetMode.DISABLED:
            self._begin(np.flatnonzero(ended), None)
            awake = self._all
        self._observations = self._sense(awake)
        self._ended = terminated | truncated
        self._any_ended = bool(np.count_nonzero(self._ended))
        infos: dict[str, Any] = {}
        if self._any_ended:
            self._flags = (terminated.copy(), truncated.copy())
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                infos = self._restart(np.flatnonzero(self._ended))
        return self._observations.copy(), rewards, terminated, truncated, infos

    def reset(
        self, *, seed: Seeds | Array = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every lane, or in those of `options["reset_mask"]` (a bool for each lane).

        `seed` is one for each lane, or one from which they count up; a lane given None goes on with its stream.
        """
        seeds = [seed + lane for lane in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"{self}: seed: {len(seeds)} seeds for {self.num_envs} lanes; give one for each")
        lanes = _masked(self, options)
        self._begin(lanes, seeds)
        self._ended[lanes] = False
        self._any_ended = bool(np.count_nonzero(self._ended))
        self._observations = self._sense(lanes)
        return self._observations.copy(), {}

    def render(self) -> tuple[Picture, ...] | None:
        """A picture of each lane."""
        if self.render_mode is None:
            return None
        if not self._painters:
            rows = [{name: value[lane] for name, value in self.parameters.items()} for lane in self._all]
            self._painters = [self.family.painter(row) for row in rows]
        return tuple(paint(state) for paint, state in zip(self._painters, self.state, strict=True))

    def adopt(self, lane: int, generator: np.random.Generator) -> None:
        """From now on the lane draws from `generator`: its start states itself, its noise from children of it."""
        self.generators[lane] = generator
        for noise in (self._dice, self._sensor):
            if noise is not None:
                noise.restart(lane, generator)

    def _begin(self, lanes: Array, seeds: Sequence[int | None] | Array | None) -> None:
        for lane in lanes.tolist():
            seed = None if seeds is None else seeds[lane]
            if seed is not None or self.generators[lane] is None:
                self.adopt(lane, np_random(None if seed is None else int(seed))[0])
            generator = self.generators[lane]
            assert generator is not None
            self.state[lane] = self.family.start(generator)
        self._steps[lanes] = 0

    def _restart(self, lanes: Array) -> dict[str, Any]:
        """Start the next episode of lanes that ended, and put where the last one led into infos."""
        infos: dict[str, Any] = {}
        for lane in lanes.tolist():
            infos = self._add_info(infos, {"final_obs": self._observations[lane], "final_info": {}}, lane)
        self._begin(lanes, None)
        self._ended[lanes] = False
        self._any_ended = False
        self._observations = self._sense(lanes)
        return infos

    def _sense(self, lanes: Array) -> Array:
        """The observations: of these lanes what they see now, of the others what they saw last."""
        seen = self.family.observe(self.state, self.constants)
        if self._sources is not None:
            seen = seen.take(self._sources) if seen.ndim == 2 else self._sources[self._all, seen]
        if self._sensor is not None:
            seen += self._deviations * self._sensor.take(lanes)
        if lanes is self._all:
            return seen
        kept = self._observations.copy()
        kept[lanes] = seen[lanes]
        return kept


@final
class FamilyEnv(gymnasium.Env[Any, Any]):
    """One task of a family: a vector of one. Its episodes have no limit; `gymnasium.make` wraps one around it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012 (gymnasium reads it from the class)

    def __init__(self, family: Family | str, *, render_mode: str | None = None, **parameters: Any) -> None:
        self.vector = FamilyVectorEnv(family, max_episode_steps=NO_STEP_LIMIT, render_mode=render_mode, **parameters)
        self.action_space = self.vector.single_action_space
        self.observation_space = self.vector.single_observation_space
        self.render_mode = render_mode

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if isinstance(self.action_space, spaces.Discrete) and action not in self.action_space:
            raise ValueError(f"{self}: action {action!r} is not in {self.action_space}")
        observations, rewards, terminated, _, _ = self.vector.step(np.asarray(action)[None])
        return observations[0], float(rewards[0]), bool(terminated[0]), False, {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self.vector.generators[0] is not self.np_random:
            self.vector.adopt(0, self.np_random)
        observations, _ = self.vector.reset(options=options)
        return observations[0], {}

    def render(self) -> Picture | None:
        pictures = self.vector.render()
        return None if pictures is None else pictures[0]


def make_family_vector_env(
    family: str, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, **kwargs: Any
) -> FamilyVectorEnv:
    """What `gymnasium.make_vec` calls: the same, but lanes reset themselves when gymnasium's own would."""
    return FamilyVectorEnv(family, num_envs, autoreset_mode=autoreset_mode, **kwargs)


def _family(name: str, given: dict[str, Any]) -> Family:
    """The family of this name, with what decides its shapes taken out of `given`."""
    if name not in FAMILIES:
        raise ValueError(f"{name}: unknown family{suggest_name(name, FAMILIES)}")
    settings = {}
    for field in fields(FAMILIES[name]):  # type: ignore[arg-type]
        value = given.pop(field.name, None)
        if isinstance(value, list | tuple):
            if any(entry != value[0] for entry in value):
                raise ValueError(f"{name}: {field.name}: {value} decides shapes; give all lanes the same")
            value = value[0]
        if value is not None:
            settings[field.name] = value
    return FAMILIES[name](**settings)


def _limit(steps: int) -> int:
    if steps != NO_STEP_LIMIT and steps < 1:
        raise ValueError(
            f"max_episode_steps: {steps}: give at least 1, or {NO_STEP_LIMIT} for episodes without a limit"
        )
    return int(np.iinfo(np.int64).max) if steps == NO_STEP_LIMIT else steps


def _mirror(space: gymnasium.Space[Any], swapped: Flags) -> tuple[Array, Array] | None:
    """(sign, offset) that take a swapped lane's action to the other side of the middle, and leave the others'."""
    if not swapped.any():
        return None
    if isinstance(space, spaces.Discrete):
        return np.where(swapped, -1, 1), np.where(swapped, space.n - 1, 0)
    assert isinstance(space, spaces.Box)
    one = np.ones(space.shape, dtype=space.dtype)
    return np.where(swapped[:, None], -one, one), np.where(swapped[:, None], space.low + space.high, 0 * one)


def _sources(space: gymnasium.Space[Any], permute: Array) -> Array | None:
    """Where each observation entry comes from, [L, O] into the flat observations; for a Discrete space the state's
    new number, as if its one-hot vector had been permuted. None if everything stays in its place.
    """
    lanes, entries = permute.shape
    if np.array_equal(permute, np.broadcast_to(np.arange(entries), permute.shape)):
        return None
    if isinstance(space, spaces.Discrete):
        return permute.argsort(axis=1)
    return np.asarray(permute + entries * np.arange(lanes)[:, None])


def _sensed_space(space: gymnasium.Space[Any], parameters: dict[str, Floats]) -> gymnasium.Space[Any]:
    """The narrowest space that holds what any lane may see: permuted, and without bounds if there is noise."""
    if not isinstance(space, spaces.Box):
        return space
    permute = parameters["permute"].astype(np.int64)
    low, high = space.low[permute].min(axis=0), space.high[permute].max(axis=0)
    if parameters["sensor_noise"].any():
        low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
    return spaces.Box(low, high, dtype=np.float32)


def _masked(env: FamilyVectorEnv, options: dict[str, Any] | None) -> Array:
    """The lanes that a reset is for."""
    for name in options or {}:
        if name != "reset_mask":
            raise ValueError(f"{env}: options[{name!r}]: unknown; there is reset_mask")
    if not options:
        return env._all
    mask = options["reset_mask"]
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (env.num_envs,):
        raise ValueError(f"{env}: options['reset_mask']: {mask!r} must be an array of {env.num_envs} bools")
    return np.flatnonzero(mask)
