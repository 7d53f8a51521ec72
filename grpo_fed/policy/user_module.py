"""A user's own torch module as the policy of K stacked clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor, nn

from grpo_fed.policy.base import CriticPullback, Parameters, Policy, PolicyOutput, Pullback
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.distributions import Distribution
from grpo_fed.scenario.importing import import_object
from grpo_fed.scenario.settings import PolicySettings


def import_module_class(path: str) -> Callable[..., nn.Module]:
    """`package.module:Class`."""
    try:
        found: Callable[..., nn.Module] = import_object(path)
    except ValueError as error:
        raise ValueError(f"policy.module = {path}: {error}") from error
    return found


class UserModule(Protocol):
    """What `policy.module` must be: a torch module built from its spaces, that says two things about observations."""

    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Flattened observations [B, D] -> (distribution parameters [B, M], values [B])."""
        ...


class UserModulePolicy(Policy):
    """A user's own torch module, stacked by `torch.func`: one template, the parameters of all clients beside it."""

    def __init__(
        self,
        build: Callable[..., nn.Module],
        spaces: tuple[Space[Any], Space[Any]],
        observation_size: int,
        distribution: Distribution,
        settings: PolicySettings,
    ) -> None:
        self.build: Callable[[], nn.Module] = lambda: build(*spaces, **settings.kwargs)
        self.observation_size = observation_size
        self.distribution = distribution
        self.settings = settings
        self.template = self._built(0)
        if any(True for _ in self.template.buffers()):
            raise ValueError(
                f"policy.module = {settings.module}: it has buffers (a batch normalisation, say), which clients cannot"
                " stack; use parameters, or layer normalisation"
            )
        self.layout = Layout.from_shapes(self.template, settings)
        self.free = {name for name, value in self.template.named_parameters() if value.requires_grad}
        """Names of the parameters that learn; the module may have frozen others."""
        self._check()

    def _built(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                built = self.build()
            except Exception as error:
                text = f"cannot be built with policy.kwargs = {self.settings.kwargs}: {type(error).__name__}: {error}"
                raise ValueError(f"policy.module = {self.settings.module}: {text}") from error
        if not isinstance(built, nn.Module):
            raise ValueError(
                f"policy.module = {self.settings.module}: makes {type(built).__name__}, no torch.nn.Module"
            )
        return built

    def _check(self) -> None:
        """One pass over two zero observations tells whether the module fits its task."""
        where = f"policy.module = {self.settings.module}"
        observations = torch.zeros(2, self.observation_size)
        stacked = {name: value.detach()[None] for name, value in self.template.named_parameters()}
        try:
            with torch.no_grad():
                distribution, values = self.template(observations)
                shapes = tuple(distribution.shape), tuple(values.shape)
        except Exception as error:
            shape = tuple(observations.shape)
            raise ValueError(f"{where}: it fails on observations of shape {shape}: {error}") from error
        wanted = (2, self.distribution.parameter_size), (2,)
        if shapes != wanted:
            raise ValueError(
                f"{where}: for 2 observations it returns shapes {shapes[0]} and {shapes[1]};"
                f" {self.distribution} needs distribution parameters {wanted[0]} and values (2,)"
            )
        try:
            with torch.no_grad():
                self.forward(stacked, observations[None])
        except Exception as error:
            raise ValueError(f"{where}: torch.func.vmap cannot stack clients of it: {error}") from error
        if not self.actor_parameters():
            raise ValueError(f"{where}: what it says of actions depends on no parameter that requires a gradient")

    def initial(self, seed: int) -> Tensor:
        named = dict(self._built(seed).named_parameters())
        return self.layout.flatten({name: value.detach()[None] for name, value in named.items()})[0]

    def actor_parameters(self) -> frozenset[str]:
        """Found by asking autograd which parameters the distribution reaches."""
        named = {name: value for name, value in self.template.named_parameters() if name in self.free}
        distribution, _ = self.template(torch.zeros(2, self.observation_size))
        if not distribution.requires_grad:
            return frozenset()
        every = list(named.values())
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(distribution.sum(), every, allow_unused=True)
        return frozenset(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)

    def forward(self, parameters: Parameters, observations: Tensor) -> PolicyOutput:
        def one(values: Parameters, inputs: Tensor) -> tuple[Tensor, Tensor]:
            said: tuple[Tensor, Tensor] = torch.func.functional_call(self.template, dict(values), (inputs,))
            return said

        distribution, values = torch.func.vmap(one)(parameters, observations)
        return PolicyOutput(distribution, values)

    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return self.forward(parameters, observations).distribution

    def numpy_actor(self, parameters: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        tensors = {name: torch.from_numpy(value) for name, value in parameters.items()}

        def act(observations: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                array: np.ndarray = self.act(tensors, torch.from_numpy(observations)).numpy()
            return array

        return act

    def vjp(self, parameters: Parameters, observations: Tensor, critic: bool = True) -> tuple[PolicyOutput, Pullback]:
        said, leaves = self._recorded(parameters, observations, self.free)

        def pullback(by_distribution: Tensor, by_values: Tensor | None, gradient: Parameters) -> None:
            for name in parameters.keys() - leaves.keys():
                gradient[name].zero_()
            outputs, slopes = [said.distribution], [by_distribution]
            if by_values is not None and said.values.requires_grad:
                outputs, slopes = [*outputs, said.values], [*slopes, by_values]
            _backward(outputs, slopes, leaves, gradient)

        return PolicyOutput(said.distribution.detach(), said.values.detach()), pullback

    def critic_vjp(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, CriticPullback]:
        said, leaves = self._recorded(parameters, observations, self.free - self.actor_parameters())

        def pullback(by_values: Tensor, gradient: Parameters) -> None:
            if leaves and said.values.requires_grad:
                _backward([said.values], [by_values], leaves, gradient)

        return said.values.detach(), pullback

    def _recorded(
        self, parameters: Parameters, observations: Tensor, names: Collection[str]
    ) -> tuple[PolicyOutput, dict[str, Tensor]]:
        """`forward`, recorded for autograd, and its leaves: the parameters of these names."""
        leaves = {name: parameters[name].detach().requires_grad_() for name in parameters if name in names}
        with torch.enable_grad():
            return self.forward({**parameters, **leaves}, observations), leaves

    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """A user's module names no features: what it says of the actions stands for them."""
        return self.act(parameters, observations)


def _backward(
    outputs: Sequence[Tensor], slopes: Sequence[Tensor], leaves: Mapping[str, Tensor], gradient: Parameters
) -> None:
    """Write the gradient by every leaf; 0 by one that does not matter."""
    parts = torch.autograd.grad(outputs, list(leaves.values()), slopes, materialize_grads=True)
    for name, part in zip(leaves, parts, strict=True):
        gradient[name].copy_(part)
