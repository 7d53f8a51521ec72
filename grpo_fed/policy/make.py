"""Policies of K stacked clients: an actor-critic network of ours, or a module of the user's.

A policy here is the *shape* of a network; the parameters of all clients come as an argument, `{name: [K, *shape]}`, so
that one call serves one client or a thousand.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor, nn

from grpo_fed.policy.activations import ACTIVATIONS
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.distributions import Categorical, Distribution, Gaussian, MultiCategorical, SquashedGaussian
from grpo_fed.rl.records import Output
from grpo_fed.scenario.importing import imported
from grpo_fed.scenario.settings import PolicySettings
from grpo_fed.tasks.resolve import Action, Form, Task

Parameters = Mapping[str, Tensor]
Pullback = Callable[[Tensor, Tensor | None, Parameters], None]
"""Slopes by distribution parameters [K, B, M] and by values [K, B], or None; writes the gradient by every parameter."""
CriticPullback = Callable[[Tensor, Parameters], None]
"""Slopes by values [K, B]; writes the gradient by the parameters that only the critic uses, and no other."""


def policy_for(task: Task, settings: PolicySettings) -> Policy:
    """The policy that fits a task: ours, or the user's module."""
    distribution = distribution_for(task.action, settings.squash)
    try:
        if settings.module is None:
            return ActorCritic(task.observation_size, distribution, settings)
        spaces = task.observation_space, task.action_space
        return ModulePolicy(_module(settings.module), spaces, task.observation_size, distribution, settings)
    except ValueError as error:
        raise ValueError(f"client {task.client} ({task.env}): {error}") from error


def network_for(form: Form, settings: PolicySettings) -> Policy:
    """Our own for a task that cannot be made here; a user's module may look at more of a task than its form."""
    assert settings.module is None, "the task is there to look at"
    return ActorCritic(
        form.observation_size, distribution_for(Action(form.kind, form.sizes), settings.squash), settings
    )


def distribution_for(action: Action, squash: bool) -> Distribution:
    """What a policy draws a task's actions from."""
    if action.kind == "categorical":
        return Categorical(action.sizes[0])
    if action.kind == "multi-categorical":
        return MultiCategorical(action.sizes)
    return SquashedGaussian(action.size) if squash else Gaussian(action.size)


def _module(path: str) -> Callable[..., nn.Module]:
    """`package.module:Class`."""
    try:
        found: Callable[..., nn.Module] = imported(path)
    except ValueError as error:
        raise ValueError(f"policy.module = {path}: {error}") from error
    return found


