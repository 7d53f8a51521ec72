"""Advantages against plain loops, against stable-baselines3 and against numbers by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from grpo_fed.rl.advantages import (
    Score,
    episode_returns,
    equal_groups,
    gae,
    group_advantages,
    learning_targets,
    normalise_advantages,
    step_weights,
)
from grpo_fed.rl.episode_groups import similarity_groups
from grpo_fed.rl.records import Batch
from grpo_fed.scenario.scenario import Scenario

SCORES = get_args(Score)
UNHURRIED = settings(deadline=None, max_examples=50)


def random_fields(seed: int, clients: int = 2, steps: int = 13, copies: int = 3) -> dict[str, Tensor]:
    """A batch's fields for `gae`, [K, T, N] float64, with ends and invalid steps."""
    generator = torch.Generator().manual_seed(seed)

    def numbers() -> Tensor:
        return torch.randn(clients, steps, copies, generator=generator, dtype=torch.float64)

    return {
        "rewards": numbers(),
        "values": numbers(),
        "next_values": numbers(),
        "ends": torch.rand(clients, steps, copies, generator=generator) < 0.2,
        "valid": torch.rand(clients, steps, copies, generator=generator) < 0.8,
    }


def gae_by_loop(fields: dict[str, Tensor], gamma: float, lam: float) -> Tensor:
    """Backwards, one step of one copy at a time."""
    rewards, values, following, ends, valid = (fields[n] for n in ("rewards", "values", "next_values", "ends", "valid"))
    advantages = torch.zeros_like(rewards)
    clients, steps, copies = rewards.shape
    for k in range(clients):
        for n in range(copies):
            carried = 0.0
            for t in reversed(range(steps)):
                if not valid[k, t, n]:
                    carried = 0.0
                    continue
                if ends[k, t, n]:
                    carried = 0.0
                delta = rewards[k, t, n] + gamma * following[k, t, n] - values[k, t, n]
                carried = float(delta + gamma * lam * carried)
                advantages[k, t, n] = carried
    return advantages


@UNHURRIED
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_gae_is_the_backward_recursion(seed: int, steps: int, gamma: float, lam: float) -> None:
    fields = random_fields(seed, steps=steps)
    torch.testing.assert_close(gae(**fields, gamma=gamma, lam=lam), gae_by_loop(fields, gamma, lam))


def test_gae_matches_a_worked_example() -> None:
    # Two steps of one episode, then one of the next: delta = 1 + 0.5 * 4 - 2 = 1, 2 + 0 - 4 = -2, 3 + 0.5 * 2 - 1 = 3.
    column = (1, 3, 1)
    found = gae(
        rewards=torch.tensor([1.0, 2.0, 3.0]).view(column),
        values=torch.tensor([2.0, 4.0, 1.0]).view(column),
        next_values=torch.tensor([4.0, 0.0, 2.0]).view(column),
        ends=torch.tensor([False, True, False]).view(column),
        valid=torch.ones(column, dtype=torch.bool),
        gamma=0.5,
        lam=0.5,
    )
    assert found.flatten().tolist() == [0.5, -2.0, 3.0]


