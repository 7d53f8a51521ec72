"""Catch, with positions, rewards and pictures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_fed.tasks.families import FamilyVectorEnv
from grpo_fed.tasks.families.catch import BALLS, FLOOR, PIXELS, Catch
from grpo_fed.tasks.families.environments import FamilyEnv


def catch(state: list[float], action: int, **parameters: float) -> tuple[np.ndarray, float, bool]:
    """Take one step from a state (x, y, drift, paddle, left, ...before); new balls come in the middle at rest."""
    env = FamilyVectorEnv("grpo_fed/Catch-v0", **parameters)
    noise = np.array([[0.5, 0.5]])
    after, rewards, ended = Catch().step(np.array([state]), np.array([action]), env.constants, noise)
    return after[0], float(rewards[0]), bool(ended[0])


def test_a_ball_falls_and_drifts_and_the_paddle_moves():
    after, reward, ended = catch([10.0, 4.0, 0.5, 20.0, 5.0, 9.5, 2.0, 23.0], 2, fall=2.0, drift=3.0, reach=4.0)
    assert after.tolist() == [11.5, 6.0, 0.5, 24.0, 5.0, 10.0, 4.0, 20.0]
    assert (reward, ended) == (0.0, False)


def test_a_wall_turns_a_ball_and_stops_the_paddle():
    after, *_ = catch([2.0, 0.0, -1.0, 1.0, 5.0, 2.0, 0.0, 1.0], 0, fall=2.0, drift=1.0, reach=3.0)
    assert after[:4].tolist() == [1.5, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(("x", "reward"), [(25.5, 1.0), (14.5, 1.0), (25.6, -1.0)])
def test_a_ball_is_caught_within_the_paddles_width_and_its_own(x: float, reward: float):
    """The paddle at 20 reaches 4 pixels, and the ball 1.5."""
    after, *rest = catch([x, FLOOR - 1, 0.0, 20.0, 3.0, x, FLOOR - 3, 20.0], 1, width=4.0)
    assert rest == [reward, False]
    middle = (PIXELS - 1) / 2
    assert after.tolist() == [middle, 0.0, 0.0, 20.0, 2.0, middle, 0.0, 20.0]  # the next ball, with no frame before


def test_an_episode_ends_with_its_last_ball():
    state = [20.0, FLOOR - 1, 0.0, 20.0, 1.0, 20.0, FLOOR - 3, 20.0]
    assert catch(state, 1)[1:] == (1.0, True)


def test_following_the_ball_catches_all():
    env = FamilyVectorEnv("grpo_fed/Catch-v0", 4)
    env.reset(seed=3)
    returns = np.zeros(4)
    for _ in range(250):
        away = env.state[:, 0] - env.state[:, 3]
        _, rewards, *_ = env.step((1 + np.sign(away) * (np.abs(away) > 1.5)).astype(np.int64))
        returns += rewards
    assert returns.tolist() == [BALLS] * 4


def test_frames_show_the_ball_and_the_paddle_before_and_now():
    state = np.array([[10.0, 6.0, 0.0, 20.0, 5.0, 12.0, 4.0, 17.0]])
    env = FamilyVectorEnv("grpo_fed/Catch-v0", width=4.0)
    before, now = Catch().observe(state, env.constants)[0]
    for frame, (x, y, paddle) in ((before, (12, 4, 17)), (now, (10, 6, 20))):
        expected = np.zeros((PIXELS, PIXELS), np.uint8)
        expected[y - 1 : y + 2, x - 1 : x + 2] = 255
        expected[int(FLOOR) :, paddle - 4 : paddle + 5] = 255
        assert np.array_equal(frame, expected)
    negative = FamilyVectorEnv("grpo_fed/Catch-v0", width=4.0, negative=True)
    assert np.array_equal(Catch().observe(state, negative.constants)[0], 255 - np.stack((before, now)))


def test_pictures_have_no_entries_to_permute_and_no_sensor_noise():
    for name in ("permute", "sensor_noise"):
        with pytest.raises(ValueError, match=f"{name}: unknown parameter"):
            FamilyVectorEnv("grpo_fed/Catch-v0", **{name: 1})


def test_a_drawing_is_the_present_frame_enlarged():
    env = FamilyEnv("grpo_fed/Catch-v0", render_mode="rgb_array")
    observation, _ = env.reset(seed=1)
    drawn = env.render()
    assert drawn is not None
    assert np.array_equal(drawn[::6, ::6, 2], observation[-1])
    assert drawn.shape == (6 * PIXELS, 6 * PIXELS, 3)
