"""Our actor-critic network, with its gradient written out, which saves the bookkeeping of autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.activations import ACTIVATIONS
from grpo_fed.policy.base import CriticPullback, Parameters, PolicyOutput, Pullback, StackedPolicy
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.distributions import Distribution
from grpo_fed.policy.layers import apply_heads, apply_linear, initial_tensor
from grpo_fed.scenario.settings import PolicySettings


@final
class ActorCritic(StackedPolicy):
    """A network of an optional adapter, a torso, an actor head, and a critic with or without layers of its own."""

    def __init__(self, observation_size: int, distribution: Distribution, settings: PolicySettings) -> None:
        self.observation_size = observation_size
        self.distribution = distribution
        self.settings = settings
        self.shapes = dict(_shapes(observation_size, distribution, settings))
        self.layout = Layout.from_shapes(self.shapes.items(), settings)
        self.activation = ACTIVATIONS[settings.activation]
        depth = range(len(settings.hidden))
        self.torso = [*(["adapter"] if settings.adapter else []), *(f"torso.{layer}" for layer in depth)]
        """Names of the layers between the observations and the actor's head."""
        self.separate = settings.torso == "separate"
        """Whether the critic has layers of its own between the observations and its head."""
        self.critic = [f"critic.{layer}" for layer in depth] if self.separate else []
        """Names of those layers."""
        self.critic_names = [name for name in self.shapes if name.startswith("critic.")]
        """Names of the parameters that only the critic uses."""

    def initial(self, seed: int) -> Tensor:
        settings = self.settings
        values = {
            name: initial_tensor(name, self.shapes, seed, settings.orthogonal, settings.log_std)[None]
            for name in self.shapes
        }
        return self.layout.flatten(values)[0]

    def actor_parameters(self) -> frozenset[str]:
        return frozenset(self.shapes) - frozenset(self.critic_names)

    def forward(self, parameters: Parameters, observations: Tensor) -> PolicyOutput:
        features = self.features(parameters, observations)
        last = self._layers(parameters, self.critic, observations)[-1] if self.separate else features
        return PolicyOutput(
            apply_heads(parameters, features, self.distribution),
            apply_linear(parameters, "critic.head", last).squeeze(-1),
        )

    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return apply_heads(parameters, self.features(parameters, observations), self.distribution)

    def chain_of(self, parameter: str) -> str:
        return "critic" if self.separate and parameter in self.critic_names else "actor"

    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return self._layers(parameters, self.torso, observations)[-1]

    def _layers(self, parameters: Parameters, names: Sequence[str], inputs: Tensor) -> list[Tensor]:
        """Return the inputs and the output of each layer, [K, B, ...], as the backward pass needs them."""
        values = [inputs]
        for name in names:
            values.append(self.activation.forward(apply_linear(parameters, name, values[-1])))
        return values

    @torch.no_grad()
    def vjp(self, parameters: Parameters, observations: Tensor, critic: bool = True) -> tuple[PolicyOutput, Pullback]:
        """Compute by hand what autograd would, with the same operations and without its bookkeeping."""
        torso = self._layers(parameters, self.torso, observations)
        if critic:
            layers = self._layers(parameters, self.critic, observations) if self.separate else torso[-1:]
            values = apply_linear(parameters, "critic.head", layers[-1]).squeeze(-1)
        else:
            layers, values = [], observations.new_zeros(observations.shape[:2])

        @torch.no_grad()
        def pullback(by_distribution: Tensor, by_values: Tensor | None, gradient: Parameters) -> None:
            by_mean = by_distribution
            if self.distribution.log_std_size:
                by_mean = by_distribution[..., : self.distribution.head_size]
                by_log_std = by_distribution[..., self.distribution.head_size :]
                gradient["actor.log_std"].copy_(by_log_std.sum(1))
            by_features = _linear_backward(parameters, gradient, "actor", torso[-1], by_mean)
            if by_values is not None:
                by_last = _linear_backward(parameters, gradient, "critic.head", layers[-1], by_values.unsqueeze(-1))
                if self.separate:
                    self._layers_backward(parameters, gradient, self.critic, layers, by_last)
                else:
                    by_features += by_last
            else:
                for name in self.critic_names:
                    gradient[name].zero_()
            self._layers_backward(parameters, gradient, self.torso, torso, by_features)

        return PolicyOutput(apply_heads(parameters, torso[-1], self.distribution), values), pullback

    @torch.no_grad()
    def critic_vjp(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, CriticPullback]:
        layers = self._layers(parameters, self.critic if self.separate else self.torso, observations)

        @torch.no_grad()
        def pullback(by_values: Tensor, gradient: Parameters) -> None:
            by_head = by_values.unsqueeze(-1)
            by_last = _linear_backward(parameters, gradient, "critic.head", layers[-1], by_head, further=self.separate)
            if self.separate:
                self._layers_backward(parameters, gradient, self.critic, layers, by_last)

        return apply_linear(parameters, "critic.head", layers[-1]).squeeze(-1), pullback

    def _layers_backward(
        self,
        parameters: Parameters,
        gradient: Parameters,
        names: Sequence[str],
        values: Sequence[Tensor],
        by_output: Tensor,
    ) -> None:
        """Write the gradient by the parameters of a chain of layers, from the last layer to the first.

        values: the chain's input and the output of each layer. by_output: the loss's gradient by the last output.
        """
        for layer in reversed(range(len(names))):
            by_output = self.activation.backward(by_output, values[layer + 1])
            by_output = _linear_backward(
                parameters, gradient, names[layer], values[layer], by_output, further=layer > 0
            )

    def numpy_actor(self, parameters: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        *layers, (weight, bias) = [
            (parameters[f"{name}.weight"].swapaxes(1, 2), parameters[f"{name}.bias"][:, None])
            for name in (*self.torso, "actor")
        ]
        activate = self.activation.forward_numpy
        log_std = parameters["actor.log_std"][:, None] if self.distribution.log_std_size else None

        def act(observations: np.ndarray) -> np.ndarray:
            hidden = observations
            for layer_weight, layer_bias in layers:
                hidden = hidden @ layer_weight
                hidden += layer_bias
                hidden = activate(hidden)
            mean: np.ndarray = hidden @ weight
            mean += bias
            if log_std is None:
                return mean
            return np.concatenate([mean, np.broadcast_to(log_std, (*mean.shape[:-1], log_std.shape[-1]))], -1)

        return act


def _shapes(
    observation_size: int, distribution: Distribution, settings: PolicySettings
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of the network's parameters, in order; weights are [out, in]."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def linear(name: str, inputs: int, outputs: int) -> int:
        shapes.extend([(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))])
        return outputs

    width = linear("adapter", observation_size, settings.adapter) if settings.adapter else observation_size
    for layer, units in enumerate(settings.hidden):
        width = linear(f"torso.{layer}", width, units)
    linear("actor", width, distribution.head_size)
    if distribution.log_std_size:
        shapes.append(("actor.log_std", (distribution.log_std_size,)))
    if settings.torso == "separate":
        width = observation_size
        for layer, units in enumerate(settings.hidden):
            width = linear(f"critic.{layer}", width, units)
    linear("critic.head", width, 1)
    return shapes


FEW_INPUTS = 16
"""With up to this many inputs, a weight's gradient is computed several times faster as its transpose."""


def _linear_backward(
    parameters: Parameters, gradient: Parameters, name: str, inputs: Tensor, by_output: Tensor, further: bool = True
) -> Tensor:
    """Write the gradient by a linear layer's parameters, and return that by its inputs, [K, B, in].

    by_output: the loss's gradient by the layer's output, [K, B, out]. further: False where the gradient by the inputs
    is not needed; the result then has no meaning.
    """
    weight = parameters[f"{name}.weight"]
    if inputs.shape[-1] <= FEW_INPUTS:
        by_weight = torch.bmm(inputs.transpose(1, 2), by_output).transpose(1, 2)
    else:
        by_weight = torch.bmm(by_output.transpose(1, 2), inputs)
    gradient[f"{name}.weight"].copy_(by_weight)
    torch.sum(by_output, 1, out=gradient[f"{name}.bias"])
    if not further:
        return by_output
    return by_output * weight if weight.shape[1] == 1 else torch.bmm(by_output, weight)