def test_gae_is_that_of_stable_baselines3() -> None:
    steps, copies, gamma, lam = 64, 4, 0.98, 0.9
    rng = np.random.default_rng(0)
    rewards, values = (rng.standard_normal((steps, copies)).astype(np.float32) for _ in range(2))
    last, final = (
        rng.standard_normal(copies).astype(np.float32),
        rng.standard_normal((steps, copies)).astype(np.float32),
    )
    terminated = rng.random((steps, copies)) < 0.1
    truncated = (rng.random((steps, copies)) < 0.1) & ~terminated
    ends = terminated | truncated

    space = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(steps, space, space, "cpu", gae_lambda=lam, gamma=gamma, n_envs=copies)
    started = np.ones(copies, np.float32)
    for t in range(steps):
        # As its `collect_rollouts` does where an episode is cut: what would have come is put into the reward.
        paid = rewards[t] + gamma * final[t] * truncated[t]
        nothing = np.zeros((copies, 1), np.float32)
        buffer.add(nothing, nothing, paid, started, torch.from_numpy(values[t]), torch.zeros(copies))
        started = ends[t].astype(np.float32)
    buffer.compute_returns_and_advantage(torch.from_numpy(last), ends[-1])

    following = np.concatenate((values[1:], last[None]))
    following = np.where(terminated, 0.0, np.where(truncated, final, following)).astype(np.float32)
    arrays = (rewards, values, following, ends, np.ones_like(ends))
    found = gae(*(torch.from_numpy(array)[None] for array in arrays), gamma, lam)[0]
    np.testing.assert_allclose(found.numpy(), buffer.advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose((found + torch.from_numpy(values)).numpy(), buffer.returns, rtol=1e-5, atol=1e-5)


def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value() -> None:
    fields = random_fields(4)
    fields["valid"][:] = True
    fields["ends"][:] = False
    fields["next_values"] = torch.cat((fields["values"][:, 1:], torch.zeros_like(fields["values"][:, :1])), 1)
    returns = torch.zeros_like(fields["rewards"])
    carried = torch.zeros_like(returns[:, 0])
    for t in reversed(range(returns.shape[1])):
        carried = fields["rewards"][:, t] + 0.9 * carried
        returns[:, t] = carried
    torch.testing.assert_close(gae(**fields, gamma=0.9, lam=1.0), returns - fields["values"])


def test_invalid_steps_do_not_affect_the_advantages() -> None:
    fields = random_fields(1)
    before = gae(**fields, gamma=0.99, lam=0.95)
    for name in ("rewards", "values", "next_values"):
        fields[name][~fields["valid"]] = torch.nan
    fields["ends"][~fields["valid"]] = True
    after = gae(**fields, gamma=0.99, lam=0.95)
    assert torch.equal(before, after)
    assert (after[~fields["valid"]] == 0).all()


def test_no_advantage_flows_back_across_an_end() -> None:
    fields = random_fields(2)
    fields["ends"][:, 6] = True
    before = gae(**fields, gamma=0.99, lam=0.95)
    for name in ("rewards", "values", "next_values"):
        fields[name][:, 7:] += 5.0
    after = gae(**fields, gamma=0.99, lam=0.95)
    assert torch.equal(before[:, :7], after[:, :7])


def test_advantages_of_clients_are_independent() -> None:
    fields = random_fields(3)
    together = gae(**fields, gamma=0.99, lam=0.95)
    alone = gae(**{name: field[1:] for name, field in fields.items()}, gamma=0.99, lam=0.95)
    assert torch.equal(together[1:], alone)


def test_episode_returns_match_a_worked_example() -> None:
    # Copy 0 plays episode 0 for two steps and then 2; copy 1 plays 1, and its last step is not real.
    episodes = torch.tensor([[0, 1], [0, 1], [2, 1]])[None]
    rewards = torch.tensor([[1.0, 4.0], [2.0, 8.0], [3.0, torch.nan]])[None]
    valid = torch.tensor([[True, True], [True, True], [True, False]])[None]
    assert episode_returns(rewards, episodes, valid, 1.0, 4).tolist() == [[3.0, 12.0, 3.0, 0.0]]
    assert episode_returns(rewards, episodes, valid, 0.5, 4).tolist() == [[2.0, 8.0, 3.0, 0.0]]


def test_the_discount_begins_with_the_first_valid_step() -> None:
    rewards = torch.tensor([9.0, 1.0, 9.0, 1.0]).view(1, 4, 1)
    valid = torch.tensor([False, True, False, True]).view(1, 4, 1)
    episodes = torch.zeros(1, 4, 1, dtype=torch.int64)
    assert episode_returns(rewards, episodes, valid, 0.5, 1).item() == 1.5


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        # Returns 1, 2, 6: mean 3, squared distances 4, 1, 9, unbiased variance 7.
        ("centre", [-2.0, -1.0, 3.0]),
        ("zscore", [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]),
        ("leave-one-out", [1 - 4.0, 2 - 3.5, 6 - 1.5]),
        ("rank", [-1.0, 0.0, 1.0]),
    ],
)
def test_scores_match_a_worked_example(score: Score, expected: list[float]) -> None:
    # The group of interest stands among others: a pair, a single one, and a place where there is no episode.
    returns = torch.tensor([[1.0, 10.0, 2.0, 50.0, torch.nan, 6.0, 20.0]])
    groups = torch.tensor([[0, 1, 0, 2, -1, 0, 1]])
    found = group_advantages(returns, groups, score)[0]
    assert found[[0, 2, 5]].tolist() == pytest.approx(expected)
    assert found[[3, 4]].tolist() == [0.0, 0.0]
    pair = {"centre": 5.0, "zscore": 0.5**0.5, "leave-one-out": 10.0, "rank": 1.0}[score]
    assert found[[1, 6]].tolist() == pytest.approx([-pair, pair])


