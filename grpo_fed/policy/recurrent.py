"""RecurrentPolicy: a network that remembers, with a GRU or an LSTM behind its hidden layers.

What such a policy sees is an observation, the memory with which it comes to it, and a mark where an episode begins,
side by side: [D | H | 1]. So one step is a function of its input alone, like that of any other policy, and rollouts,
values, KL and Fisher matrices are computed as ever, with the memory that the policy had when it collected the step. The
gradient is that of whole sequences: given [K, W, T, D + H + 1] the network goes through the T steps of each, and of the
memories that come with them it uses the first alone.

K clients, B steps, W sequences of T steps, D entries of an observation, H of a memory, U units of a cell, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn

from grpo_fed.policy.activations import ACTIVATIONS
from grpo_fed.policy.autograd import AutogradPolicy
from grpo_fed.policy.base import Parameters, PolicyOutput
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.distributions import Distribution
from grpo_fed.policy.layers import apply_heads, apply_linear, initial_tensor, linear_shapes, parameter_generator
from grpo_fed.scenario.settings import PolicySettings

GATES = {"gru": 3, "lstm": 4}
"""Rows of a cell's weights for each of its units."""
STATES = {"gru": 1, "lstm": 2}
"""Numbers that a cell remembers for each of its units: its output, and an LSTM's inner state."""


