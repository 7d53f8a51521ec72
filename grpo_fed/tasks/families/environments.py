"""FamilyVectorEnv and FamilyEnv: any family as a gymnasium environment, vectorised or single."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, final

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array

from grpo_fed.scenario.toml.text import suggest_name
from grpo_fed.tasks.families.base import Array, CostlyFamily, Family, Flags, Floats, Painter, Picture, read_parameters
from grpo_fed.tasks.families.catalogue import FAMILIES
from grpo_fed.tasks.families.generators import make_generators
from grpo_fed.tasks.families.noise import NoiseStreams

UNLIMITED = -1  # max_episode_steps of episodes without a limit, as in gymnasium.make
Seeds = int | Sequence[int | None] | None


@final
class FamilyVectorEnv(VectorEnv[Array, Array, Array]):
    """Env copies of one family with their own parameters, stepped together. No copy depends on another.

    With autoreset DISABLED a copy whose episode ended sleeps, its state unchanged and its reward 0, until a `reset`
    whose `options["reset_mask"]` selects it; NEXT_STEP and SAME_STEP work as in gymnasium's SyncVectorEnv. Discrete
    actions are not checked. L is the number of copies.
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
        """family: an instance, or the id that a family is registered with. max_episode_steps: -1 for no limit.

        parameters: by name one value, or a list of one for each env copy. With an id also the fields of the family.
        """
        self.family = _make_family(family, parameters) if isinstance(family, str) else family
        self.num_envs = num_envs
        self.parameters = read_parameters(self.family, parameters, num_envs)
        """By name, [L, ...] each."""
        self.constants = self.family.prepare(self.parameters)
        """The result of the family's `prepare`."""
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**FamilyEnv.metadata, "autoreset_mode": self.autoreset_mode}
        self.max_episode_steps = _step_limit(
            self.family.episode_limit if max_episode_steps is None else max_episode_steps
        )
        self.render_mode = render_mode

        self.single_action_space = self.family.action_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.single_observation_space = _seen_space(self.family.observation_space, self.parameters)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

        self._mirror = _action_mirror(self.single_action_space, self.parameters["swap_actions"] > 0)
        self._sources = None
        if "permute" in self.parameters:
            self._sources = _entry_sources(self.single_observation_space, self.parameters["permute"].astype(np.int64))
        self._deviations = self.parameters.get("sensor_noise", np.zeros(num_envs))[:, None]
        self._sensor_noise, self._transition_noise = None, None
        if self._deviations.any():
            entries = self.parameters["permute"].shape[1]
            self._sensor_noise = NoiseStreams(num_envs, entries, np.random.Generator.standard_normal)
        if self.family.noise_size:
            self._transition_noise = NoiseStreams(num_envs, self.family.noise_size, np.random.Generator.random)
        self._noise_streams = [noise for noise in (self._transition_noise, self._sensor_noise) if noise is not None]

        self.generators: list[np.random.Generator | None] = [None] * num_envs
        self.state: Floats = np.zeros((num_envs, self.family.state_size))
        self._all = np.arange(num_envs)
        self._observations: Array = np.asarray(create_empty_array(self.single_observation_space, num_envs))
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._ended: Flags = np.ones(num_envs, dtype=np.bool_)
        self._flags = (np.zeros(num_envs, dtype=np.bool_), np.zeros(num_envs, dtype=np.bool_))
        self._any_ended = True
        self._painters: list[Painter] = []
        self._costs_of = self.family.costs if isinstance(self.family, CostlyFamily) else None

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Step all copies: actions [L] or [L, A] -> observations, rewards, terminated and truncated [L], infos."""
        ended = self._ended if self._any_ended else None
        if ended is not None and not any(self.generators):
            raise ResetNeeded(f"{self}: call reset before step")
        awake = self._all if ended is None else np.flatnonzero(~ended)
        if self._mirror is not None:
            actions = self._mirror[0] * actions + self._mirror[1]
        noise = np.zeros((self.num_envs, 0)) if self._transition_noise is None else self._transition_noise.take(awake)
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
        infos: dict[str, Any] = {}
        if self._costs_of is not None:
            costs = self._costs_of(state, self.constants)
            infos = _cost_infos(costs, np.ones(self.num_envs, dtype=np.bool_) if ended is None else ~ended)
        if ended is not None and self.autoreset_mode is not AutoresetMode.DISABLED:
            self._begin(np.flatnonzero(ended), None)
            awake = self._all
        self._observations = self._observe(awake)
        self._ended = terminated | truncated
        self._any_ended = bool(np.count_nonzero(self._ended))
        if self._any_ended:
            self._flags = (terminated.copy(), truncated.copy())
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                infos = self._begin_in_same_step(np.flatnonzero(self._ended), infos)
        return self._observations.copy(), rewards, terminated, truncated, infos

    def reset(
        self, *, seed: Seeds | Array = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every env copy, or in those that `options["reset_mask"]`, [L] bool, selects.

        seed: one for each copy, or the first of consecutive ones; with None a copy keeps its random generator.
        """
        seeds = [seed + copy for copy in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"{self}: seed: {len(seeds)} seeds for {self.num_envs} env copies; give one for each")
        copies = _copies_to_reset(self, options)
        self._begin(copies, seeds)
        self._ended[copies] = False
        self._any_ended = bool(np.count_nonzero(self._ended))
        self._observations = self._observe(copies)
        return self._observations.copy(), {}

    def render(self) -> tuple[Picture, ...] | None:
        """Return a picture of each env copy; None without a render_mode."""
        if self.render_mode is None:
            return None
        if not self._painters:
            rows = [{name: value[copy] for name, value in self.parameters.items()} for copy in self._all]
            self._painters = [self.family.painter(row) for row in rows]
        return tuple(paint(state) for paint, state in zip(self._painters, self.state, strict=True))

    def set_generator(self, copy: int, generator: np.random.Generator) -> None:
        """Let an env copy draw its start states from `generator`, and its noise from children of it."""
        self.generators[copy] = generator
        for noise in self._noise_streams:
            noise.restart(copy, generator)

    def set_parameters(self, values: Mapping[int, Mapping[str, float]]) -> None:
        """Give env copies other values of the family's own parameters, from their next episodes on.

        values: for each copy a value by name. ValueError for a name that the family does not have, or a value outside
        the parameter's limits.
        """
        for copy, row in values.items():
            for name, value in row.items():
                where, parameter = f"{type(self.family).__name__}: {name}", self.family.parameters.get(name)
                if parameter is None or parameter.shape:
                    raise ValueError(f"{where}: it cannot differ from episode to episode")
                if not parameter.low <= value <= parameter.high:
                    raise ValueError(f"{where}: {value!r} is not from {parameter.low:g} to {parameter.high:g}")
                self.parameters[name][copy] = value
        self.constants = self.family.prepare(self.parameters)
        self._painters = []

    def _begin(self, copies: Array, seeds: Sequence[int | None] | Array | None) -> None:
        """Put some env copies into the first states of their next episodes."""
        selected = copies.tolist()
        given = {copy: None if seeds is None else seeds[copy] for copy in selected}
        seeded = {copy: seed for copy, seed in given.items() if seed is not None or self.generators[copy] is None}
        for copy, generator in zip(seeded, make_generators(list(seeded.values())), strict=True):
            self.set_generator(copy, generator)
        generators = [generator for copy in selected if (generator := self.generators[copy]) is not None]
        self.state[copies] = self.family.start(generators)
        self._steps[copies] = 0

    def _begin_in_same_step(self, copies: Array, infos: dict[str, Any]) -> dict[str, Any]:
        """Begin the next episodes of copies whose episodes ended; infos with what these ended with.

        infos: of the step; its costs are then those of the other copies.
        """
        costs = infos.get("cost")
        infos = {} if costs is None else _cost_infos(costs.copy(), ~self._ended)
        for copy in copies.tolist():
            final = {} if costs is None else {"cost": costs[copy]}
            infos = self._add_info(infos, {"final_obs": self._observations[copy], "final_info": final}, copy)
        self._begin(copies, None)
        self._ended[copies] = False
        self._any_ended = False
        self._observations = self._observe(copies)
        return infos

    def _observe(self, copies: Array) -> Array:
        """Compute the observations of `copies` from their states; the other copies keep their last ones."""
        seen = self.family.observe(self.state, self.constants)
        if self._sources is not None:
            seen = seen.take(self._sources) if seen.ndim == 2 else self._sources[self._all, seen]
        if self._sensor_noise is not None:
            seen += self._deviations * self._sensor_noise.take(copies)
        if copies is self._all:
            return seen
        observations = self._observations.copy()
        observations[copies] = seen[copies]
        return observations


