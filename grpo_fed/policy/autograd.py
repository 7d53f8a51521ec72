"""Policies whose gradients autograd computes, for networks that are not written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import CriticPullback, Parameters, PolicyOutput, Pullback, StackedPolicy


class AutogradPolicy(StackedPolicy):
    """A stacked policy that gives `act` and `forward`; all else follows from these by autograd."""

    trainable: Collection[str]
    """Names of the parameters that learn."""

    @final
    def vjp(self, parameters: Parameters, observations: Tensor, critic: bool = True) -> tuple[PolicyOutput, Pullback]:
        def compute(values: Parameters) -> PolicyOutput:
            if critic:
                return self.forward(values, observations)
            distribution = self.act(values, observations)
            return PolicyOutput(distribution, distribution.new_zeros(distribution.shape[:2]))

        output, leaves = _record(compute, parameters, self.trainable)

        def pullback(by_distribution: Tensor, by_values: Tensor | None, gradient: Parameters) -> None:
            for name in parameters.keys() - leaves.keys():
                gradient[name].zero_()
            outputs, gradients = [output.distribution], [by_distribution]
            if by_values is not None and output.values.requires_grad:
                outputs, gradients = [*outputs, output.values], [*gradients, by_values]
            _backward(outputs, gradients, leaves, gradient)

        return PolicyOutput(output.distribution.detach(), output.values.detach()), pullback

    @final
    def critic_vjp(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, CriticPullback]:
        names = set(self.trainable) - self.actor_parameters()
        output, leaves = _record(lambda values: self.forward(values, observations), parameters, names)

        def pullback(by_values: Tensor, gradient: Parameters) -> None:
            if leaves and output.values.requires_grad:
                _backward([output.values], [by_values], leaves, gradient)

        return output.values.detach(), pullback

    @final
    def numpy_actor(self, parameters: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        tensors = {name: torch.from_numpy(value) for name, value in parameters.items()}

        def act(observations: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                array: np.ndarray = self.act(tensors, torch.from_numpy(observations)).numpy()
            return array

        return act


def _record(
    compute: Callable[[Parameters], PolicyOutput], parameters: Parameters, names: Collection[str]
) -> tuple[PolicyOutput, dict[str, Tensor]]:
    """Return what is computed, recorded for autograd, and its leaves: the parameters with these names."""
    leaves = {name: parameters[name].detach().requires_grad_() for name in parameters if name in names}
    with torch.enable_grad():
        return compute({**parameters, **leaves}), leaves


def _backward(
    outputs: Sequence[Tensor], by_outputs: Sequence[Tensor], leaves: Mapping[str, Tensor], gradient: Parameters
) -> None:
    """Write the gradient by every leaf; 0 for a leaf that no output depends on."""
    parts = torch.autograd.grad(outputs, list(leaves.values()), by_outputs, materialize_grads=True)
    for name, part in zip(leaves, parts, strict=True):
        gradient[name].copy_(part)
