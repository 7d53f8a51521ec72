"""Clients that learn with other libraries, over a grid in this process."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from torch.distributions import Normal, kl_divergence

from grpo_fed.adapters import ClientInfo, LearnerReport, TorchLearner, client_app, initial_arrays, sb3_learner
from grpo_fed.flower import Grouped
from grpo_fed.flower.measurement import to_arrays
from tests.support.in_memory_grid import InMemoryGrid, enter_run


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(monkeypatch)


class Nodes(InMemoryGrid):
    """A grid whose nodes are clients of an app, each with a context of its own."""

    def __init__(self, app: ClientApp, count: int, config: dict[str, float] | None = None) -> None:
        self.contexts = {
            node: Context(1, node, {"partition-id": node - 1}, RecordDict(), config or {})
            for node in range(1, count + 1)
        }

        def client(message: Message) -> RecordDict:
            return app(message, self.contexts[message.metadata.dst_node_id]).content

        super().__init__(dict.fromkeys(self.contexts, client))


def make_line(client: ClientInfo) -> TorchLearner:
    """Make a learner that moves the mean of a Gaussian towards the client's number, with Adam."""
    module = nn.Linear(1, 1, bias=False)
    optimiser = torch.optim.Adam(module.parameters(), 0.1)

    def train() -> LearnerReport:
        observations = torch.ones(8, 1)
        optimiser.zero_grad()
        ((module(observations) - client.number) ** 2).mean().backward()
        optimiser.step()
        return LearnerReport(8, observations, {"seed": client.seed})

    return TorchLearner(
        module, train, lambda x: Normal(module(x), 1.0), lambda: {"at": module.weight.item()}, optimiser
    )


def test_clients_of_any_module_learn_together_within_a_measured_budget():
    grid = Nodes(client_app(make_line), 3)
    strategy = Grouped(rule="mean", joint_budget=1e-3)
    start = initial_arrays(make_line)
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=1)
    moved = float(result.arrays["weight"].numpy().item() - start["weight"].numpy().item())
    step = strategy.history[0].step
    assert step.joint == pytest.approx(moved**2 / 2, rel=1e-3)  # the KL of Gaussians with these means, at 1
    assert 0.5e-3 < step.joint <= 1e-3
    assert set(strategy.history[0].weights) == {"client-0", "client-1", "client-2"}
    assert strategy.history[0].evaluate["client-2"]["at"] == pytest.approx(float(result.arrays["weight"].numpy()[0, 0]))


def test_a_clients_optimiser_goes_on_in_the_next_round():
    grid = Nodes(client_app(make_line), 2)
    Grouped(rule="mean").start(grid=grid, initial_arrays=initial_arrays(make_line), num_rounds=3)
    for context in grid.contexts.values():
        assert context.state["grpo_fed.optimiser"]["0.step"].numpy() == 3


def test_each_client_and_round_has_a_seed_of_its_own_that_the_runs_seed_decides():
    def seeds(seed: int) -> list[float]:
        strategy = Grouped(rule="mean")
        strategy.start(
            grid=Nodes(client_app(make_line), 2, {"seed": seed}), initial_arrays=initial_arrays(make_line), num_rounds=2
        )
        return [numbers["seed"] for record in strategy.history for numbers in record.train.values()]

    first = seeds(0)
    assert len(set(first)) == 4
    assert first == seeds(0)
    assert not set(first) & set(seeds(1))


# stable-baselines3 ----------------------------------------------------------------------------------------------------


def make_ppo(client: ClientInfo) -> TorchLearner:
    env = gymnasium.make("CartPole-v1")
    model = PPO("MlpPolicy", env, n_steps=64, n_epochs=2, seed=client.seed, policy_kwargs={"net_arch": [8]})
    return sb3_learner(model, steps=64, episodes=2)


BLOCKS = {"torso": ["mlp_extractor.policy_net.*"], "actor": ["action_net.*"]}


def test_ppo_learns_within_budgets_that_its_own_policy_measures():
    grid = Nodes(client_app(make_ppo), 2)
    strategy = Grouped(blocks=BLOCKS, budget=0.01, joint_budget=0.002)
    start = initial_arrays(make_ppo)
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=2)
    for record in strategy.history:
        assert record.failures == {}
        assert 0 < record.step.joint <= 0.002
        assert set(record.kl) == set(record.weights) == {"client-0", "client-1"}
        assert record.weights["client-0"] == 64
        assert all(numbers["return"] >= 8 for numbers in record.evaluate.values())
    assert np.abs(result.arrays["action_net.weight"].numpy() - start["action_net.weight"].numpy()).max() > 0
    critics = [to_arrays(strategy.arrays_of(f"client-{number}"))["value_net.weight"] for number in (0, 1)]
    assert not np.array_equal(*critics)


def test_ppos_kl_is_that_of_torchs_distributions():
    learner = make_ppo(ClientInfo("ant", seed=1))
    report = learner.train()
    observations, policy = report.observations, learner.module
    assert observations.shape == (64, 4)
    with torch.no_grad():
        logits = policy.action_net(policy.mlp_extractor.policy_net(observations))
    expected = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(learner.distribution(observations).probs, expected.probs)
    assert kl_divergence(learner.distribution(observations), expected).abs().max() < 1e-6


def test_two_rounds_of_ppo_repeat_to_the_bit():
    def final() -> ArrayRecord:
        strategy = Grouped(FedAvg(fraction_evaluate=0.0), blocks=BLOCKS, rule="mean")
        grid = Nodes(client_app(make_ppo), 2)
        return strategy.start(grid=grid, initial_arrays=initial_arrays(make_ppo), num_rounds=2).arrays

    first, second = to_arrays(final()), to_arrays(final())
    assert {name: array.tobytes() for name, array in first.items()} == {
        name: array.tobytes() for name, array in second.items()
    }


def make_normalised(client: ClientInfo) -> TorchLearner:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=client.seed))
    return sb3_learner(
        PPO("MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=client.seed), steps=32, episodes=2
    )


def test_a_normaliser_of_stable_baselines_goes_on_in_the_next_round():
    grid = Nodes(client_app(make_normalised), 2)
    strategy = Grouped(blocks=BLOCKS, rule="mean")
    strategy.start(grid=grid, initial_arrays=initial_arrays(make_normalised), num_rounds=2)
    memory = to_arrays(grid.contexts[1].state["grpo_fed.memory"])
    resets = 2  # of its 2 environments in each of 2 rounds
    assert memory["observations.count"] == pytest.approx(2 * 32 + 2 * resets, abs=0.01)
    assert memory["observations.mean"].shape == (4,)
    assert all(numbers["return"] >= 8 for numbers in strategy.history[-1].evaluate.values())


def test_an_algorithm_with_a_replay_buffer_is_refused():
    with pytest.raises(ValueError, match=r"DQN keeps a replay buffer, .* use an on-policy algorithm, such as PPO"):
        sb3_learner(DQN("MlpPolicy", gymnasium.make("CartPole-v1"), buffer_size=10), steps=1)