@final
class FamilyEnv(gymnasium.Env[Any, Any]):
    """One env copy of a family. Its episodes have no step limit; `gymnasium.make` wraps a limit around it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012 (gymnasium reads it from the class)

    def __init__(self, family: Family | str, *, render_mode: str | None = None, **parameters: Any) -> None:
        self.vector = FamilyVectorEnv(family, max_episode_steps=UNLIMITED, render_mode=render_mode, **parameters)
        self.action_space = self.vector.single_action_space
        self.observation_space = self.vector.single_observation_space
        self.render_mode = render_mode

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if isinstance(self.action_space, spaces.Discrete) and action not in self.action_space:
            raise ValueError(f"{self}: action {action!r} is not in {self.action_space}")
        observations, rewards, terminated, _, infos = self.vector.step(np.asarray(action)[None])
        info = {"cost": float(infos["cost"][0])} if "cost" in infos else {}
        return observations[0], float(rewards[0]), bool(terminated[0]), False, info

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self.vector.generators[0] is not self.np_random:
            self.vector.set_generator(0, self.np_random)
        observations, _ = self.vector.reset(options=options)
        return observations[0], {}

    def render(self) -> Picture | None:
        pictures = self.vector.render()
        return None if pictures is None else pictures[0]


def make_family_vector_env(
    family: str, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, **kwargs: Any
) -> FamilyVectorEnv:
    """Make a FamilyVectorEnv for `gymnasium.make_vec`: with autoreset NEXT_STEP by default, as gymnasium's own."""
    return FamilyVectorEnv(family, num_envs, autoreset_mode=autoreset_mode, **kwargs)


