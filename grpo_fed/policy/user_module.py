"""Makes a policy of a user's own torch module: K clients of it are stacked by `torch.func`, or computed one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, final

import torch
from gymnasium import Space
from torch import Tensor, nn

from grpo_fed.policy.autograd import AutogradPolicy
from grpo_fed.policy.base import Parameters, PolicyOutput
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.distributions import Distribution
from grpo_fed.policy.own_shapes import Shaped, clients_of, unflatten_observations
from grpo_fed.scenario.importing import import_object
from grpo_fed.scenario.settings import PolicySettings


def import_module_class(path: str) -> Callable[..., nn.Module]:
    """Import what builds a user's module, `package.module:Class`; ValueError where that fails."""
    try:
        build: Callable[..., nn.Module] = import_object(path)
    except ValueError as error:
        raise ValueError(f"policy.module = {path}: {error}") from error
    return build


class UserModule(Protocol):
    """The interface of `policy.module`: a torch module, built from the task's spaces, with two outputs."""

    def __call__(self, observations: Shaped) -> tuple[Tensor, Tensor]:
        """Compute distribution parameters [B, M] and values [B] from B observations.

        observations: float32 in the space's own shape, [B, *shape] for a Box, and a dict or a tuple of tensors for a
        Dict or a Tuple (policy/own_shapes.py).
        """
        ...


@final
class UserModulePolicy(AutogradPolicy):
    """Runs one instance of a user's torch module, the template, with the parameters of K clients."""

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
        self.observation_space = spaces[0]
        self.distribution = distribution
        self.settings = settings
        self.template = self._build_module(0)
        if any(True for _ in self.template.buffers()):
            raise ValueError(
                f"policy.module = {settings.module}: it has buffers (a batch normalisation, say), which clients cannot"
                " stack; use parameters, or layer normalisation"
            )
        self.layout = Layout.from_shapes(self.template, settings)
        self.trainable = {name for name, value in self.template.named_parameters() if value.requires_grad}
        self.not_stacked = ""
        """Why clients are computed one by one; empty where `torch.func` can stack them."""
        self._check()

    def _build_module(self, seed: int) -> nn.Module:
        """Build an instance whose initial parameters depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                module = self.build()
            except Exception as error:
                text = f"cannot be built with policy.kwargs = {self.settings.kwargs}: {type(error).__name__}: {error}"
                raise ValueError(f"policy.module = {self.settings.module}: {text}") from error
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"policy.module = {self.settings.module}: makes {type(module).__name__}, no torch.nn.Module"
            )
        return module

    def _check(self) -> None:
        """Check on two zero observations that the module fits its task, and whether it can be stacked."""
        where = f"policy.module = {self.settings.module}"
        flat = torch.zeros(2, self.observation_size)
        observations = self.in_own_shape(flat)
        stacked = {name: value.detach()[None] for name, value in self.template.named_parameters()}
        try:
            with torch.no_grad():
                distribution, values = self.template(observations)
                shapes = tuple(distribution.shape), tuple(values.shape)
        except Exception as error:
            shapes_text = _describe(observations)
            raise ValueError(f"{where}: it fails on observations of shape {shapes_text}: {error}") from error
        wanted = (2, self.distribution.parameter_size), (2,)
        if shapes != wanted:
            raise ValueError(
                f"{where}: for 2 observations it returns shapes {shapes[0]} and {shapes[1]};"
                f" {self.distribution} needs distribution parameters {wanted[0]} and values (2,)"
            )
        try:
            with torch.no_grad():
                self.forward(stacked, flat[None])
        except Exception as error:  # noqa: BLE001, whatever a module does that cannot be stacked
            self.not_stacked = f"{type(error).__name__}: {error}".splitlines()[0]
        if not self.actor_parameters():
            raise ValueError(f"{where}: its distribution parameters depend on no parameter that requires a gradient")

    def initial(self, seed: int) -> Tensor:
        named = dict(self._build_module(seed).named_parameters())
        return self.layout.flatten({name: value.detach()[None] for name, value in named.items()})[0]

    def actor_parameters(self) -> frozenset[str]:
        """Return the parameters through which autograd reaches the distribution parameters."""
        named = {name: value for name, value in self.template.named_parameters() if name in self.trainable}
        distribution, _ = self.template(self.in_own_shape(torch.zeros(2, self.observation_size)))
        if not distribution.requires_grad:
            return frozenset()
        leaves = list(named.values())
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(distribution.sum(), leaves, allow_unused=True)
        return frozenset(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)

    def in_own_shape(self, observations: Tensor) -> Shaped:
        """Give flat observations [..., D] the shape in which the module takes them, as float32."""
        return unflatten_observations(self.observation_space, observations.float())

    def forward(self, parameters: Parameters, observations: Tensor) -> PolicyOutput:
        def forward_client(client_parameters: Parameters, inputs: Shaped) -> tuple[Tensor, Tensor]:
            outputs: tuple[Tensor, Tensor] = torch.func.functional_call(
                self.template, dict(client_parameters), (inputs,)
            )
            return outputs

        inputs = self.in_own_shape(observations)
        if not self.not_stacked:
            distribution, values = torch.func.vmap(forward_client)(parameters, inputs)
            return PolicyOutput(distribution, values)
        outputs = [
            forward_client({name: value[client] for name, value in parameters.items()}, of_client)
            for client, of_client in enumerate(clients_of(inputs, len(observations)))
        ]
        return PolicyOutput(torch.stack([each[0] for each in outputs]), torch.stack([each[1] for each in outputs]))

    def chain_of(self, parameter: str) -> str:
        return parameter

    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return self.forward(parameters, observations).distribution

    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """Return the distribution parameters, as a user's module names no features."""
        return self.act(parameters, observations)


def _describe(observations: Shaped) -> str:
    """Write the shapes of observations."""
    if isinstance(observations, Tensor):
        return str(tuple(observations.shape))
    if isinstance(observations, dict):
        return "{" + ", ".join(f"{name}: {_describe(part)}" for name, part in observations.items()) + "}"
    return "(" + ", ".join(map(_describe, observations)) + ")"
