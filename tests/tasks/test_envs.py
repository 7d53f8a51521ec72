"""Lanes against plain loops over gymnasium's environments, whichever way these want to be stepped."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.envs import (
    ActionConverter,
    ClientEnvs,
    check_finite,
    episode_seed,
    make_client_envs,
    observation_flattener,
)
from grpo_fed.tasks.envs.base import EnvStep
from grpo_fed.tasks.gym import make_env
from grpo_fed.tasks.resolve import resolve_tasks
from grpo_fed.tasks.task import Task, TaskError


class Counter(gymnasium.Env[Any, Any]):
    """Sees (its seed, the steps of the episode, the last action); ends by itself in step `last` of every episode."""

    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, last: int = 3, bound: float = np.inf, fault: str = "") -> None:
        self.last, self.fault = last, fault
        self.action_space = spaces.Box(-bound, bound, (1,), np.float64)
        self.seed = self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seed = self.seed + 1 if seed is None else seed % 1000
        self.steps = 0
        if self.fault == "reset":
            raise OSError("out of maps")
        return np.array([self.seed, 0, 0.0]), {"map": self.seed % 3, "name": f"map {self.seed % 3}", "grid": np.eye(2)}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        seen = np.array([self.seed, self.steps, float(action[0])])
        reward: Any = float(self.steps)
        if self.steps == 2:
            if self.fault == "step":
                raise ZeroDivisionError("wheels came off")
            seen = seen[:1] if self.fault == "shape" else seen
            reward = np.array([1.0]) if self.fault == "reward" else reward
        return seen, reward, self.steps == self.last, False, {"map": "of a step"}


class Shown(gymnasium.Env[Any, Any]):
    """Shows samples of a space, and keeps them."""

    action_space: spaces.Space[Any] = spaces.Discrete(2)
    shown: list[Any] = []  # noqa: RUF012, of the latest instance

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.observation_space = space
        Shown.shown = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(seed)
        return self.step(0)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Shown.shown.append(self.observation_space.sample())
        return Shown.shown[-1], 0.0, False, False, {}


class Obeys(gymnasium.Env[Any, Any]):
    """Keeps the actions it is given."""

    observation_space: spaces.Space[Any] = spaces.Box(-1, 1, (1,))
    given: list[Any] = []  # noqa: RUF012, of the latest instance

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.action_space = space
        Obeys.given = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in self.action_space
        Obeys.given.append(action)
        return np.zeros(1), 0.0, False, False, {}


class Skips(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Takes every action twice."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        done = self.env.step(action)
        return done if done[2] or done[3] else self.env.step(action)


class OneSeed(VectorEnv[Any, Any, Any]):
    """Copies of Counter that take one seed for all of them, and reset themselves in the next step."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int) -> None:
        self.envs = SyncVectorEnv([Counter] * num_envs)
        self.num_envs = num_envs
        self.observation_space, self.action_space = self.envs.observation_space, self.envs.action_space
        self.single_observation_space = self.envs.single_observation_space
        self.single_action_space = self.envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert isinstance(seed, int)
        return self.envs.reset(seed=seed)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        return self.envs.step(actions)


def vector_of(mode: AutoresetMode):
    def make(num_envs: int, max_episode_steps: int = 10**9, **kwargs: Any) -> VectorEnv[Any, Any, Any]:
        one = lambda: gymnasium.wrappers.TimeLimit(Counter(**kwargs), max_episode_steps)  # noqa: E731
        return SyncVectorEnv([one] * num_envs, autoreset_mode=mode)

    return make


@pytest.fixture(autouse=True)
def toys():
    known = dict(gymnasium.registry)
    gymnasium.register("toys/Counter-v0", Counter)
    gymnasium.register("toys/Limited-v0", Counter, max_episode_steps=4)
    for mode in AutoresetMode:
        gymnasium.register(f"toys/{mode.value}-v0", vector_entry_point=vector_of(mode))
    gymnasium.register("toys/OneSeed-v0", vector_entry_point=OneSeed)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(known)