class UserModule(Protocol):
    """What `policy.module` must be: a torch module built from its spaces, that says two things about observations."""

    def __call__(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Flattened observations [B, D] -> (distribution parameters [B, M], values [B])."""
        ...


class Policy(ABC):
    """The shape of a network: its layout of parameters, and what it says about observations under given ones."""

    layout: Layout
    distribution: Distribution
    observation_size: int

    @abstractmethod
    def initial(self, seed: int) -> Tensor:
        """First parameters of one client, [P]; each tensor's draw depends on the seed, its name and its shape alone."""

    @abstractmethod
    def forward(self, parameters: Parameters, observations: Tensor) -> Output:
        """Observations [K, B, D] -> Output."""

    @abstractmethod
    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """Observations [K, B, D] -> distribution parameters [K, B, M], without the critic."""

    @abstractmethod
    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """Observations [K, B, D] -> what the policy makes of them before it chooses, [K, B, F]."""

    @abstractmethod
    def actor_names(self) -> frozenset[str]:
        """Names of the parameters that the action distribution depends on."""

    @abstractmethod
    def numpy_actor(self, parameters: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """`act` for a rollout on the CPU, [K, B, D] -> [K, B, M], under parameters that may change in place."""

    @abstractmethod
    def vjp(self, parameters: Parameters, observations: Tensor, critic: bool = True) -> tuple[Output, Pullback]:
        """`forward`, and the function that pulls the slopes of a loss by what it said back to the parameters.

        Without `critic` nobody asks for the values: they may be 0, and their slopes are None.
        """

    @abstractmethod
    def critic_vjp(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, CriticPullback]:
        """The values [K, B] alone, and their pullback to the parameters that the actor does not use."""


class ActorCritic(Policy):
    """An optional adapter, a torso, an actor head, and a critic that shares the torso or has layers of its own."""

    def __init__(self, observation_size: int, distribution: Distribution, settings: PolicySettings) -> None:
        self.observation_size = observation_size
        self.distribution = distribution
        self.settings = settings
        self.shapes = dict(_shapes(observation_size, distribution, settings))
        self.layout = Layout.cut(self.shapes.items(), settings)
        self.activation = ACTIVATIONS[settings.activation]
        depth = range(len(settings.hidden))
        self.torso = [*(["adapter"] if settings.adapter else []), *(f"torso.{layer}" for layer in depth)]
        self.separate = settings.torso == "separate"
        self.critic = [f"critic.{layer}" for layer in depth] if self.separate else []
        self.critic_names = [name for name in self.shapes if name.startswith("critic.")]

    def initial(self, seed: int) -> Tensor:
        values = {name: self._initial(name, seed)[None] for name in self.shapes}
        return self.layout.flatten(values)[0]

    def _initial(self, name: str, seed: int) -> Tensor:
        value = torch.empty(self.shapes[name])
        if name == "actor.log_std":
            return value.fill_(self.settings.log_std)
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(f"{name}{tuple(value.shape)}".encode()))
        weight = name.endswith("weight")
        if self.settings.orthogonal:
            gain = {"actor.weight": 0.01, "critic.head.weight": 1.0}.get(name, 2**0.5)
            return nn.init.orthogonal_(value, gain, generator=generator) if weight else value.zero_()
        inputs = value.shape[1] if weight else self.shapes[name.removesuffix("bias") + "weight"][1]
        bound = inputs**-0.5
        return nn.init.uniform_(value, -bound, bound, generator=generator)

    def actor_names(self) -> frozenset[str]:
        return frozenset(self.shapes) - frozenset(self.critic_names)

    def forward(self, parameters: Parameters, observations: Tensor) -> Output:
        features = self.features(parameters, observations)
        last = self._layers(parameters, self.critic, observations)[-1] if self.separate else features
        return Output(self._head(parameters, features), _linear(parameters, "critic.head", last).squeeze(-1))

    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return self._head(parameters, self.features(parameters, observations))

    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return self._layers(parameters, self.torso, observations)[-1]

    def _layers(self, parameters: Parameters, names: Sequence[str], inputs: Tensor) -> list[Tensor]:
        """The inputs, and what each layer made of them, [K, B, ...]."""
        seen = [inputs]
        for name in names:
            seen.append(self.activation.bend(_linear(parameters, name, seen[-1])))
        return seen

    def _head(self, parameters: Parameters, features: Tensor) -> Tensor:
        mean = _linear(parameters, "actor", features)
        if not self.distribution.continuous:
            return mean
        return torch.cat([mean, parameters["actor.log_std"].unsqueeze(1).expand_as(mean)], -1)

    @torch.no_grad()
    def vjp(self, parameters: Parameters, observations: Tensor, critic: bool = True) -> tuple[Output, Pullback]:
        """Backpropagation by hand: the operations of autograd without its bookkeeping."""
        torso = self._layers(parameters, self.torso, observations)
        if critic:
            seen = self._layers(parameters, self.critic, observations) if self.separate else torso[-1:]
            values = _linear(parameters, "critic.head", seen[-1]).squeeze(-1)
        else:
            seen, values = [], observations.new_zeros(observations.shape[:2])

        @torch.no_grad()
        def pullback(by_distribution: Tensor, by_values: Tensor | None, gradient: Parameters) -> None:
            by_mean = by_distribution
            if self.distribution.continuous:
                by_mean, by_log_std = by_distribution.chunk(2, -1)
                gradient["actor.log_std"].copy_(by_log_std.sum(1))
            by_features = _pull_linear(parameters, gradient, "actor", torso[-1], by_mean)
            if by_values is not None:
                by_last = _pull_linear(parameters, gradient, "critic.head", seen[-1], by_values.unsqueeze(-1))
                if self.separate:
                    self._pull_layers(parameters, gradient, self.critic, seen, by_last)
                else:
                    by_features += by_last
            else:
                for name in self.critic_names:
                    gradient[name].zero_()
            self._pull_layers(parameters, gradient, self.torso, torso, by_features)

        return Output(self._head(parameters, torso[-1]), values), pullback

    @torch.no_grad()
    def critic_vjp(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, CriticPullback]:
        seen = self._layers(parameters, self.critic if self.separate else self.torso, observations)

        @torch.no_grad()
        def pullback(by_values: Tensor, gradient: Parameters) -> None:
            slope = by_values.unsqueeze(-1)
            by_last = _pull_linear(parameters, gradient, "critic.head", seen[-1], slope, further=self.separate)
            if self.separate:
                self._pull_layers(parameters, gradient, self.critic, seen, by_last)

        return _linear(parameters, "critic.head", seen[-1]).squeeze(-1), pullback

    def _pull_layers(
        self, parameters: Parameters, gradient: Parameters, names: Sequence[str], seen: Sequence[Tensor], slope: Tensor
    ) -> None:
        """Write the gradient of a chain of layers, last to first, given the slope by what the last one made."""
        for layer in reversed(range(len(names))):
            slope = self.activation.pull(slope, seen[layer + 1])
            slope = _pull_linear(parameters, gradient, names[layer], seen[layer], slope, further=layer > 0)

    def numpy_actor(self, parameters: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        *layers, (weight, bias) = [
            (parameters[f"{name}.weight"].swapaxes(1, 2), parameters[f"{name}.bias"][:, None])
            for name in (*self.torso, "actor")
        ]
        bend = self.activation.bend_numpy
        log_std = parameters["actor.log_std"][:, None] if self.distribution.continuous else None

        def act(observations: np.ndarray) -> np.ndarray:
            hidden = observations
            for inner, shift in layers:
                hidden = hidden @ inner
                hidden += shift
                hidden = bend(hidden)
            mean: np.ndarray = hidden @ weight
            mean += bias
            if log_std is None:
                return mean
            return np.concatenate([mean, np.broadcast_to(log_std, mean.shape)], -1)

        return act


def _shapes(
    observation_size: int, distribution: Distribution, settings: PolicySettings
) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an ActorCritic's parameters, in order; weights are [out, in]."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def linear(name: str, inputs: int, outputs: int) -> int:
        shapes.extend([(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))])
        return outputs

    width = linear("adapter", observation_size, settings.adapter) if settings.adapter else observation_size
    for layer, units in enumerate(settings.hidden):
        width = linear(f"torso.{layer}", width, units)
    size = distribution.action_size if distribution.continuous else distribution.parameter_size
    linear("actor", width, size)
    if distribution.continuous:
        shapes.append(("actor.log_std", (size,)))
    if settings.torso == "separate":
        width = observation_size
        for layer, units in enumerate(settings.hidden):
            width = linear(f"critic.{layer}", width, units)
    linear("critic.head", width, 1)
    return shapes


def _linear(parameters: Parameters, name: str, inputs: Tensor) -> Tensor:
    """[K, B, in] -> [K, B, out]."""
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    return torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2))


