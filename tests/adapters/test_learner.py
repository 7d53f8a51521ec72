"""Learners of other libraries: their arrays, their memory, and the KL of their policies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from grpo_fed.adapters import LearnerReport, TorchLearner, discrete_distribution
from grpo_fed.adapters.learner import distributions_kl, load_module, module_arrays, policy_kl
from grpo_fed.adapters.memory import load_optimiser, optimiser_arrays, recall_observations, remember


class TwoNames(nn.Module):
    """A module that has one layer by two names, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 1)
        self.second = self.first
        self.register_buffer("count", torch.tensor(3))


def test_a_tensor_with_two_names_is_sent_once_and_buffers_too():
    assert {name: array.shape for name, array in module_arrays(TwoNames()).items()} == {
        "first.weight": (1, 2),
        "first.bias": (1,),
        "count": (),
    }


def test_arrays_that_are_loaded_are_those_of_the_module():
    module = TwoNames()
    given = {"first.weight": np.ones((1, 2), np.float32), "first.bias": np.zeros(1, np.float32), "count": np.array(5)}
    load_module(module, given)
    assert {name: array.tolist() for name, array in module_arrays(module).items()} == {
        "first.weight": [[1, 1]],
        "first.bias": [0],
        "count": 5,
    }


@pytest.mark.parametrize("given", [{}, {"first.weight": np.zeros((2, 1), np.float32)}])
def test_arrays_of_another_module_are_refused(given: dict[str, np.ndarray]):
    with pytest.raises(
        ValueError, match=r"first.weight: the server sent .* do all clients and the server make the same"
    ):
        load_module(TwoNames(), given)


# KL -------------------------------------------------------------------------------------------------------------------


def test_the_kl_of_gaussians_is_summed_over_the_parts_of_an_action():
    old, new = Normal(torch.tensor([[0.0, 0.0]]), 1.0), Normal(torch.tensor([[1.0, 2.0]]), 1.0)
    assert distributions_kl(old, new, 1).tolist() == [2.5]  # 1/2 (1 + 4)


def test_the_kl_of_several_choices_is_the_sum_of_theirs():
    old = [Categorical(torch.tensor([[0.5, 0.5]])), Categorical(torch.tensor([[0.5, 0.5]]))]
    new = [Categorical(torch.tensor([[0.25, 0.75]])), Categorical(torch.tensor([[0.5, 0.5]]))]
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert distributions_kl(old, new, 1).tolist() == pytest.approx([expected])


class Agent(nn.Module):
    """An agent as CleanRL's: two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = nn.Linear(1, 3, bias=False), nn.Linear(1, 1)

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        probs = Categorical(logits=self.actor(x))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


def test_the_distribution_of_an_agent_is_that_of_its_log_probabilities():
    agent, observations = Agent(), torch.tensor([[1.0], [-2.0]])
    expected = torch.softmax(agent.actor(observations), 1)
    torch.testing.assert_close(discrete_distribution(agent, 3)(observations).probs, expected)


def test_kl_is_measured_from_before_to_after_through_the_agents_policy():
    agent = Agent()
    learner = TorchLearner(agent, lambda: LearnerReport(1), discrete_distribution(agent, 3))
    arrays = module_arrays(agent)
    before = {**arrays, "actor.weight": np.zeros((3, 1), np.float32)}
    after = {**arrays, "actor.weight": np.log(np.array([[1], [1], [2]], np.float32))}
    third = [1 / 4, 1 / 4, 1 / 2]
    expected = sum(1 / 3 * math.log(1 / 3 / p) for p in third)  # at the observation 1; at 0 both are uniform
    assert policy_kl(learner, before, after, torch.tensor([[1.0], [0.0]])) == pytest.approx(expected / 2, rel=1e-5)


def test_a_learner_without_a_distribution_says_so():
    agent = Agent()
    learner = TorchLearner(agent, lambda: LearnerReport(1))
    with pytest.raises(ValueError, match="the learner has no distribution, so its KL cannot be measured; give"):
        policy_kl(learner, module_arrays(agent), module_arrays(agent), torch.zeros(1, 1))


# Memory ---------------------------------------------------------------------------------------------------------------


def steps_of_adam(module: nn.Module, optimiser: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        optimiser.zero_grad()
        (module(torch.tensor([[1.0, number]])) ** 2).sum().backward()
        optimiser.step()


def test_an_optimiser_goes_on_to_the_bits_of_one_that_was_not_made_anew():
    torch.manual_seed(0)
    whole, first, second = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)
    load_module(first, module_arrays(whole))
    optimisers = [torch.optim.Adam(module.parameters(), 0.1) for module in (whole, first, second)]
    steps_of_adam(whole, optimisers[0], 3)
    steps_of_adam(whole, optimisers[0], 2)
    steps_of_adam(first, optimisers[1], 3)
    load_module(second, module_arrays(first))
    load_optimiser(optimisers[2], optimiser_arrays(optimisers[1]))
    steps_of_adam(second, optimisers[2], 2)
    for name, array in module_arrays(whole).items():
        assert array.tobytes() == module_arrays(second)[name].tobytes()


def test_a_client_keeps_some_observations_in_their_order():
    state, learner = RecordDict(), TorchLearner(TwoNames(), lambda: LearnerReport(1))
    with pytest.raises(ValueError, match="the client has seen no observations yet"):
        recall_observations(state)
    remember(learner, LearnerReport(9, torch.arange(9.0)[:, None]), state, most=4, seed=1)
    kept = recall_observations(state).squeeze(1).tolist()
    assert len(kept) == 4
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(9))