def _cost_infos(costs: Floats, mask: Flags) -> dict[str, Any]:
    """Make the infos of a step in gymnasium's form, with the costs [L] of the copies in the mask [L] bool, if any."""
    costs[~mask] = 0.0
    return {"cost": costs, "_cost": mask} if mask.any() else {}


def _make_family(name: str, given: dict[str, Any]) -> Family:
    """Make the family that is registered as `name`, and remove its fields from `given`."""
    if name not in FAMILIES:
        raise ValueError(f"{name}: unknown family{suggest_name(name, FAMILIES)}")
    settings = {}
    for field in fields(FAMILIES[name]):  # type: ignore[arg-type]
        value = given.pop(field.name, None)
        if isinstance(value, list | tuple):
            if any(entry != value[0] for entry in value):
                raise ValueError(f"{name}: {field.name}: {value} determines shapes; give all env copies the same")
            value = value[0]
        if value is not None:
            settings[field.name] = value
    return FAMILIES[name](**settings)


def _step_limit(steps: int) -> int:
    """Return the step limit as a number that can be compared with; ValueError for one below 1."""
    if steps != UNLIMITED and steps < 1:
        raise ValueError(f"max_episode_steps: {steps}: give at least 1, or {UNLIMITED} for episodes without a limit")
    return int(np.iinfo(np.int64).max) if steps == UNLIMITED else steps


def _action_mirror(space: gymnasium.Space[Any], swapped: Flags) -> tuple[Array, Array] | None:
    """Return (sign, offset), with which a swapped copy's action is mirrored and the others' stay; None without any."""
    if not swapped.any():
        return None
    if isinstance(space, spaces.Discrete):
        return np.where(swapped, -1, 1), np.where(swapped, space.n - 1, 0)
    assert isinstance(space, spaces.Box)
    ones = np.ones(space.shape, dtype=space.dtype)
    return np.where(swapped[:, None], -ones, ones), np.where(swapped[:, None], space.low + space.high, 0 * ones)


def _entry_sources(space: gymnasium.Space[Any], permute: Array) -> Array | None:
    """Return the source of each observation entry, [L, O] indices into all observations as one flat array.

    For a Discrete space, the state's new number, as if its one-hot vector had been permuted. None if nothing changes
    its place.
    """
    copies, entries = permute.shape
    if np.array_equal(permute, np.broadcast_to(np.arange(entries), permute.shape)):
        return None
    if isinstance(space, spaces.Discrete):
        return permute.argsort(axis=1)
    return np.asarray(permute + entries * np.arange(copies)[:, None])


def _seen_space(space: gymnasium.Space[Any], parameters: dict[str, Floats]) -> gymnasium.Space[Any]:
    """Return the smallest space of what any env copy may see: permuted, and without bounds if there is noise."""
    if "permute" not in parameters or not isinstance(space, spaces.Box):
        return space
    permute = parameters["permute"].astype(np.int64)
    low, high = space.low[permute].min(axis=0), space.high[permute].max(axis=0)
    if parameters["sensor_noise"].any():
        low, high = np.full_like(low, -np.inf), np.full_like(high, np.inf)
    return spaces.Box(low, high, dtype=np.float32)


def _copies_to_reset(env: FamilyVectorEnv, options: dict[str, Any] | None) -> Array:
    """Return the env copies that the options of a reset select."""
    for name in options or {}:
        if name != "reset_mask":
            raise ValueError(f"{env}: options[{name!r}]: unknown; use reset_mask")
    if not options:
        return env._all
    mask = options["reset_mask"]
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (env.num_envs,):
        raise ValueError(f"{env}: options['reset_mask']: {mask!r} must be an array of {env.num_envs} bools")
    return np.flatnonzero(mask)
