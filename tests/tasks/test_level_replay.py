"""Replay of levels that seeds name: chances, draws and what is remembered, by hand; and episodes that begin alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import CurriculumSettings
from grpo_fed.tasks.curriculum import EPISODE_SEED, Curriculum, describe_state, draw_levels
from grpo_fed.tasks.envs import make_client_envs
from grpo_fed.tasks.level_replay import draw_seeds, no_seeds, remember_scores, replay_chances, values_of_seeds
from grpo_fed.tasks.resolve import resolve_gym_tasks


def settings(**values: Any) -> CurriculumSettings:
    return CurriculumSettings(kind="replay", **{"levels": 3, **values})


STATE = np.array([12.0, 8, 0, 0.5, 2.0, 0, 4, 3, 0])  # seed 11 with score 0.5 in round 4, seed 7 with 2 in round 3


def test_nothing_is_replayed_before_anything_was_played():
    assert replay_chances(settings(), no_seeds(settings())).tolist() == [0, 0, 0]
    seeds = draw_seeds(settings(explore=0.0), no_seeds(settings()), np.random.default_rng(0), 100)
    assert len(set(seeds.tolist())) == 100
    assert ((seeds >= 0) & (seeds < 2**31)).all()


def test_chances_go_by_rank_and_by_staleness():
    # ranks 2 and 1: weights 1/4 and 1 at temperature 1/2; rounds since they were played 0 and 1
    chances = replay_chances(settings(temperature=0.5, staleness=0.3), STATE)
    np.testing.assert_allclose(chances, [0.7 * 0.2, 0.7 * 0.8 + 0.3, 0])
    as_old = STATE.copy()
    as_old[6:8] = 4  # staleness is 0 for both
    np.testing.assert_allclose(
        replay_chances(settings(temperature=0.5, staleness=0.3), as_old), [0.14 + 0.15, 0.56 + 0.15, 0]
    )


def test_a_part_of_the_copies_plays_new_seeds():
    seeds = draw_seeds(settings(explore=0.25), STATE, np.random.default_rng(0), 8)
    assert not {7, 11} & set(seeds[:2].tolist())
    assert set(seeds[2:].tolist()) <= {7, 11}


def test_draws_have_their_chances():
    given = settings(explore=0.0, temperature=0.5, staleness=0.3)
    seeds = draw_seeds(given, STATE, np.random.default_rng(0), 4000)
    assert abs((seeds == 11).sum() - 4000 * 0.14) < 5 * np.sqrt(4000 * 0.14 * 0.86)


def test_the_levels_with_the_highest_scores_stay():
    state = remember_scores(settings(), STATE, np.array([7.0, 30.0]), np.array([0.1, 0.3]))
    assert state.reshape(3, -1).tolist() == [[12, 8, 31], [0.5, 0.1, 0.3], [4, 5, 5]]
    full = remember_scores(settings(), state, np.array([40.0, 41.0]), np.array([0.4, 0.1]))
    assert full.reshape(3, -1).tolist() == [[12, 31, 41], [0.5, 0.3, 0.4], [4, 5, 6]]
    # of equal scores those that were known first stay
    same = remember_scores(settings(levels=2), np.array([5.0, 6, 1, 1, 1, 1]), np.array([9.0]), np.array([1.0]))
    assert same.reshape(2 + 1, -1).tolist() == [[5, 6], [1, 1], [1, 1]]


def test_a_seed_stands_for_the_same_values_every_time():
    low, high = np.array([0.0, 10.0]), np.array([1.0, 20.0])
    values = values_of_seeds(np.array([3.0, 4.0, 3.0]), low, high)
    assert values[0].tolist() == values[2].tolist() != values[1].tolist()
    assert ((values >= low) & (values <= high)).all()
    assert values_of_seeds(np.array([3.0]), np.zeros(0), np.zeros(0)).shape == (1, 0)


def test_a_level_has_a_seed_and_the_values_that_it_stands_for():
    curriculum = Curriculum(settings(ranges={"length": [0.1, 2.0]}, explore=0.0))
    levels = draw_levels(curriculum, STATE, 0.0, np.random.default_rng(0), 6)
    assert curriculum.level_names == (EPISODE_SEED, "length")
    for seed, length in levels.tolist():
        assert length == values_of_seeds(np.array([seed]), np.array([0.1]), np.array([2.0]))[0, 0]
    assert describe_state(curriculum, STATE, 0.0) == {
        "curriculum/size": 1.0,
        "curriculum_low/length": 0.1,
        "curriculum_high/length": 2.0,
        "curriculum/score": 1.25,
    }


@pytest.mark.parametrize("wrappers", ["", 'wrappers = ["gymnasium.wrappers:RecordEpisodeStatistics"]'])
def test_episodes_of_a_level_begin_alike_and_are_continued(wrappers: str):
    text = f'name = "a"\n[[clients]]\nname = "x"\nenv = "grpo_fed/CartPole-v1"\n{wrappers}\n'
    (task,) = resolve_gym_tasks(Scenario.loads(f'{text}curriculum = {{ kind = "replay" }}\n'))
    played, resumed = make_client_envs([task], 2), make_client_envs([task], 2)
    streams = np.array([1, 2], np.uint64)
    levels = {0: {EPISODE_SEED: 5.0}, 1: {EPISODE_SEED: 6.0}}
    for envs in (played, resumed):
        envs.set_levels(levels)
    first, begins = played.reset(streams), [[], []]
    assert not np.array_equal(first[0], first[1])
    taken: list[list[list[float]]] = [[], []]
    for t in range(60):
        step = played.step(np.full((2, 1), float(t % 3 > 0)))
        for copy in range(2):
            taken[copy].append([float(t % 3 > 0)])
            if step.terminated[copy]:
                begins[copy].append(step.observations[copy])
                taken[copy] = []
    for copy in range(2):
        assert len(begins[copy]) > 1
        for seen in begins[copy]:
            np.testing.assert_array_equal(seen, first[copy])
    numbers = np.array([len(each) for each in begins])
    actions = [np.array(each, np.float32).reshape(-1, 1) for each in taken]
    np.testing.assert_array_equal(resumed.resume(streams, numbers, actions), step.observations)
    for envs in (played, resumed):
        envs.close()


@pytest.mark.parametrize(
    ("top", "error"),
    [
        ('objective = { preset = "grpo" }', r"the errors of the critic, and there is none: use objective.advantage"),
        ('curriculum = { by = "server" }', r'a server steers by returns alone: use curriculum.by = "client"'),
    ],
)
def test_replay_needs_a_critic_and_stays_with_the_client(top: str, error: str):
    text = f'name = "a"\n{top}\n[[clients]]\nname = "x"\nenv = "CartPole-v1"\ncurriculum = {{ kind = "replay" }}\n'
    with pytest.raises(ValueError, match=error):
        Scenario.loads(text)