FEW = 16
"""With no more inputs than that, the product for the gradient is several times faster the other way round."""


def _pull_linear(
    parameters: Parameters, gradient: Parameters, name: str, inputs: Tensor, slope: Tensor, further: bool = True
) -> Tensor:
    """Write the gradient of a linear layer, given the slope [K, B, out]; returns that by its inputs, [K, B, in]."""
    weight = parameters[f"{name}.weight"]
    if inputs.shape[-1] <= FEW:
        by_weight = torch.bmm(inputs.transpose(1, 2), slope).transpose(1, 2)
    else:
        by_weight = torch.bmm(slope.transpose(1, 2), inputs)
    gradient[f"{name}.weight"].copy_(by_weight)
    torch.sum(slope, 1, out=gradient[f"{name}.bias"])
    if not further:
        return slope
    return slope * weight if weight.shape[1] == 1 else torch.bmm(slope, weight)


class ModulePolicy(Policy):
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
        self.layout = Layout.cut(self.template, settings)
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
        if not self.actor_names():
            raise ValueError(f"{where}: what it says of actions depends on no parameter that requires a gradient")

    def initial(self, seed: int) -> Tensor:
        named = dict(self._built(seed).named_parameters())
        return self.layout.flatten({name: value.detach()[None] for name, value in named.items()})[0]

    def actor_names(self) -> frozenset[str]:
        """Found by asking autograd which parameters the distribution reaches."""
        named = {name: value for name, value in self.template.named_parameters() if name in self.free}
        distribution, _ = self.template(torch.zeros(2, self.observation_size))
        if not distribution.requires_grad:
            return frozenset()
        every = list(named.values())
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(distribution.sum(), every, allow_unused=True)
        return frozenset(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)

    def forward(self, parameters: Parameters, observations: Tensor) -> Output:
        def one(values: Parameters, inputs: Tensor) -> tuple[Tensor, Tensor]:
            said: tuple[Tensor, Tensor] = torch.func.functional_call(self.template, dict(values), (inputs,))
            return said

        distribution, values = torch.func.vmap(one)(parameters, observations)
        return Output(distribution, values)

    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return self.forward(parameters, observations).distribution

    def numpy_actor(self, parameters: Mapping[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        tensors = {name: torch.from_numpy(value) for name, value in parameters.items()}

        def act(observations: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                array: np.ndarray = self.act(tensors, torch.from_numpy(observations)).numpy()
            return array

        return act

    def vjp(self, parameters: Parameters, observations: Tensor, critic: bool = True) -> tuple[Output, Pullback]:
        said, leaves = self._recorded(parameters, observations, self.free)

        def pullback(by_distribution: Tensor, by_values: Tensor | None, gradient: Parameters) -> None:
            for name in parameters.keys() - leaves.keys():
                gradient[name].zero_()
            outputs, slopes = [said.distribution], [by_distribution]
            if by_values is not None and said.values.requires_grad:
                outputs, slopes = [*outputs, said.values], [*slopes, by_values]
            _pull(outputs, slopes, leaves, gradient)

        return Output(said.distribution.detach(), said.values.detach()), pullback

    def critic_vjp(self, parameters: Parameters, observations: Tensor) -> tuple[Tensor, CriticPullback]:
        said, leaves = self._recorded(parameters, observations, self.free - self.actor_names())

        def pullback(by_values: Tensor, gradient: Parameters) -> None:
            if leaves and said.values.requires_grad:
                _pull([said.values], [by_values], leaves, gradient)

        return said.values.detach(), pullback

    def _recorded(
        self, parameters: Parameters, observations: Tensor, names: Collection[str]
    ) -> tuple[Output, dict[str, Tensor]]:
        """`forward`, recorded for autograd, and its leaves: the parameters of these names."""
        leaves = {name: parameters[name].detach().requires_grad_() for name in parameters if name in names}
        with torch.enable_grad():
            return self.forward({**parameters, **leaves}, observations), leaves

    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        """A user's module names no features: what it says of the actions stands for them."""
        return self.act(parameters, observations)


def _pull(
    outputs: Sequence[Tensor], slopes: Sequence[Tensor], leaves: Mapping[str, Tensor], gradient: Parameters
) -> None:
    """Write the gradient by every leaf; 0 by one that does not matter."""
    parts = torch.autograd.grad(outputs, list(leaves.values()), slopes, materialize_grads=True)
    for name, part in zip(leaves, parts, strict=True):
        gradient[name].copy_(part)