def test_ties_share_their_rank() -> None:
    found = group_advantages(torch.tensor([[5.0, 1.0, 5.0, 9.0]]), torch.zeros(1, 4, dtype=torch.int64), "rank")
    # 5 beats one and loses to one of three others; 1 loses to all; 9 beats all.
    assert found[0].tolist() == [0.0, -1.0, 0.0, 1.0]


@UNHURRIED
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=9))
def test_leave_one_out_is_the_return_minus_the_mean_of_the_others(numbers: list[float]) -> None:
    returns = torch.tensor([numbers], dtype=torch.float64)
    found = group_advantages(returns, torch.zeros_like(returns, dtype=torch.int64), "leave-one-out")[0]
    for i, mine in enumerate(numbers):
        others = numbers[:i] + numbers[i + 1 :]
        assert found[i].item() == pytest.approx(mine - sum(others) / len(others), abs=3e-4)


@UNHURRIED
@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 9), st.sampled_from(SCORES))
def test_equal_returns_give_no_advantage(number: float, size: int, score: Score) -> None:
    returns = torch.full((2, size), number)
    assert torch.equal(group_advantages(returns, torch.zeros(2, size, dtype=torch.int64), score), torch.zeros(2, size))


@pytest.mark.parametrize("score", SCORES)
def test_returns_that_differ_by_rounding_alone_are_equal(score: Score) -> None:
    returns = torch.tensor([[100.0, 100.0 + 1e-5, 100.0 - 1e-5]])
    assert not torch.equal(returns, returns.mean().expand(1, 3))
    assert torch.equal(group_advantages(returns, torch.zeros(1, 3, dtype=torch.int64), score), torch.zeros(1, 3))


@UNHURRIED
@given(st.integers(0, 2**31), st.sampled_from(SCORES))
def test_groups_do_not_affect_each_other(seed: int, score: Score) -> None:
    generator = torch.Generator().manual_seed(seed)
    returns = torch.randn(3, 12, generator=generator)
    groups = torch.randint(-1, 4, (3, 12), generator=generator)
    found = group_advantages(returns, groups, score)
    for k in range(3):
        for group in range(4):
            members = groups[k] == group
            if members.any():
                alone = group_advantages(returns[k, members][None], groups[k, members][None], score)
                torch.testing.assert_close(found[k, members], alone[0])
        assert (found[k, groups[k] < 0] == 0).all()
    sums = torch.zeros(3, 5).scatter_add_(1, groups + 1, found)
    assert sums.abs().max() < 1e-5


@UNHURRIED
@given(st.permutations(range(8)), st.sampled_from(["zscore", "rank"]), st.floats(0.01, 100), st.floats(-50, 50))
def test_zscore_and_rank_ignore_scale_and_shift(order: list[int], score: Score, scale: float, shift: float) -> None:
    returns, groups = torch.tensor([order], dtype=torch.float64), torch.zeros(1, 8, dtype=torch.int64)
    moved = group_advantages(returns * scale + shift, groups, score)
    torch.testing.assert_close(moved, group_advantages(returns, groups, score), rtol=1e-6, atol=1e-6)


@UNHURRIED
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(0, 5))
def test_equal_weights_normalise_by_mean_and_standard_deviation(seed: int, count: int, idle: int) -> None:
    advantages = 3 + 5 * torch.randn(
        2, count + idle, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    weights = torch.zeros_like(advantages)
    weights[:, :count] = 0.3 / count
    mine = advantages[:, :count]
    expected = (mine - mine.mean(1, keepdim=True)) / (mine.std(1, keepdim=True) + 1e-8)
    torch.testing.assert_close(normalise_advantages(advantages, weights)[:, :count], expected, rtol=1e-6, atol=1e-6)


def test_weighted_normalisation_matches_a_worked_example() -> None:
    # Weights 1/4, 1/4, 1/2: mean 1/4 * 1 + 1/4 * 5 + 1/2 * 3 = 3; sum w c^2 = 2; 1 - sum w^2 = 5/8; variance 3.2.
    found = normalise_advantages(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[0.25, 0.25, 0.5]]))
    assert found[0].tolist() == pytest.approx([-2 / 3.2**0.5, 2 / 3.2**0.5, 0.0])


@pytest.mark.parametrize("number", [0.0, 1.0, -3.0])
def test_a_single_advantage_normalises_to_zero(number: float) -> None:
    found = normalise_advantages(torch.tensor([[number, 9.0]]), torch.tensor([[1.0, 0.0]]))
    assert found[0, 0] == 0
    assert found.isfinite().all()