@final
class RecurrentPolicy(AutogradPolicy):
    """Hidden layers, a cell that remembers, and heads; the critic has all of its own, or only a head."""

    def __init__(self, observation_size: int, distribution: Distribution, settings: PolicySettings) -> None:
        assert settings.memory != "none", "another policy has no memory"
        self.observation_size = observation_size
        self.distribution = distribution
        self.settings = settings
        self.kind = settings.memory
        self.separate = settings.torso == "separate"
        """Whether the critic has hidden layers and a cell of its own."""
        self.chains = ("torso", "critic") if self.separate else ("torso",)
        self.memory_of_cell = STATES[self.kind] * settings.units
        """Numbers that one cell remembers."""
        self.memory_size = self.memory_of_cell * len(self.chains)
        self.shapes = dict(self._shapes())
        self.layout = Layout.from_shapes(self.shapes.items(), settings)
        self.trainable = frozenset(self.shapes)
        self.activation = ACTIVATIONS[settings.activation]

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """List the names and shapes of the parameters, in order."""
        units, rows = self.settings.units, GATES[self.kind] * self.settings.units
        for chain in self.chains:
            inputs = self.observation_size
            if self.settings.adapter and chain == "torso":
                yield from linear_shapes("adapter", inputs, self.settings.adapter)
                inputs = self.settings.adapter
            for number, width in enumerate(self.settings.hidden):
                yield from linear_shapes(f"{chain}.{number}", inputs, width)
                inputs = width
            yield from ((f"{chain}.memory.weight_ih", (rows, inputs)), (f"{chain}.memory.weight_hh", (rows, units)))
            yield from ((f"{chain}.memory.bias_ih", (rows,)), (f"{chain}.memory.bias_hh", (rows,)))
            if chain == "torso":
                yield from linear_shapes("actor", units, self.distribution.head_size)
                if self.distribution.log_std_size:
                    yield "actor.log_std", (self.distribution.log_std_size,)
        yield from linear_shapes("critic.head", units, 1)

    def initial(self, seed: int) -> Tensor:
        values = {name: self._initial(name, seed)[None] for name in self.shapes}
        return self.layout.flatten(values)[0]

    def _initial(self, name: str, seed: int) -> Tensor:
        """Make one tensor's first value; a cell's are uniform within U^(-1/2), as in `torch.nn.GRU`."""
        settings = self.settings
        if ".memory." not in name:
            return initial_tensor(name, self.shapes, seed, settings.orthogonal, settings.log_std)
        bound = settings.units**-0.5
        generator = parameter_generator(name, self.shapes[name], seed)
        return nn.init.uniform_(torch.empty(self.shapes[name]), -bound, bound, generator=generator)

    def actor_parameters(self) -> frozenset[str]:
        return frozenset(name for name in self.shapes if not name.startswith("critic."))

    def chain_of(self, parameter: str) -> str:
        return "critic" if self.separate and parameter.startswith("critic.") else "actor"

    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return apply_heads(parameters, self.features(parameters, observations), self.distribution)

    def forward(self, parameters: Parameters, observations: Tensor) -> PolicyOutput:
        outputs, _ = self._run(parameters, self.chains, observations)
        values = apply_linear(parameters, "critic.head", outputs[-1]).squeeze(-1)
        return PolicyOutput(apply_heads(parameters, outputs[0], self.distribution), values)

    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return self._run(parameters, self.chains[:1], observations)[0][0]

    def act_and_remember(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Compute distribution parameters [K, B, M] and the memories [K, B, H] after single steps."""
        outputs, memories = self._run(parameters, self.chains, observations)
        return apply_heads(parameters, outputs[0], self.distribution), torch.cat(memories, -1)

    def _run(self, parameters: Parameters, chains: Sequence[str], inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Go through steps [K, B, D + H + 1], or through sequences [K, W, T, D + H + 1].

        The cells of both chains take their steps together, as if they were those of twice as many clients. Returns for
        each chain the cell's outputs, [K, B or W * T, U], and the memories after the last steps, [K, B or W, ...].
        """
        sequences = inputs if inputs.ndim == 4 else inputs.unsqueeze(2)
        _, count, steps, _ = sequences.shape
        driven, memories = [], []
        for chain in chains:
            hidden = sequences[..., : self.observation_size].flatten(1, 2)
            for name in self._layers(chain):
                hidden = self.activation.forward(apply_linear(parameters, name, hidden))
            weight, bias = parameters[f"{chain}.memory.weight_ih"], parameters[f"{chain}.memory.bias_ih"]
            driven.append(torch.baddbmm(bias.unsqueeze(1), hidden, weight.transpose(1, 2)))
            first = self.observation_size + self.chains.index(chain) * self.memory_of_cell
            memories.append(sequences[:, :, 0, first : first + self.memory_of_cell])
        by_step = torch.cat(driven).unflatten(1, (count, steps)).unbind(2)
        goes_on = (1 - sequences[..., -1:]).repeat(len(chains), 1, 1, 1).unbind(2)
        weight = torch.cat([parameters[f"{chain}.memory.weight_hh"] for chain in chains]).transpose(1, 2)
        bias = torch.cat([parameters[f"{chain}.memory.bias_hh"] for chain in chains]).unsqueeze(1)
        memory = torch.cat(memories)
        advance = _advance_gru if self.kind == "gru" else _advance_lstm
        outputs = []
        for t, driven_now in enumerate(by_step):
            memory = advance(driven_now, memory * goes_on[t] if t else memory, weight, bias)
            outputs.append(memory)
        through = torch.stack(outputs, 2)[..., : self.settings.units].flatten(1, 2)
        return list(through.chunk(len(chains))), list(memory.chunk(len(chains)))

    def _layers(self, chain: str) -> list[str]:
        """List the names of the layers before a chain's cell."""
        adapter = ["adapter"] if self.settings.adapter and chain == "torso" else []
        return [*adapter, *(f"{chain}.{number}" for number in range(len(self.settings.hidden)))]


def _advance_gru(driven: Tensor, memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Take a step of a GRU as `torch.nn.GRUCell` has it (1406.1078), [K, W, 3 U], [K, W, U] -> [K, W, U].

    weight: [K, U, 3 U]. bias: [K, 1, 3 U].
    """
    units = memory.shape[-1]
    gates_in, new_in = driven.split([2 * units, units], -1)
    gates_back, new_back = torch.baddbmm(bias, memory, weight).split([2 * units, units], -1)
    reset, update = torch.sigmoid(gates_in + gates_back).chunk(2, -1)
    return torch.lerp(torch.tanh(torch.addcmul(new_in, reset, new_back)), memory, update)


def _advance_lstm(driven: Tensor, memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Take a step of an LSTM as `torch.nn.LSTMCell` has it, [K, W, 4 U], [K, W, 2 U] -> [K, W, 2 U].

    memory: outputs and inner states. weight: [K, U, 4 U]. bias: [K, 1, 4 U].
    """
    output, inner = memory.chunk(2, -1)
    into, forget, new, out = torch.baddbmm(driven + bias, output, weight).chunk(4, -1)
    inner = torch.addcmul(torch.sigmoid(forget) * inner, torch.sigmoid(into), torch.tanh(new))
    return torch.cat([torch.sigmoid(out) * torch.tanh(inner), inner], -1)
