"""Running normalisers against stable-baselines3's on the same stream, and against numpy on all data at once."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from grpo_fed.rl.normalise import ObservationNormaliser, RewardNormaliser, RunningMoments


def test_observations_and_rewards_are_normalised_as_in_stable_baselines3():
    copies, gamma = 3, 0.9
    envs = DummyVecEnv([lambda: gymnasium.make("Pendulum-v1", max_episode_steps=7) for _ in range(copies)])
    theirs = VecNormalize(envs, gamma=gamma, clip_obs=1.5, clip_reward=2.0)
    theirs.seed(0)
    observations = ObservationNormaliser(1, 3, clip=1.5)
    rewards = RewardNormaliser(1, copies, gamma, clip=2.0)
    seen = theirs.reset()
    rng = np.random.default_rng(0)
    clipped = 0
    for _ in range(40):
        raw = theirs.get_original_obs()[None]
        observations.update(raw)
        np.testing.assert_allclose(observations.apply(raw)[0], seen, rtol=1e-6, atol=1e-6)
        seen, reward, done, _ = theirs.step(rng.uniform(-2, 2, (copies, 1)).astype(np.float32))
        np.testing.assert_allclose(rewards(theirs.get_original_reward()[None], done[None])[0], reward, rtol=1e-6)
        clipped += np.count_nonzero(np.abs(reward) == 2.0) + np.count_nonzero(np.abs(seen) == 1.5)
    assert clipped > 0
    np.testing.assert_allclose(rewards.moments.variance[0, 0], theirs.ret_rms.var, rtol=1e-12)
    np.testing.assert_allclose(observations.moments.count[0], theirs.obs_rms.count - copies, rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_of_batches_equal_those_of_all_samples(offset: float):
    rng = np.random.default_rng(1)
    data = offset + rng.normal(size=(2, 60, 3)) * [0.01, 1.0, 30.0]
    moments = RunningMoments(2, 3, prior=0.0)
    for batch in np.split(data, [1, 2, 10, 11, 50], axis=1):
        moments.update(batch)
    np.testing.assert_array_equal(moments.count, [60, 60])
    np.testing.assert_allclose(moments.mean, data.mean(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.variance, data.var(1), rtol=1e-6)


def test_moments_of_a_client_do_not_depend_on_other_clients():
    rng = np.random.default_rng(2)
    data = rng.normal(size=(3, 5, 4, 2)).astype(np.float32) * np.array([1, 10, 100])[:, None, None, None]
    together, alone = ObservationNormaliser(3, 2, 10.0), ObservationNormaliser(1, 2, 10.0)
    for t in range(5):
        together.update(data[:, t])
        alone.update(data[1:2, t])
        np.testing.assert_array_equal(together.apply(data[:, t])[1], alone.apply(data[1:2, t])[0])
    np.testing.assert_array_equal(together.apply_one(1, data[1, 0]), alone.apply(data[1:2, 0])[0])


def test_updating_one_client_leaves_the_others_unchanged():
    both, wanted = ObservationNormaliser(2, 1, 10.0), ObservationNormaliser(1, 1, 10.0)
    batch = np.array([[1.0], [4.0], [7.0]], np.float32)
    both.update_one(1, batch)
    both.update_one(1, batch[:0])
    wanted.update(batch[None])
    np.testing.assert_array_equal(both.moments.mean, [[0.0], wanted.moments.mean[0]])
    np.testing.assert_array_equal(both.moments.variance, [[1.0], wanted.moments.variance[0]])
    np.testing.assert_array_equal(both.moments.count, [1e-4, wanted.moments.count[0]])


def test_apply_leaves_the_moments_and_gives_float32():
    normaliser = ObservationNormaliser(1, 2, clip=3.0)
    normaliser.moments.mean[:], normaliser.moments.variance[:] = [[1.0, -2.0]], [[4.0, 0.25]]
    raw = np.array([[[3.0, -1.0], [1.0, 9.0]]])
    for _ in range(2):
        np.testing.assert_allclose(normaliser.apply(raw), [[[1.0, 2.0], [0.0, 3.0]]], rtol=1e-6)
    assert normaliser.apply(raw).dtype == np.float32
    np.testing.assert_array_equal(normaliser.apply(raw[:, None])[:, 0], normaliser.apply(raw))


def test_undo_inverts_apply_where_nothing_was_clipped():
    rng = np.random.default_rng(3)
    normaliser = ObservationNormaliser(2, 3, clip=100.0)
    raw = rng.normal(5.0, 3.0, (2, 4, 8, 3)).astype(np.float32)
    normaliser.update(raw.reshape(2, 32, 3))
    np.testing.assert_allclose(normaliser.undo(normaliser.apply(raw)), raw, rtol=1e-5)


def test_a_running_return_is_discounted_and_reset_at_an_end():
    normaliser = RewardNormaliser(1, 2, gamma=0.5, clip=10.0)
    ends = np.array([[False, False]])
    normaliser(np.array([[1.0, 4.0]]), ends)
    normaliser(np.array([[1.0, 4.0]]), np.array([[False, True]]))
    np.testing.assert_array_equal(normaliser.returns, [[1.5, 0.0]])
    normaliser(np.array([[2.0, 3.0]]), ends)
    np.testing.assert_array_equal(normaliser.returns, [[2.75, 3.0]])
    np.testing.assert_allclose(normaliser.moments.mean, np.mean([[1.0, 4.0, 1.5, 6.0, 2.75, 3.0]]), rtol=1e-4)


def test_invalid_rewards_do_not_change_the_moments():
    normaliser, wanted = (RewardNormaliser(2, 2, gamma=0.9, clip=10.0) for _ in range(2))
    rewards, ends = np.array([[1.0, 2.0], [3.0, 4.0]]), np.zeros((2, 2), bool)
    for one in (normaliser, wanted):
        one(rewards, ends)
    valid = np.array([[True, False], [False, False]])
    out = normaliser(rewards, ends, valid)
    np.testing.assert_array_equal(out == 0, ~valid)
    np.testing.assert_allclose(normaliser.returns, [[1.9, 2.0], [3.0, 4.0]])
    wanted.moments.update_one(0, np.array([[1.9]]))
    np.testing.assert_array_equal(normaliser.moments.variance, wanted.moments.variance)


def test_whole_episodes_update_the_moments_only_after_normalisation():
    rng = np.random.default_rng(5)
    whole, stepped = (RewardNormaliser(2, 3, gamma=0.9, clip=10.0) for _ in range(2))
    first = rng.normal(size=(2, 3))
    for normaliser in (whole, stepped):
        normaliser(first, np.ones((2, 3), bool))
    before = stepped.moments.variance.copy()
    rewards, lengths = rng.normal(size=(2, 6, 3)), np.array([[6, 1, 4], [0, 0, 0]])
    valid = np.arange(6)[:, None] < lengths[:, None]
    found = whole.whole_episodes(rewards, valid)
    np.testing.assert_allclose(found, np.where(valid, rewards / np.sqrt(before[..., None] + 1e-8), 0), rtol=1e-6)
    for t in range(6):
        stepped(rewards[:, t], np.zeros((2, 3), bool), valid[:, t])
    np.testing.assert_allclose(whole.moments.variance, stepped.moments.variance)
    np.testing.assert_allclose(whole.moments.mean, stepped.moments.mean)


def test_a_loaded_state_goes_on_bit_for_bit():
    rng = np.random.default_rng(4)
    old, new = RewardNormaliser(2, 3, 0.9, 10.0), RewardNormaliser(1, 3, 0.9, 10.0)
    stream, ends = rng.normal(size=(10, 2, 3)), rng.random((10, 2, 3)) < 0.2
    for t in range(5):
        old(stream[t], ends[t])
    new.load(0, old.state(1))
    for t in range(5, 10):
        np.testing.assert_array_equal(old(stream[t], ends[t])[1:], new(stream[t, 1:], ends[t, 1:]))
    first, second = ObservationNormaliser(2, 4, 5.0), ObservationNormaliser(2, 4, 5.0)
    first.update(rng.normal(size=(2, 6, 4)))
    second.load(0, first.state(1))
    raw = rng.normal(size=(2, 3, 4))
    np.testing.assert_array_equal(second.apply(raw)[0], first.apply(raw[::-1])[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": np.zeros(3)}, r"mean must be finite and of shape \(2,\)"),
        ({"variance": np.array([1.0, np.nan])}, "variance must be finite"),
        ({"variance": np.array([1.0, -1.0])}, "must not be negative"),
        ({"more": np.zeros(1)}, "its state has"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_without_a_change(change: dict[str, np.ndarray], said: str):
    normaliser = ObservationNormaliser(1, 2, 10.0)
    with pytest.raises(ValueError, match=said):
        normaliser.load(0, {**normaliser.state(0), **change})
    np.testing.assert_array_equal(normaliser.moments.mean, [[0.0, 0.0]])
    np.testing.assert_array_equal(normaliser.moments.variance, [[1.0, 1.0]])