def tasks(*clients: dict[str, Any]) -> list[Task]:
    return resolve_tasks(Scenario.model_validate({"name": "toys", "clients": list(clients)}))


def task(env: str, **client: Any) -> Task:
    (only,) = tasks({"name": "toy", "env": env, **client})
    return only


def counter(**kwargs: Any) -> Task:
    return task("toys/Counter-v0", kwargs=kwargs)


def streams(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


def play(lanes: ClientEnvs, actions: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, list[EnvStep]]:
    """First observations, and what each of actions [T, L, A] led to."""
    return lanes.reset(seeds), [lanes.step(action) for action in actions]


def draw(one: Task, steps: int, size: int, seed: int = 0) -> np.ndarray:
    """Actions [T, L, A], as a policy says them."""
    rng = np.random.default_rng(seed)
    shape = (steps, size, one.action.size)
    if one.action.kind == "gaussian":
        return rng.normal(size=shape).astype(np.float32)
    return rng.integers(0, one.action.sizes, shape).astype(np.float32)


def assert_same(one: EnvStep, other: EnvStep, rows: Any = slice(None)) -> None:
    for name, values in vars(one).items():
        np.testing.assert_array_equal(values, getattr(other, name)[rows], name)


# Names of episodes ---------------------------------------------------------------------------------------------------


def test_episode_seeds_are_splitmix64s_upper_bits():
    # from https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [episode_seed(1234567, episode) for episode in range(5)] == [number >> 33 for number in known]
    assert 0 <= episode_seed(2**64 - 1, 2**40) < 2**31


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Blackjack-v1", "FrozenLake-v1", "grpo_fed/CartPole-v1"])
def test_every_episode_is_that_of_a_plain_loop_with_its_seed(env: str):
    one = task(env, kwargs={"max_episode_steps": 13})
    seeds = streams(2)
    actions = draw(one, 60, 2)
    first, steps = play(make_client_envs([one], 2), actions, seeds)
    ends = 0
    for lane in range(2):
        plain, episode = make_env(one), 0
        seen, _ = plain.reset(seed=episode_seed(int(seeds[lane]), 0))
        np.testing.assert_array_equal(flatten(one.observation_space, seen).astype(np.float32), first[lane])
        for action, step in zip(actions[:, lane], steps, strict=True):
            native = action if one.action.kind == "gaussian" else int(action[0])
            seen, reward, terminated, truncated, _ = plain.step(native)
            flat = flatten(one.observation_space, seen).astype(np.float32)
            np.testing.assert_array_equal(step.final_observations[lane], flat)
            assert (step.rewards[lane], step.terminated[lane], step.truncated[lane]) == (reward, terminated, truncated)
            assert step.valid[lane]
            if terminated or truncated:
                ends, episode = ends + 1, episode + 1
                seen, _ = plain.reset(seed=episode_seed(int(seeds[lane]), episode))
                flat = flatten(one.observation_space, seen).astype(np.float32)
            np.testing.assert_array_equal(step.observations[lane], flat)
    assert ends > 5


@pytest.mark.parametrize("env", ["CartPole-v1", "grpo_fed/CartPole-v1", "grpo_fed/Pendulum-v1", "toys/Disabled-v0"])
def test_the_same_seeds_give_the_same_experience_bit_for_bit(env: str):
    one = task(env)
    lanes = make_client_envs([one], 4)
    actions = draw(one, 60, 4)
    first, steps = play(lanes, actions, streams(4))
    play(lanes, draw(one, 7, 4, seed=1), streams(4, seed=1))
    again, others = play(lanes, actions, streams(4))
    np.testing.assert_array_equal(first, again)
    for step, other in zip(steps, others, strict=True):
        assert_same(step, other)


@pytest.mark.parametrize("env", ["CartPole-v1", "grpo_fed/CartPole-v1", "toys/Disabled-v0"])
def test_a_lane_does_not_depend_on_the_other_lanes(env: str):
    one = task(env)
    actions, seeds = draw(one, 50, 5), streams(5)
    _, steps = play(make_client_envs([one], 5), actions, seeds)
    _, alone = play(make_client_envs([one], 1), actions[:, 3:4], seeds[3:4])
    for step, other in zip(alone, steps, strict=True):
        assert_same(step, other, slice(3, 4))


# How episodes end ----------------------------------------------------------------------------------------------------


def test_ended_by_the_task_and_cut_are_kept_apart():
    made = tasks(
        {"name": "ends", "env": "toys/Counter-v0", "kwargs": {"last": 2}},
        {"name": "cut", "env": "toys/Limited-v0", "kwargs": {"last": 9}},
        {"name": "both", "env": "toys/Limited-v0", "kwargs": {"last": 4}},
        {"name": "neither", "env": "toys/Limited-v0", "kwargs": {"last": 9, "max_episode_steps": -1}},
    )
    _, steps = play(make_client_envs(made, 1), np.zeros((4, 4, 1), np.float32), streams(4))
    np.testing.assert_array_equal(
        [step.terminated for step in steps], [[0, 0, 0, 0], [1, 0, 0, 0], [0] * 4, [1, 0, 1, 0]]
    )
    np.testing.assert_array_equal([step.truncated for step in steps], [[0] * 4, [0] * 4, [0] * 4, [0, 1, 1, 0]])
    np.testing.assert_array_equal(steps[3].final_observations[:, 1], [2, 4, 4, 4])
    np.testing.assert_array_equal(steps[3].observations[:, 1], [0, 0, 0, 4])


@pytest.mark.parametrize(("limit", "length"), [(0, 4), (3, 3), (100, 4)])
@pytest.mark.parametrize("env", ["toys/Limited-v0", "toys/Disabled-v0", "toys/NextStep-v0", "toys/SameStep-v0"])
def test_an_episode_is_cut_at_the_tasks_limit_or_an_earlier_one(env: str, limit: int, length: int):
    one = task(env, kwargs={"last": 9, "max_episode_steps": 4})
    lanes = make_client_envs([one], 2, episode_limit=limit)
    _, steps = play(lanes, np.zeros((length + 3, 2, 1), np.float32), streams(2))
    ends = [step.truncated.tolist() for step in steps]
    assert ends[: length - 1] == [[False, False]] * (length - 1)
    assert ends[length - 1] == [True, True]
    assert not any(step.terminated.any() for step in steps)
    np.testing.assert_array_equal(steps[length - 1].final_observations[:, 1], [length, length])


def test_a_family_is_cut_by_the_lanes_too():
    both = tasks(
        {"name": "a", "env": "grpo_fed/Pendulum-v1", "kwargs": {"max_episode_steps": 5}},
        {"name": "b", "env": "grpo_fed/Pendulum-v1"},
    )
    lanes = make_client_envs(both, 1, episode_limit=7)
    _, steps = play(lanes, np.zeros((14, 2, 1), np.float32), streams(2))
    assert [[t + 1 for t in range(14) if steps[t].truncated[lane]] for lane in range(2)] == [[5, 10], [7, 14]]


def test_a_wrappers_steps_are_what_an_episode_limit_counts():
    one = task("toys/Limited-v0", kwargs={"last": 9}, wrappers=[f"{__name__}:Skips"])
    for limit, wanted in ((0, [2, 4]), (1, [1, 2, 3, 4])):
        _, steps = play(make_client_envs([one], 1, episode_limit=limit), np.zeros((4, 1, 1), np.float32), streams(1))
        assert [number for number, step in enumerate(steps, 1) if step.truncated[0]] == wanted


@pytest.mark.parametrize(
    "env", ["toys/Counter-v0", "toys/Disabled-v0", "toys/NextStep-v0", "toys/SameStep-v0", "toys/OneSeed-v0"]
)
def test_without_restart_a_lane_that_is_done_sleeps_until_the_reset(env: str):
    lanes = make_client_envs([task(env)], 2)
    first = lanes.reset(streams(2))
    actions = np.arange(1.0, 10.0, dtype=np.float32)[:, None, None].repeat(2, 1)
    steps = [lanes.step(action, restart=False) for action in actions]
    end = steps[2]
    np.testing.assert_array_equal(end.terminated, [True, True])
    np.testing.assert_array_equal(end.observations, end.final_observations)
    np.testing.assert_array_equal(end.observations, np.stack([first[:, 0], [3, 3], [3, 3]], 1))
    for step in steps[3:]:
        for quiet in (step.valid, step.terminated, step.truncated, step.rewards):
            assert not quiet.any()
        np.testing.assert_array_equal(step.observations, end.observations)
        np.testing.assert_array_equal(step.final_observations, end.observations)
    assert not lanes.step(actions[0]).valid.any()
    np.testing.assert_array_equal(lanes.reset(streams(2)), first)
    assert lanes.step(actions[0]).valid.all()


def test_some_lanes_sleep_while_others_go_on_as_if_nothing_were():
    one = task("CartPole-v1")
    family = task("grpo_fed/CartPole-v1")
    actions, seeds = draw(one, 40, 3), streams(3)
    for made in (one, family):
        lanes = make_client_envs([made], 3)
        _, wanted = play(lanes, actions, seeds)
        lanes.reset(seeds)
        awake = np.ones(3, bool)
        for action, step in zip(actions, wanted, strict=True):
            slept = lanes.step(action, restart=False)
            np.testing.assert_array_equal(slept.valid, awake)
            for name in ("final_observations", "rewards", "terminated"):
                np.testing.assert_array_equal(getattr(slept, name)[awake], getattr(step, name)[awake])
            awake &= ~step.terminated
        assert not awake.all()


# Environments that reset themselves ----------------------------------------------------------------------------------


def transitions(lanes: ClientEnvs, actions: np.ndarray, count: int) -> list[list[tuple[Any, ...]]]:
    """The first `count` valid ones of each lane: before, action, reward, after, ended."""
    before = lanes.reset(streams(lanes.size))
    found: list[list[tuple[Any, ...]]] = [[] for _ in range(lanes.size)]
    for action in actions:
        step = lanes.step(action)
        for lane in np.flatnonzero(step.valid):
            after = step.final_observations[lane]
            values = (*before[lane, 1:], *action[lane], step.rewards[lane], *after[1:], step.terminated[lane])
            found[lane].append(tuple(float(value) for value in values))
            assert before[lane, 0] == after[0], "of one episode"
        before = step.observations
    return [rows[:count] for rows in found]


@pytest.mark.parametrize("env", ["Disabled", "SameStep", "NextStep", "OneSeed"])
def test_however_it_resets_itself_no_transition_crosses_a_reset(env: str):
    actions = np.full((20, 3, 1), 0.5, np.float32)
    plain = transitions(make_client_envs([counter()], 3), actions, 12)
    assert [row[-1] for row in plain[0]] == [0, 0, 1] * 4
    lanes = make_client_envs([task(f"toys/{env}-v0")], 3)
    assert transitions(lanes, actions, 12) == plain
    assert lanes.reproducible == (env == "Disabled")


def test_a_vector_that_takes_resets_plays_the_named_episodes():
    actions, seeds = np.zeros((11, 2, 1), np.float32), streams(2)
    first, steps = play(make_client_envs([counter()], 2), actions, seeds)
    other, others = play(make_client_envs([task("toys/Disabled-v0")], 2), actions, seeds)
    np.testing.assert_array_equal(first, other)
    for step, same in zip(steps, others, strict=True):
        assert_same(step, same)


@pytest.mark.parametrize("env", ["toys/NextStep-v0", "toys/SameStep-v0"])
def test_a_vector_that_resets_itself_begins_with_the_lanes_seeds(env: str):
    seeds = streams(2)
    first = make_client_envs([task(env)], 2).reset(seeds)
    np.testing.assert_array_equal(first[:, 0], [episode_seed(int(seed), 0) % 1000 for seed in seeds])


def test_one_seed_for_all_depends_on_every_lanes():
    lanes = make_client_envs([task("toys/OneSeed-v0")], 2)
    seeds = np.array([[1, 2], [1, 3], [2, 2], [1, 2]], np.uint64)
    begun = [lanes.reset(pair)[0, 0] for pair in seeds]
    assert begun[0] == begun[3]
    assert len(set(begun)) == 3


def test_a_vector_that_cannot_be_told_when_to_cut_an_episode_is_refused():
    with pytest.raises(
        ValueError, match=r"OneSeed-v0: cannot be made with kwargs = {'max_episode_steps': 3}: TypeError"
    ):
        make_client_envs([task("toys/OneSeed-v0")], 2, episode_limit=3)


def test_a_vector_must_say_how_it_resets():
    gymnasium.register("toys/Silent-v0", vector_entry_point=lambda num_envs: Silent(num_envs))
    with pytest.warns(UserWarning, match="missing AutoresetMode"):
        one = task("toys/Silent-v0")
    with (
        pytest.warns(UserWarning, match="missing AutoresetMode"),
        pytest.raises(ValueError, match=r"client toy: toys/Silent-v0: metadata\['autoreset_mode'\] .* is None"),
    ):
        make_client_envs([one], 2)


class Silent(OneSeed):
    metadata = {}  # noqa: RUF012


# Unlike clients together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["grpo_fed/CartPole-v1", "CartPole-v1", "toys/Disabled-v0"])
def test_clients_with_unlike_arguments_live_as_if_alone(env: str):
    kwargs: list[dict[str, Any]] = [{"length": 0.2}, {}, {"length": 1.5, "gravity": 3.0, "swap_actions": True}]
    if env == "CartPole-v1":
        kwargs = [{"sutton_barto_reward": True}, {}, {"max_episode_steps": 9}]
    if env == "toys/Disabled-v0":
        kwargs = [{"last": 2}, {}, {"last": 7}]
    made = tasks(*({"name": f"c{n}", "env": env, "kwargs": each} for n, each in enumerate(kwargs)))
    actions, seeds = draw(made[0], 60, 6), streams(6)
    lanes = make_client_envs(made, 2)
    assert lanes.names == ("c0", "c0", "c1", "c1", "c2", "c2")
    first, steps = play(lanes, actions, seeds)
    for client, one in enumerate(made):
        rows = slice(2 * client, 2 * client + 2)
        begun, alone = play(make_client_envs([one], 2), actions[:, rows], seeds[rows])
        np.testing.assert_array_equal(begun, first[rows])
        for step, other in zip(alone, steps, strict=True):
            assert_same(step, other, rows)


def test_clients_of_unlike_environments_share_lanes():
    made = tasks(
        {"name": "family", "env": "grpo_fed/CartPole-v1"},
        {"name": "single", "env": "CartPole-v1"},
        {"name": "long", "env": "grpo_fed/CartPole-v1", "kwargs": {"length": 2.0}},
        {"name": "wrapped", "env": "grpo_fed/CartPole-v1", "wrappers": ["gymnasium.wrappers:FlattenObservation"]},
    )
    actions, seeds = draw(made[0], 50, 8), streams(8)
    seeds[6:8] = seeds[0:2]
    actions[:, 6:8] = actions[:, 0:2]
    lanes = make_client_envs(made, 2)
    assert lanes.names == tuple(one.client for one in made for _ in range(2))
    first, steps = play(lanes, actions, seeds)
    np.testing.assert_array_equal(first[6:8], first[0:2])
    for client, one in enumerate(made):
        rows = slice(2 * client, 2 * client + 2)
        _, alone = play(make_client_envs([one], 2), actions[:, rows], seeds[rows])
        for step, other in zip(alone, steps, strict=True):
            assert_same(step, other, rows)
            assert_same(EnvStep(*(values[6:8] for values in vars(other).values())), other, slice(0, 2))


def test_what_decides_shapes_in_a_family_keeps_clients_apart():
    made = tasks(
        {"name": "plain", "env": "grpo_fed/RandomMDP-v0"},
        {"name": "same", "env": "grpo_fed/RandomMDP-v0", "kwargs": {"states": 6, "seed": 3}},
    )
    assert make_client_envs(made, 2).reset(streams(4)).sum(1).tolist() == [1.0] * 4


def test_policies_of_unlike_shapes_cannot_share_lanes():
    made = tasks({"name": "a", "env": "CartPole-v1"}, {"name": "b", "env": "Acrobot-v1"})
    with pytest.raises(ValueError, match=r"clients a and b cannot be stepped together: CartPole-v1 has .*4"):
        make_client_envs(made, 2)


# What goes in and out ------------------------------------------------------------------------------------------------


def given(space: spaces.Space[Any], said: list[list[float]], squash: bool = False) -> list[Any]:
    """What an environment gets for what its policy says, step by step."""
    gymnasium.registry.pop("toys/Obeys-v0", None)
    gymnasium.register("toys/Obeys-v0", lambda: Obeys(space))
    lanes = make_client_envs([task("toys/Obeys-v0")], 1, squash)
    play(lanes, np.array(said, np.float32)[:, None], streams(1))
    return Obeys.given


def test_choices_arrive_as_whole_numbers_from_where_the_space_begins():
    assert given(spaces.Discrete(3, start=-1), [[0.0], [2.0]]) == [-1, 1]


def test_several_choices_arrive_in_the_shape_of_their_space():
    (two,) = given(spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 0], [1, 1]]), [[1, 2, 3, 4]])
    np.testing.assert_array_equal(two, [[1, 2], [4, 5]])
    (bits,) = given(spaces.MultiBinary(3), [[1, 0, 1]])
    np.testing.assert_array_equal(bits, [1, 0, 1])


