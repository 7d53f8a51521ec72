"""A limit on costs: the multiplier and the advantages by hand, the critic of costs, and runs that keep the limit."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from grpo_fed.rl.advantages import learning_targets, with_costs
from grpo_fed.rl.client_stack import COST_CRITIC, COST_MULTIPLIER
from grpo_fed.rl.constraints import adapt_cost_multiplier, adapt_costs
from grpo_fed.rl.cost_critic import CostCritic
from grpo_fed.rl.make import make_learners
from grpo_fed.rl.records import Batch, Episode, Minibatch
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.settings import CostSettings

TEMPTATION = """
name = "a"
rounds = 30
steps = 512
[policy]
hidden = [8]
[rollout]
num_envs = 8
horizon = 32
[objective]
learning_rate = 0.01
epochs = 4
minibatches = 2
[[clients]]
name = "tempted"
env = "Temptation-v0"
count = 2
"""
LIMIT = ["objective.cost.limit=2", "objective.cost.rate=0.02"]


class Temptation(gymnasium.Env):
    """Episodes of eight steps; action 1 is rewarded with 1, 7/8, ... 1/8 and costs 1, action 0 neither."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        seen = np.float32([self.steps / 8])
        return seen, float(action) * (9 - self.steps) / 8, self.steps == 8, False, {"cost": float(action)}


gymnasium.register("Temptation-v0", Temptation, max_episode_steps=8)


def scenario(*overrides: str, text: str = TEMPTATION) -> Scenario:
    return Scenario.loads(text, overrides=overrides)


def learner_of(*overrides: str, text: str = TEMPTATION) -> StackedLearner:
    (learner,) = make_learners(scenario(*overrides, text=text))
    assert isinstance(learner, StackedLearner)
    return learner


# Numbers by hand -----------------------------------------------------------------------------------------------------


def test_a_multiplier_rises_by_the_excess_and_stays_at_zero_or_above() -> None:
    """0.1 + 0.05 (3 - 1) = 0.2; 0.02 + 0.05 (0 - 1) is below 0; where no episode has ended it stays."""
    found = adapt_cost_multiplier(torch.tensor([0.1, 0.02, 0.3]), torch.tensor([3.0, 0.0, math.nan]), 1.0, 0.05)
    assert found.tolist() == pytest.approx([0.2, 0.0, 0.3])


def test_a_multiplier_follows_its_own_clients_mean_cost_while_it_trains() -> None:
    """Costs 2 and 6, limit 3, rate 0.1: 0.1 (4 - 3) = 0.1. The second has no episode, the third waits."""
    multiplier = torch.zeros(3)
    episodes = [[Episode(1.0, 5, True, cost) for cost in costs] for costs in ((2.0, 6.0), (), (9.0,))]
    adapt_costs(multiplier, episodes, np.array([True, True, False]), CostSettings(limit=3, rate=0.1))
    assert multiplier.tolist() == pytest.approx([0.1, 0.0, 0.0])


def test_costs_are_taken_off_at_their_price() -> None:
    """(2 - 0.5 * 3) / 1.5 = 1/3, and at the price 0 nothing is."""
    found = with_costs(torch.full((2, 1, 1), 2.0), torch.full((2, 1, 1), 3.0), torch.tensor([0.5, 0.0]))
    assert found.flatten().tolist() == pytest.approx([1 / 3, 2.0])


