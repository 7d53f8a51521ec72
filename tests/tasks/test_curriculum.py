"""Levels of a task: how each curriculum chooses them, with numbers worked by hand, and how copies take them."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import CurriculumSettings
from grpo_fed.tasks.curriculum import (
    Curriculum,
    advance,
    box_edges,
    describe_state,
    draw_levels,
    first_state,
    gather_evidence,
    level_chances,
    radical_inverse,
    spread_levels,
    success_rates,
)
from grpo_fed.tasks.envs import EnvCache, make_client_envs
from grpo_fed.tasks.families import FamilyVectorEnv
from grpo_fed.tasks.resolve import resolve_gym_tasks


def make(kind: str, **values: Any) -> Curriculum:
    given = {"ranges": {"length": [0.0, 2.0]}, "start": {"length": [0.5, 1.0]}, "target": 100.0, **values}
    return Curriculum(CurriculumSettings(kind=kind, **given))  # type: ignore[arg-type]


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Levels of an evaluation ---------------------------------------------------------------------------------------------


def test_the_radical_inverse_mirrors_the_digits():
    assert radical_inverse(np.array([0, 1, 2, 3, 6]), 2).tolist() == [0, 0.5, 0.25, 0.75, 0.375]  # 110 gives 0.011
    np.testing.assert_allclose(radical_inverse(np.array([1, 2, 3, 5]), 3), [1 / 3, 2 / 3, 1 / 9, 7 / 9])


def test_levels_are_spread_evenly_over_all_ranges():
    one = spread_levels(make("uniform"), 4)
    assert one.tolist() == [[0.25], [0.75], [1.25], [1.75]]
    two = spread_levels(make("uniform", ranges={"length": [0.0, 2.0], "gravity": [8.0, 12.0]}, start={}), 4)
    assert two.tolist() == [[0.25, 10.0], [0.75, 9.0], [1.25, 11.0], [1.75, 8.5]]


# The box -------------------------------------------------------------------------------------------------------------


def test_a_schedule_opens_the_box_by_progress():
    curriculum = make("schedule", until=0.5)
    edges = [box_edges(curriculum, first_state(curriculum), progress).ravel() for progress in (0.0, 0.25, 0.5, 0.9)]
    np.testing.assert_allclose(edges, [[0.5, 1.0], [0.25, 1.5], [0.0, 2.0], [0.0, 2.0]])


def test_a_range_that_start_does_not_have_is_whole_from_the_beginning():
    curriculum = make("schedule", ranges={"length": [0.0, 2.0], "gravity": [8.0, 12.0]})
    assert box_edges(curriculum, first_state(curriculum), 0.0).tolist() == [[0.5, 8.0], [1.0, 12.0]]


def test_a_mean_return_opens_the_box_once_enough_episodes_have_ended():
    curriculum = make("return", step=0.25, episodes=3, floor=20.0)
    state = first_state(curriculum)
    for returns, expected in (
        ([90.0, 120.0], [0.0, 2, 210]),  # two of three episodes
        ([90.0], [0.25, 0, 0]),  # their mean is 100
        ([50.0] * 3, [0.25, 0, 0]),  # below target, and not below floor
        ([], [0.25, 0, 0]),
        ([0.0, 10.0, 30.0], [0.0, 0, 0]),
        ([0.0, 10.0, 30.0], [0.0, 0, 0]),  # not below the first box
    ):
        evidence = gather_evidence(curriculum, state, 0.0, np.ones((len(returns), 1)), np.array(returns))
        state = advance(curriculum, state, evidence)
        assert state.tolist() == expected
    assert box_edges(curriculum, np.array([0.25, 0, 0]), 0.0).ravel().tolist() == [0.375, 1.25]


def test_ten_steps_of_a_tenth_reach_the_limits_exactly():
    curriculum = make("return", step=0.1, episodes=1, ranges={"length": [0.05, 2.1]})
    state = first_state(curriculum)
    for _ in range(10):
        state = advance(curriculum, state, np.array([[1.0], [100.0]]))
    assert state.tolist() == [1.0, 0, 0]
    assert box_edges(curriculum, state, 0.0).ravel().tolist() == [0.05, 2.1]


def test_each_edge_moves_by_the_returns_at_this_edge():
    curriculum = make("expanding", step=0.5, episodes=2)
    levels = np.array([[0.5], [0.5], [0.7], [1.0], [1.0]])
    evidence = gather_evidence(
        curriculum, first_state(curriculum), 0.0, levels, np.array([100.0, 120.0, 500.0, 80.0, 90.0])
    )
    assert evidence.tolist() == [[2, 2], [220, 170]]  # at 0.5 and at 1.0; the one at 0.7 is at no edge
    state = advance(curriculum, first_state(curriculum), evidence)
    assert state.tolist() == [0.5, 0, 0, 0, 0, 0]
    assert box_edges(curriculum, state, 0.0).ravel().tolist() == [0.25, 1.0]
    # an episode that began at the edge where it was before does not count for the edge where it is
    assert gather_evidence(curriculum, state, 0.0, np.array([[0.5], [0.25]]), np.array([9.0, 70.0])).tolist() == [
        [1, 0],
        [70, 0],
    ]


def test_edges_of_two_arguments_are_four_slots():
    curriculum = make(
        "expanding",
        ranges={"length": [0.0, 2.0], "gravity": [8.0, 12.0]},
        start={"length": [0.5, 1.0], "gravity": [9.0, 10.0]},
    )
    levels = np.array([[0.5, 9.5], [0.7, 9.0], [1.0, 10.0]])
    evidence = gather_evidence(curriculum, first_state(curriculum), 0.0, levels, np.array([1.0, 2.0, 4.0]))
    assert evidence.tolist() == [[1, 1, 1, 1], [1, 2, 4, 4]]  # lowest length, lowest gravity, highest ones


def test_a_part_of_the_copies_plays_at_edges_that_can_move():
    curriculum = make("expanding", edges=0.5)
    levels = draw_levels(curriculum, first_state(curriculum), 0.0, draws(), 8)
    assert sorted(levels[:4, 0].tolist()) == [0.5, 0.5, 1.0, 1.0]
    assert ((levels[4:] > 0.5) & (levels[4:] < 1)).all()
    at_limit = np.array([1.0, 0.0, 0, 0, 0, 0])
    assert draw_levels(curriculum, at_limit, 0.0, draws(), 8)[:4, 0].tolist() == [1.0] * 4
    grown = np.array([1.0, 1.0, 0, 0, 0, 0])
    assert not np.isin(draw_levels(curriculum, grown, 0.0, draws(), 8), [0.0, 2.0]).any()
    may_shrink = make("expanding", edges=0.5, floor=20.0)
    assert np.isin(draw_levels(may_shrink, grown, 0.0, draws(), 8)[:4], [0.0, 2.0]).all()


def test_uniform_levels_are_drawn_from_all_ranges():
    levels = draw_levels(make("uniform"), np.zeros(0), 0.0, draws(), 4000)
    counts = np.histogram(levels, bins=4, range=(0, 2))[0]
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)  # five standard deviations


# Learnability --------------------------------------------------------------------------------------------------------


def test_chances_follow_how_uncertain_success_is():
    curriculum = make("learnability", levels=3, explore=0.25)
    state = np.array([2.0, 0, 0, 0, 0, 0, 2, 0, 0])  # two successes at the first level
    np.testing.assert_allclose(success_rates(curriculum, state), [3 / 4, 1 / 2, 1 / 2])
    # p (1 - p) is 3/16, 4/16 and 4/16, of 11/16 together
    np.testing.assert_allclose(level_chances(curriculum, state), [0.75 * share / 11 + 0.25 / 3 for share in (3, 4, 4)])


def test_successes_and_failures_fade():
    curriculum = make("learnability", levels=2, fade=0.5)
    levels = np.array([[0.5], [0.5], [1.5], [0.9]])  # the last is none of the two levels
    evidence = gather_evidence(curriculum, first_state(curriculum), 0.0, levels, np.array([100.0, 99.0, 150.0, 200.0]))
    assert evidence.tolist() == [[2, 1], [1, 1]]
    state = advance(curriculum, first_state(curriculum), evidence)
    assert state.tolist() == [1, 1, 1, 0, 2, 1]
    assert advance(curriculum, state, np.zeros((2, 2))).tolist() == [0.5, 0.5, 0.5, 0, 2, 1]


def test_levels_are_drawn_with_their_chances():
    curriculum = make("learnability", levels=2, explore=0.0)
    state = np.array([8.0, 0, 0, 0, 8, 0])  # p is 9/10 and 1/2: chances of 9/34 and 25/34
    levels = draw_levels(curriculum, state, 0.0, draws(), 4000)[:, 0]
    share = 9 / 34
    assert abs((levels == 0.5).sum() - 4000 * share) < 5 * np.sqrt(4000 * share * (1 - share))
    assert set(levels.tolist()) == {0.5, 1.5}


def test_metrics_describe_the_levels_of_a_round():
    box = describe_state(make("expanding"), np.array([0.5, 0.0, 0, 0, 0, 0]), 0.0)
    assert box == {"curriculum/size": 0.375, "curriculum_low/length": 0.25, "curriculum_high/length": 1.0}
    levels = describe_state(make("learnability", levels=2), np.array([3.0, 0, 0, 1, 3, 1]), 0.0)
    assert (levels["curriculum/size"], levels["curriculum/solved"], levels["curriculum/visited"]) == (1.0, 0.5, 1.0)


# Copies of an environment --------------------------------------------------------------------------------------------


class Paying(gymnasium.Env[Any, Any]):
    """Pays `pay` in each of three steps, and shows it."""

    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (4,))
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def __init__(self, pay: float = 1.0) -> None:
        self.pay = pay

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.full(4, self.pay, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return np.full(4, self.pay, np.float32), self.pay, self.steps == 3, False, {}


ENTRIES = """
name = "a"
[[clients]]
name = "pole"
env = "grpo_fed/CartPole-v1"
curriculum = { ranges = { length = [0.1, 0.9] } }
[[clients]]
name = "plain"
env = "grpo_fed/CartPole-v1"
[[clients]]
name = "wrapped"
env = "grpo_fed/CartPole-v1"
wrappers = ["gymnasium.wrappers:RecordEpisodeStatistics"]
curriculum = { ranges = { length = [0.1, 0.9] } }
"""


def fixed(length: float) -> str:
    return f'name = "a"\n[[clients]]\nname = "x"\nenv = "grpo_fed/CartPole-v1"\nkwargs = {{ length = {length} }}\n'


def play(envs: Any, seeds: np.ndarray, steps: int) -> list[np.ndarray]:
    """Play the same actions in all copies; gives the observations [L, D] of each step."""
    seen = [envs.reset(seeds)]
    seen += [envs.step(np.full((envs.size, 1), t % 2)).observations for t in range(steps)]
    return seen


def test_copies_begin_with_levels_that_are_spread_evenly():
    tasks = resolve_gym_tasks(Scenario.loads(ENTRIES))
    envs = make_client_envs(tasks, 2)  # of a family, and of single environments
    seeds = np.arange(6, dtype=np.uint64)
    found = play(envs, seeds, 60)
    for copy, length in enumerate([0.3, 0.7, 0.5, 0.5, 0.3, 0.7]):
        (task,) = resolve_gym_tasks(Scenario.loads(fixed(length)))
        alone = make_client_envs([task], 1)
        expected = play(alone, seeds[copy : copy + 1], 60)
        for seen, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(seen[copy], wanted[0])
        alone.close()
    envs.close()


def test_a_level_begins_with_the_next_episode_of_its_copy():
    gymnasium.register("Paying-v0", Paying)
    try:
        text = (
            'name = "a"\n[[clients]]\nname = "x"\nenv = "Paying-v0"\ncurriculum = { ranges = { pay = [1.0, 3.0] } }\n'
        )
        (task,) = resolve_gym_tasks(Scenario.loads(text))
        cache = EnvCache()
        envs = make_client_envs([task], 2, cache=cache)
        envs.reset(np.zeros(2, np.uint64))
        rewards = []
        for t in range(7):
            if t == 1:
                envs.set_levels({1: {"pay": 3.0}})
            rewards.append(envs.step(np.zeros((2, 1))).rewards.tolist())
        assert rewards == [[1.5, 2.5]] * 3 + [[1.5, 3.0]] * 4
        envs.close()
        assert cache.take(task) is not None  # made anew: one of another level is never in the cache
        envs = make_client_envs([task], 2, cache=cache)
        assert envs.reset(np.zeros(2, np.uint64))[:, 0].tolist() == [1.5, 2.5]
        envs.close()
    finally:
        del gymnasium.registry["Paying-v0"]


def test_a_family_refuses_values_that_a_copy_cannot_have():
    env = FamilyVectorEnv("grpo_fed/CartPole-v1", 2)
    env.set_parameters({1: {"length": 0.9}})
    assert env.parameters["length"].tolist() == [0.5, 0.9]
    assert env.constants["moment"].tolist() == [0.1 * 0.5, 0.1 * 0.9]
    with pytest.raises(ValueError, match=r"length: 0\.0 is not from 0\.01 to 100"):
        env.set_parameters({0: {"length": 0.0}})
    with pytest.raises(ValueError, match="swap_actions: it cannot differ from episode to episode"):
        env.set_parameters({0: {"swap_actions": 1.0}})


@pytest.mark.parametrize("client", ["pole", "wrapped"])
def test_an_episode_is_continued_at_its_level(client: str):
    (task,) = (task for task in resolve_gym_tasks(Scenario.loads(ENTRIES)) if task.client == client)
    seeds, levels = np.arange(2, dtype=np.uint64), {0: {"length": 0.2}, 1: {"length": 0.8}}
    played, resumed = make_client_envs([task], 2), make_client_envs([task], 2)
    for envs in (played, resumed):
        envs.set_levels(levels)
    seen = play(played, seeds, 5)[-1]
    played.set_levels({0: {"length": 0.9}})
    actions = [np.array([[t % 2] for t in range(5)], np.float32)] * 2
    np.testing.assert_array_equal(resumed.resume(seeds, np.zeros(2, np.int64), actions), seen)
    resumed.set_levels({0: {"length": 0.9}})
    for _ in range(300):
        steps = [envs.step(np.ones((2, 1))) for envs in (played, resumed)]
        np.testing.assert_array_equal(steps[0].observations, steps[1].observations)
    for envs in (played, resumed):
        envs.close()


# Mistakes ------------------------------------------------------------------------------------------------------------


def entry(curriculum: str, more: str = "", env: str = "grpo_fed/CartPole-v1", top: str = "") -> str:
    return f'name = "a"\n{top}\n[[clients]]\nname = "x"\nenv = "{env}"\n{more}\ncurriculum = {curriculum}\n'


@pytest.mark.parametrize(
    ("curriculum", "more", "error"),
    [
        ("{ ranges = { length = [2.0, 0.1] } }", "", r"ranges\.length.*lowest value and then the highest"),
        ('{ kind = "return", ranges = { length = [0.1, 2.0] }, target = 9 }', "", "needs start"),
        ('{ kind = "learnability", ranges = { length = [0.1, 2.0] } }', "", "needs target, the return"),
        (
            '{ kind = "schedule", ranges = { length = [0.1, 2.0] }, start = { length = [0.05, 1.0] } }',
            "",
            r"must be within ranges\.length",
        ),
        (
            '{ kind = "schedule", ranges = { length = [0.1, 2.0] }, start = { mass = [0.5, 1.0] } }',
            "",
            "no argument of ranges, which has length",
        ),
        (
            '{ kind = "return", ranges = { length = [0.1, 2.0] }, start = { length = [1, 1] }, target = 9, floor = 9 }',
            "",
            r"floor = 9.*must be below target = 9",
        ),
        ("{ ranges = { length = [0.1, 2.0] } }", "kwargs = { length = 0.5 }", "both curriculum.ranges and kwargs"),
        (
            "{ ranges = { length = [0.1, 2.0] } }",
            "changes = [{ round = 2, kwargs = { length = 0.5 } }]",
            "both curriculum.ranges and changes",
        ),
        ("{ ranges = { max_episode_steps = [10, 20] } }", "", "no argument that may change from episode"),
    ],
)
def test_a_curriculum_that_contradicts_itself_is_refused(curriculum: str, more: str, error: str):
    with pytest.raises(ValueError, match=error):
        Scenario.loads(entry(curriculum, more))


@pytest.mark.parametrize(
    ("top", "error"),
    [
        ('objective = { preset = "grpo" }\ngroup = { by = "task" }', 'use group.by = "start"'),
        ('curriculum = { by = "server" }\nround = { mode = "buffered" }', 'round.mode = "sync"'),
        ('curriculum = { by = "server" }\nsteps = 8192\npersonal = { model = true }', 'use curriculum.by = "client"'),
    ],
)
def test_what_a_curriculum_cannot_be_combined_with_is_refused(top: str, error: str):
    text = entry('{ kind = "learnability", ranges = { length = [0.1, 2.0] }, target = 100 }', top=top)
    with pytest.raises(ValueError, match=error):
        Scenario.loads(text)


@pytest.mark.parametrize(
    ("env", "ranges", "error"),
    [
        (
            "grpo_fed/CartPole-v1",
            "{ lenght = [0.1, 2.0] }",
            'client x: curriculum.ranges: lenght.*did you mean "length"',
        ),
        ("grpo_fed/CartPole-v1", "{ swap_actions = [0, 1] }", "swap_actions: no number of grpo_fed/CartPole-v1"),
        (
            "grpo_fed/CartPole-v1",
            "{ length = [0.0, 2.0] }",
            "outside its limits.*at {'length': 0.0} of curriculum.ranges",
        ),
        ("Pendulum-v1", "{ gee = [1.0, 2.0] }", "it takes g .at {.gee.: 1.0} of curriculum.ranges"),
    ],
)
def test_levels_that_the_environment_cannot_have_are_refused(env: str, ranges: str, error: str):
    with pytest.raises(ValueError, match=error):
        resolve_gym_tasks(Scenario.loads(entry(f"{{ ranges = {ranges} }}", env=env)))