def test_equal_groups_are_those_without_an_advantage() -> None:
    returns = torch.tensor([[1.0, 1.0, 0.0, 1.0, 7.0, 3.0]])
    groups = torch.tensor([[0, 0, 1, 1, 2, -1]])
    assert equal_groups(returns, groups).tolist() == [[True, True, False, False, True, False]]
    assert not equal_groups(returns, torch.full_like(groups, -1)).any()


@pytest.mark.parametrize(("equal", "expected"), [("keep", [1 / 8] * 4), ("skip", [0.0, 0.0, 1 / 4, 1 / 4])])
def test_groups_with_equal_returns_are_kept_or_skipped(equal: str, expected: list[float]) -> None:
    """Two steps of four copies, whose first two have equal returns."""
    zeros = torch.zeros(1, 2, 4)
    rewards = torch.tensor([[[1.0, 0.0, 0.0, 5.0], [0.0, 1.0, 0.0, 0.0]]])
    batch = Batch(
        **dict.fromkeys(("observations", "actions", "distribution"), zeros[..., None]),
        **dict.fromkeys(("log_probs", "values", "next_values"), zeros),
        rewards=rewards,
        ends=zeros.bool(),
        valid=~zeros.bool(),
        episodes=torch.arange(4).expand(1, 2, 4),
    )
    text = 'name = "x"\nclients = [{ name = "c", env = "CartPole-v1" }]'
    overrides = ["objective.preset=dr-grpo", "objective.average=step", f"group.equal={equal}"]
    scenario = Scenario.loads(text, overrides=overrides)
    found = learning_targets(batch, torch.tensor([[0, 0, 1, 1]]), torch.tensor([2]), scenario)
    assert found.advantages[0].tolist() == [[0.0, 0.0, -2.5, 2.5]] * 2
    assert found.weights[0].tolist() == [expected] * 2


def test_step_weights_match_a_worked_example() -> None:
    # Episode 0 has one step, episode 1 three; the second copy's first step is not real, and its id means nothing.
    episodes = torch.tensor([[0, 99], [1, 1], [1, 1]])[None]
    valid = torch.tensor([[True, False], [True, True], [True, False]])[None]
    third, longest = 1 / 3, torch.tensor([3])
    assert step_weights(episodes, valid, "step", longest)[0].tolist() == [[0.25, 0.0], [0.25, 0.25], [0.25, 0.0]]
    by_episode = torch.tensor([[0.5, 0.0], [0.5 * third, 0.5 * third], [0.5 * third, 0.0]])
    torch.testing.assert_close(step_weights(episodes, valid, "episode", longest)[0], by_episode)
    # Dr. GRPO: two episodes that could have been three steps long each.
    torch.testing.assert_close(step_weights(episodes, valid, "total", longest)[0], valid[0].float() / 6)


@pytest.mark.parametrize("average", ["step", "episode", "total"])
def test_a_client_without_a_valid_step_has_no_weight(average: str) -> None:
    episodes = torch.zeros(2, 4, 1, dtype=torch.int64)
    valid = torch.tensor([[False] * 4, [True] * 4]).unsqueeze(-1)
    weights = step_weights(episodes, valid, average, torch.tensor([4]))  # type: ignore[arg-type]
    assert weights.sum((1, 2)).tolist() == [0.0, 1.0]


def test_similar_episodes_are_grouped() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = np.repeat(np.arange(3), 10)
    features = torch.from_numpy(centres[truth] + 0.1 * rng.standard_normal((30, 2))).float()
    for seed in range(10):
        groups = similarity_groups(features, 3, np.random.default_rng(seed)).numpy()
        assert len({(int(a), int(b)) for a, b in zip(truth, groups, strict=True)}) == 3


def test_the_same_seed_gives_the_same_groups() -> None:
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    first, second = (similarity_groups(features, 5, np.random.default_rng(1)) for _ in range(2))
    assert first.dtype == torch.int64
    assert torch.equal(first, second)


def test_there_are_no_more_groups_than_different_features() -> None:
    features = torch.tensor([[1.0], [1.0], [2.0], [2.0], [2.0]])
    groups = similarity_groups(features, 4, np.random.default_rng(0)).tolist()
    assert groups[0] == groups[1] != groups[2] == groups[3] == groups[4]
    assert set(groups) == {0, 1}


def test_each_feature_is_in_the_group_of_the_nearest_centre() -> None:
    features = torch.randn(60, 2, generator=torch.Generator().manual_seed(2))
    groups = similarity_groups(features, 4, np.random.default_rng(0))
    centres = torch.stack([features[groups == group].mean(0) for group in range(4)])
    assert torch.equal(torch.cdist(features, centres).argmin(1), groups)