def random_batch(clients: int = 2, steps: int = 6, copies: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(4)

    def numbers() -> Tensor:
        return torch.randn(clients, steps, copies, generator=generator)

    ends = torch.rand(clients, steps, copies, generator=generator) < 0.3
    number = ends.cumsum(1) - ends.long()
    return Batch(
        observations=numbers().unsqueeze(-1),
        actions=numbers().unsqueeze(-1),
        log_probs=numbers(),
        distribution=numbers().unsqueeze(-1),
        values=numbers(),
        next_values=numbers(),
        rewards=numbers(),
        ends=ends,
        valid=torch.ones(clients, steps, copies, dtype=torch.bool),
        episodes=number * copies + torch.arange(copies),
        costs=numbers().abs(),
        cost_values=numbers(),
        next_cost_values=numbers(),
    )


def backward_gae(rewards: Tensor, values: Tensor, following: Tensor, ends: Tensor, gamma: float, lam: float) -> Tensor:
    """The recursion of 1506.02438 from the last step to the first, one number at a time."""
    found = torch.zeros_like(rewards)
    for k, n in np.ndindex(rewards.shape[0], rewards.shape[2]):
        after = 0.0
        for t in reversed(range(rewards.shape[1])):
            delta = float(rewards[k, t, n] + gamma * following[k, t, n] - values[k, t, n])
            after = delta + (0.0 if ends[k, t, n] else gamma * lam * after)
            found[k, t, n] = after
    return found


def test_advantages_are_of_reward_less_cost_before_they_are_normalised() -> None:
    given = scenario(*LIMIT, "objective.normalise_advantages=batch", "objective.gamma=0.9", "objective.gae_lambda=0.8")
    batch, price = random_batch(), torch.tensor([0.7, 0.0])
    targets = learning_targets(batch, None, torch.tensor([8, 8]), given, price)
    of_rewards = backward_gae(batch.rewards, batch.values, batch.next_values, batch.ends, 0.9, 0.8)
    of_costs = backward_gae(batch.costs, batch.cost_values, batch.next_cost_values, batch.ends, 0.9, 0.8)
    combined = torch.stack([(of_rewards[0] - 0.7 * of_costs[0]) / 1.7, of_rewards[1]]).flatten(1)
    expected = (combined - combined.mean(1, keepdim=True)) / (combined.std(1, keepdim=True) + 1e-8)
    torch.testing.assert_close(targets.advantages.flatten(1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(targets.returns, of_rewards + batch.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(targets.cost_returns, of_costs + batch.cost_values, rtol=1e-4, atol=1e-5)


def test_episodes_of_a_group_are_judged_by_return_less_cost() -> None:
    """One client, one step each: returns 1, 2, 3 and costs 0, 0, 4 at the price 0.5 are (1, 2, 1) / 1.5.

    Against the mean of the others: 2/3 - 1, 4/3 - 2/3 and 2/3 - 1.
    """
    given = scenario(*LIMIT, "objective.preset=rloo", "group.by=task")
    ones = torch.ones(1, 1, 3)
    batch = Batch(
        **dict.fromkeys(("log_probs", "values", "next_values"), ones),
        observations=ones[..., None],
        actions=ones[..., None],
        distribution=ones[..., None],
        rewards=torch.tensor([[[1.0, 2.0, 3.0]]]),
        ends=ones.bool(),
        valid=ones.bool(),
        episodes=torch.arange(3).view(1, 1, 3),
        costs=torch.tensor([[[0.0, 0.0, 4.0]]]),
    )
    groups = torch.zeros(1, 3, dtype=torch.long)
    targets = learning_targets(batch, groups, torch.tensor([8]), given, torch.tensor([0.5]))
    assert targets.advantages.flatten().tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3], abs=1e-6)
    assert targets.cost_returns is None


# The critic of costs -------------------------------------------------------------------------------------------------


def test_the_critic_of_costs_learns_as_a_plain_network_does() -> None:
    """Written out with nn.Linear, autograd, clip_grad_norm_ and torch.optim.Adam, one client at a time."""
    given = scenario(*LIMIT, "policy.hidden=[5, 4]", "objective.max_grad_norm=0.2")
    critic = CostCritic.start(given, [3, 8], 2, torch.device("cpu"))
    assert not torch.equal(critic.parameters[0], critic.parameters[1])
    generator = torch.Generator().manual_seed(0)
    observations, returns, weights = (
        torch.randn(2, 7, 2, generator=generator),
        torch.randn(2, 7, generator=generator),
        torch.rand(2, 7, generator=generator),
    )
    assert not critic.values(observations).any()
    first = critic.parameters.clone()
    none = torch.zeros(2, 7)
    for _ in range(3):
        part = Minibatch(observations, none, none, none, none, returns, none, weights)
        critic.fit(part, np.array([[0.05], [0.01]]), None)
    for client, rate in enumerate((0.05, 0.01)):
        layers = [nn.Linear(2, 5), nn.Linear(5, 4), nn.Linear(4, 1)]
        values = first[client].split([10, 5, 20, 4, 4, 1])
        for layer, weight, bias in zip(layers, values[::2], values[1::2], strict=True):
            layer.weight.data = weight.view(layer.in_features, layer.out_features).T.contiguous()
            layer.bias.data = bias.clone()
        network = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
        adam = torch.optim.Adam(network.parameters(), lr=rate, eps=1e-5)
        for _ in range(3):
            adam.zero_grad()
            error = network(observations[client])[:, 0] - returns[client]
            (weights[client] * error.square()).sum().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.2)
            adam.step()
        with torch.no_grad():
            expected = network(observations[client])[:, 0]
        torch.testing.assert_close(critic.values(observations)[client], expected, rtol=1e-4, atol=1e-5)


def test_a_critic_of_costs_foresees_them() -> None:
    """With gamma = 1 and lambda = 1, an action of probability p costs p in each of the 8 - t steps to come."""
    overrides = ["objective.gamma=1", "objective.gae_lambda=1", "objective.surrogate=ratio", "objective.cost.rate=1e-9"]
    learner = learner_of(*LIMIT[:1], *overrides, "policy.freeze=['torso.*', 'actor']")
    for _ in range(20):
        learner.train(512)
    assert learner.cost_critic is not None
    steps = torch.arange(8.0)
    values = learner.cost_critic.values((steps / 8).expand(2, 8).unsqueeze(-1))
    assert (values - (8 - steps) / 2).abs().max() < 0.6
    learner.close()


# Learning ------------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_costs_of_its_episodes_and_the_first_update_their_price() -> None:
    learner = learner_of(*LIMIT)
    (report, _) = learner.train(1)
    costs = [episode.cost for episode in report.episodes]
    assert report.metrics()["charts/episodic_cost"] == pytest.approx(np.mean(costs))
    expected = 0.02 * (np.mean(costs) - 2)
    assert expected > 0
    assert report.more["charts/cost_multiplier"] == pytest.approx(expected, rel=1e-5)
    assert learner.state(0)[COST_MULTIPLIER].tolist() == pytest.approx([expected], rel=1e-5)
    learner.close()


def test_an_episode_costs_what_all_of_its_steps_did_across_batches() -> None:
    """With a horizon of 3, an episode of eight steps lies in three batches; a policy that is sure takes each step."""
    small = ["rollout.horizon=3", "steps=24", "objective.minibatches=1", "objective.learning_rate=1e-9"]
    learner = learner_of(*LIMIT, *small)
    learner.policy.layout.views(learner.parameters)["actor.bias"][:, 1] = 50.0
    episodes = [episode for _ in range(4) for episode in learner.train(24)[0].episodes]
    assert [(episode.cost, episode.length) for episode in episodes] == [(8.0, 8)] * 8
    learner.close()


@pytest.mark.parametrize("overrides", [[], ["objective.preset=grpo", "group.by=task"], ["objective.preset=trpo"]])
def test_a_resumed_client_ends_with_the_same_bits(overrides: list[str]) -> None:
    given = [*LIMIT, *overrides, "rollout.horizon=20", "steps=160"]
    whole, first, second = (learner_of(*given) for _ in range(3))
    for learner in (whole, first):
        learner.train(160)
    second.load([first.state(row) for row in range(2)])
    reports = [learner.train(160) for learner in (whole, second)]
    assert [report.episodes for report in reports[0]] == [report.episodes for report in reports[1]]
    for row in range(2):
        state = whole.state(row)
        assert (set(COST_CRITIC) <= state.keys()) == (overrides[:1] != ["objective.preset=grpo"])
        for name, array in state.items():
            np.testing.assert_array_equal(second.state(row)[name], array, name)
    for learner in (whole, first, second):
        learner.close()


def test_what_a_client_learns_under_a_limit_does_not_depend_on_the_others() -> None:
    together = learner_of(*LIMIT)
    alone = learner_of(*LIMIT, text=TEMPTATION.replace("tempted", "tempted-1").replace("count = 2", ""))
    for learner in (together, alone):
        learner.train(512)
    torch.testing.assert_close(together.parameters[1], alone.parameters[0], rtol=1e-4, atol=1e-5)
    assert together.state(1)[COST_MULTIPLIER] == pytest.approx(alone.state(0)[COST_MULTIPLIER], rel=1e-5)
    together.close()
    alone.close()


CRITIC = ["objective.learning_rate=0.05"]
GROUPS = ["objective.preset=dr-grpo", "group.by=task", "objective.learning_rate=0.03"]


@pytest.mark.parametrize("overrides", [CRITIC, GROUPS], ids=["critic", "groups"])
def test_costs_end_at_their_limit(overrides: list[str]) -> None:
    """The best policy under the limit takes the first two of eight steps. Without a limit it takes all of them."""

    def last_costs(seed: int, *more: str) -> float:
        learner = learner_of(f"seed={seed}", *overrides, *more, text=TEMPTATION.replace("count = 2", ""))
        rounds = [learner.train(256)[0].mean_cost for _ in range(40)]
        learner.close()
        return float(np.mean(rounds[-10:]))

    found = [last_costs(seed, *LIMIT) for seed in (900, 901, 902)]
    assert max(abs(cost - 2) for cost in found) < 0.3, found
    assert last_costs(900, "objective.cost.limit=1e6") > 7.5