def test_numbers_are_clipped_to_their_box_where_it_ends():
    space = spaces.Box(np.array([-1.0, 0.0, -np.inf]), np.array([2.0, np.inf, np.inf]), dtype=np.float64)
    np.testing.assert_allclose(given(space, [[9, 9, 9], [-9, -9, -9]]), [[2, 9, 9], [-1, 0, -9]])
    (free,) = given(spaces.Box(-np.inf, np.inf, (2, 1)), [[1e9, -1e9]])
    np.testing.assert_allclose(free, [[1e9], [-1e9]])
    whole = given(spaces.Box(0, 255, (2,), np.uint8), [[3.4, 300.0], [-2.0, 7.6]])
    np.testing.assert_array_equal(whole, [[3, 255], [0, 8]])


def test_squashed_numbers_fill_their_box():
    space = spaces.Box(np.array([-1.0, 10.0], np.float32), np.array([3.0, 10.5], np.float32))
    said = [[0.0, 0.0], [np.arctanh(0.5), -np.arctanh(0.5)], [50.0, -50.0], [-50.0, 50.0]]
    np.testing.assert_allclose(given(space, said, True), [[1, 10.25], [2, 10.125], [3, 10], [-1, 10.5]], rtol=1e-6)


def test_one_policy_is_played_with_the_same_conversions():
    box = task("toys/Counter-v0", kwargs={"bound": 2.0})
    np.testing.assert_allclose(
        ActionConverter(box, squash=False)(np.array([[5.0], [1.0], [-5.0]])), [[2.0], [1.0], [-2.0]]
    )
    np.testing.assert_allclose(ActionConverter(box, squash=True)(np.array([[np.arctanh(0.5)]])), [[1.0]])
    number, seen = observation_flattener(task("Blackjack-v1")), observation_flattener(box)(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(np.flatnonzero(number((20, 7, 1))), [20, 32 + 7, 32 + 11 + 1])
    np.testing.assert_array_equal(seen, [1.0, 2.0, 3.0])
    assert seen.dtype == number((20, 7, 1)).dtype == np.float32


def test_each_client_has_its_own_box():
    made = [task("toys/Counter-v0", kwargs={"bound": bound}) for bound in (1.0, 4.0)]
    said = np.array([[7.0], [-7.0]], np.float32)
    for squash, wanted in ((False, [1, -4]), (True, [np.tanh(7), 4 * np.tanh(-7)])):
        lanes = make_client_envs(made, 1, squash)
        lanes.reset(streams(2))
        np.testing.assert_allclose(lanes.step(said).observations[:, 2], wanted, rtol=1e-6)


def test_what_has_no_bounds_cannot_be_squashed():
    with pytest.raises(ValueError, match=r"policy.squash = true: client toy: entry 0 .* from -inf to inf.*wrapper"):
        make_client_envs([counter()], 1, squash=True)
    make_client_envs([task("CartPole-v1")], 1, squash=True)


SEEN = [
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete([2, 3], start=[1, 5]),
    spaces.Box(-1, 1, (2, 3), np.float64),
    spaces.Box(0, 255, (3,), np.uint8),
    spaces.Dict({"a": spaces.Discrete(3), "b": spaces.Box(-1, 1, (2, 2))}),
    spaces.Tuple((spaces.MultiBinary(2), spaces.Dict({"c": spaces.Discrete(2, start=-1)}))),
]
ONE_OF = spaces.OneOf((spaces.Discrete(3), spaces.Box(-1, 1, (2,))))  # gymnasium batches none


@pytest.mark.parametrize(
    ("space", "vector"),
    [*((space, vector) for space in SEEN for vector in (False, True)), (ONE_OF, False)],
    ids=lambda value: type(value).__name__ if isinstance(value, spaces.Space) else "vector" if value else "single",
)
def test_observations_come_flattened_as_gymnasium_does_it(space: spaces.Space[Any], vector: bool):
    disabled = AutoresetMode.DISABLED
    entry: dict[str, Any] = {"entry_point": lambda: Shown(space)}
    if vector:
        entry = {"vector_entry_point": lambda num_envs: SyncVectorEnv([lambda: Shown(space)], autoreset_mode=disabled)}
    gymnasium.register("toys/Shown-v0", **entry)
    first, steps = play(make_client_envs([task("toys/Shown-v0")], 1), np.zeros((3, 1, 1), np.float32), streams(1))
    seen = np.concatenate([first, *(step.observations for step in steps)])
    assert seen.dtype == np.float32
    wanted = [flatten(space, one) for one in Shown.shown]
    np.testing.assert_array_equal(seen, np.array(wanted, np.float32))


def test_the_arrays_of_a_step_are_not_written_into_later():
    for one in (task("CartPole-v1"), task("grpo_fed/CartPole-v1"), task("toys/NextStep-v0")):
        _, steps = play(make_client_envs([one], 2), draw(one, 8, 2), streams(2))
        _, copies = play(make_client_envs([one], 2), draw(one, 8, 2), streams(2))
        for step, other in zip(steps, copies, strict=True):
            assert_same(step, other)
            for values in vars(step).values():
                values[...] = 0


@pytest.mark.parametrize("env", ["Counter", "Disabled", "NextStep", "SameStep"])
def test_the_info_of_the_latest_resets_can_be_asked_for(env: str):
    lanes = make_client_envs([task(f"toys/{env}-v0")], 3)
    first = lanes.reset(streams(3))
    np.testing.assert_array_equal(lanes.reset_infos("map"), first[:, 0] % 3)
    for _ in range(4):
        step = lanes.step(np.zeros((3, 1), np.float32))
    np.testing.assert_array_equal(lanes.reset_infos("map"), step.observations[:, 0] % 3)
    assert lanes.reset_infos("name").tolist() == [f"map {int(seed) % 3}" for seed in step.observations[:, 0]]
    begun = lanes.reset(streams(3))
    for _ in range(9):
        lanes.step(np.zeros((3, 1), np.float32), restart=False)
    np.testing.assert_array_equal(lanes.reset_infos("map"), begun[:, 0] % 3)


def test_infos_of_unlike_lanes_come_together():
    both = tasks({"name": "a", "env": "toys/Counter-v0"}, {"name": "b", "env": "toys/NextStep-v0"})
    lanes = make_client_envs(both, 2)
    first = lanes.reset(streams(4))
    assert not lanes.reproducible
    np.testing.assert_array_equal(lanes.reset_infos("map"), first[:, 0] % 3)


def test_an_info_that_is_not_there_or_no_name_of_a_group_is_an_error():
    lanes = make_client_envs([counter()], 2)
    lanes.reset(streams(2))
    with pytest.raises(ValueError, match=r"group.key = 'maps': client toy: .*no such key; it has map, name, grid"):
        lanes.reset_infos("maps")
    with pytest.raises(ValueError, match=r"group.key = 'grid': client toy: it must be a number or a text; .* ndarray"):
        lanes.reset_infos("grid")


# When things go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("step", "client b: toys/Counter-v0: step of lane 0 failed: ZeroDivisionError: wheels came off"),
        ("shape", r"step of lane 0 failed: ValueError: an observation has shape \(1,\); its space says \(3,\)"),
        ("reward", r"step of lane 0 failed: its reward has shape \(1,\); it must be a number"),
    ],
)
def test_a_failing_environment_is_named_with_its_client(fault: str, said: str):
    made = tasks(
        {"name": "a", "env": "toys/Counter-v0"},
        {"name": "b", "env": "toys/Counter-v0", "kwargs": {"fault": fault}},
    )
    lanes = make_client_envs(made, 2)
    for _ in range(2):  # a reset starts everything anew
        lanes.reset(streams(4))
        lanes.step(np.zeros((4, 1), np.float32))
        with pytest.raises(TaskError, match=said) as failed:
            lanes.step(np.zeros((4, 1), np.float32))
        assert (failed.value.client, failed.value.env) == ("b", "toys/Counter-v0")
        assert failed.value.__cause__ is not None


