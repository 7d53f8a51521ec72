"""The network with a memory, against torch's own cells in a plain loop over time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grpo_fed.policy.distributions import Categorical, Gaussian
from grpo_fed.policy.recurrent import RecurrentPolicy
from grpo_fed.scenario.settings import PolicySettings
from tests.policy.test_policy import pull_back, random_parameters

UNITS, STEPS = 5, 6


class Chain(nn.Module):
    """Hidden layers and a cell of torch's own; its parameters have our names."""

    def __init__(self, kind: str, inputs: int, hidden: list[int]) -> None:
        super().__init__()
        for number, width in enumerate(hidden):
            self.add_module(str(number), nn.Linear(inputs, width))
            inputs = width
        self.memory = nn.GRUCell(inputs, UNITS) if kind == "gru" else nn.LSTMCell(inputs, UNITS)
        self.layers = len(hidden)

    def loop(self, observations: Tensor, begins: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Go through [T, W, D] step by step, from a state that is 0 again where an episode begins."""
        outputs = []
        for t, seen in enumerate(observations):
            if t:
                state = torch.where(begins[t, :, None], torch.zeros_like(state), state)
            for number in range(self.layers):
                seen = torch.tanh(self.get_submodule(str(number))(seen))
            if isinstance(self.memory, nn.GRUCell):
                state = self.memory(seen, state)
            else:
                state = torch.cat(self.memory(seen, (state[:, :UNITS], state[:, UNITS:])), -1)
            outputs.append(state[:, :UNITS])
        return torch.stack(outputs), state


class Network(nn.Module):
    """The whole network of one client; its state dict has our names."""

    def __init__(self, kind: str, hidden: list[int], separate: bool) -> None:
        super().__init__()
        self.torso = Chain(kind, 3, hidden)
        self.critic = Chain(kind, 3, hidden) if separate else nn.Module()
        self.actor, self.critic.head = nn.Linear(UNITS, 4), nn.Linear(UNITS, 1)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize(("hidden", "separate"), [([4], True), ([], False)])
def test_sequences_equal_a_plain_loop_over_time(kind: str, hidden: list[int], separate: bool) -> None:
    """Logits, values, log-probabilities and gradients of two clients with three sequences each, cut at episode ends."""
    torso = "separate" if separate else "shared"
    settings = PolicySettings(memory=kind, units=UNITS, hidden=hidden, torso=torso)  # type: ignore[arg-type]
    policy = RecurrentPolicy(3, Categorical(4), settings)
    draws = torch.Generator().manual_seed(1)
    flat = random_parameters(policy, 2)
    seen = torch.randn(2, 3, STEPS, 3, generator=draws)
    begins = torch.rand(2, 3, STEPS, generator=draws) < 0.3
    assert begins[..., 1:].any()
    first = torch.randn(2, 3, policy.memory_size, generator=draws)
    memory = torch.full((2, 3, STEPS, policy.memory_size), torch.nan)  # those after the first step are not read
    memory[:, :, 0] = first
    inputs = torch.cat([seen, memory, begins[..., None].float()], -1)
    output, pullback = policy.vjp(policy.layout.views(flat), inputs)
    by = torch.randn(2, 3 * STEPS, 4, generator=draws), torch.randn(2, 3 * STEPS, generator=draws)
    gradient = policy.layout.views(pull_back(policy, pullback, by, 2))
    actions = torch.randint(0, 4, (3 * STEPS, 1), generator=draws).float()
    for client, state in enumerate(policy.layout.unstack(flat)):
        network = Network(kind, hidden, separate)
        network.load_state_dict(state)
        over_time = seen[client].transpose(0, 1), begins[client].T
        states = first[client].chunk(2 if separate else 1, -1)
        features, _ = network.torso.loop(*over_time, states[0])
        last = network.critic.loop(*over_time, states[1])[0] if separate else features
        logits = network.actor(features).transpose(0, 1).flatten(0, 1)
        values = network.critic.head(last).squeeze(-1).T.flatten()
        torch.testing.assert_close(output.distribution[client], logits.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.values[client], values.detach(), rtol=1e-5, atol=1e-5)
        log_probs = torch.distributions.Categorical(logits=logits).log_prob(actions.squeeze(-1))
        ours = policy.distribution.log_prob(output.distribution[client], actions)
        torch.testing.assert_close(ours, log_probs.detach(), rtol=1e-5, atol=1e-5)
        ((logits * by[0][client]).sum() + (values * by[1][client]).sum()).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradient[name][client], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_single_steps_that_hand_on_their_memory_equal_a_sequence(kind: str) -> None:
    settings = PolicySettings(memory=kind, units=UNITS, hidden=[4], adapter=2)  # type: ignore[arg-type]
    policy = RecurrentPolicy(3, Gaussian(2), settings)
    views = policy.layout.views(random_parameters(policy, 2))
    seen = torch.randn(2, 4, STEPS, 3, generator=torch.Generator().manual_seed(3))
    memory = torch.zeros(2, 4, policy.memory_size)
    outputs, values, every = [], [], []
    for t in range(STEPS):
        single = torch.cat([seen[:, :, t], memory, torch.full((2, 4, 1), float(t == 0))], -1)
        every.append(single)
        values.append(policy.forward(views, single).values)
        distribution, memory = policy.act_and_remember(views, single)
        torch.testing.assert_close(policy.act(views, single), distribution)
        outputs.append(distribution)
    whole = policy.forward(views, torch.stack(every, 2))
    torch.testing.assert_close(whole.distribution, torch.stack(outputs, 2).flatten(1, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.values, torch.stack(values, 2).flatten(1, 2), rtol=1e-5, atol=1e-6)


def test_a_cell_is_a_shared_block_and_begins_as_torchs_does() -> None:
    policy = RecurrentPolicy(3, Categorical(2), PolicySettings(memory="gru", units=16, hidden=[4]))
    assert [block.name for block in policy.layout.blocks] == ["torso.0", "torso.memory", "actor", "critic"]
    assert [block.name for block in policy.layout.shared] == ["torso.0", "torso.memory", "actor"]
    values = policy.layout.unstack(policy.initial(0)[None])[0]
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        assert 0.8 * 16**-0.5 < values[f"torso.memory.{name}"].abs().max() <= 16**-0.5
    assert not torch.equal(values["torso.memory.weight_hh"], values["critic.memory.weight_hh"])
    assert "critic.memory.weight_hh" not in policy.actor_parameters()
    assert policy.input_size == 3 + 2 * 16 + 1