def test_a_failing_reset_is_named_too():
    lanes = make_client_envs([counter(), counter(fault="reset")], 2)
    with pytest.raises(TaskError, match="client toy: toys/Counter-v0: reset of lane 0 failed: OSError: out of maps"):
        lanes.reset(streams(4))


@pytest.mark.parametrize("env", ["toys/Disabled-v0", "toys/NextStep-v0", "toys/SameStep-v0"])
def test_a_failing_vector_is_named_with_its_client(env: str):
    lanes = make_client_envs([task(env, kwargs={"fault": "step"})], 2)
    lanes.reset(streams(2))
    lanes.step(np.zeros((2, 1), np.float32))
    with pytest.raises(TaskError, match=f"client toy: {env}: step failed: ZeroDivisionError: wheels came off"):
        lanes.step(np.zeros((2, 1), np.float32))


def test_a_number_that_is_none_is_found_with_its_client_lane_and_step():
    observations, rewards = np.zeros((2, 5, 3, 4), np.float32), np.zeros((2, 5, 3))
    observations[0, 0] = 3e38  # no infinity, though their sum is
    check_finite(observations, rewards, ["a", "b"])
    observations[1, 3, 2, 1], observations[0, 4, 0, 0] = np.nan, np.inf
    with pytest.raises(
        ValueError, match="client b: in lane 2, at step 3 of this batch, entry 1 of the observation is nan"
    ):
        check_finite(observations, rewards, ["a", "b"])
    rewards[0, 2, 1] = -np.inf
    with pytest.raises(ValueError, match="client a: in lane 1, at step 2 of this batch, the reward is -inf"):
        check_finite(np.zeros((2, 5, 3, 4)), rewards, ["a", "b"])
