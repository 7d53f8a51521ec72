"""What a client needs of a learner of another library: a torch module, a way to train it, and its policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.optim import Optimizer

Policies: TypeAlias = Distribution | Sequence[Distribution]
"""The action distributions at n observations; a sequence has the independent parts of an action, one after another."""


@dataclass(frozen=True, eq=False)
class LearnerReport:
    """What a learner says of its training in a round."""

    examples: int
    """Environment steps that it learned from: its weight in the merge."""
    observations: Tensor | None = None
    """[n, ...]: observations that it has seen, as its policy takes them; KL is measured on some of them."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers to report, such as its mean return."""


@dataclass(frozen=True)
class Memory:
    """How a learner's further state, such as that of a normaliser, is saved between rounds."""

    save: Callable[[], Mapping[str, np.ndarray]]
    load: Callable[[Mapping[str, np.ndarray]], None]


@dataclass(frozen=True, eq=False)
class TorchLearner:
    """A learner of another library, as a client uses it.

    It is made anew for every instruction, and gets the module's parameters from the server. So a round depends on what
    is sent and remembered alone, and not on the process that a client runs in.
    """

    module: nn.Module
    """Its parameters and buffers are shared by their names."""
    train: Callable[[], LearnerReport]
    """Trains the module for a round."""
    distribution: Callable[[Tensor], Policies] | None = None
    """The policy: observations [n, ...] to the distributions of the actions; None if no KL is to be measured."""
    evaluate: Callable[[], Mapping[str, float]] | None = None
    """Plays without learning, and returns numbers to report; None for no evaluation."""
    optimiser: Optimizer | None = None
    """Its state is remembered between rounds; None for one that begins anew in each."""
    memory: Memory | None = None
    """What else is remembered."""


def module_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Copy a module's parameters and buffers, by name; a tensor with several names has the first one alone."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in _tensors(module)}


def load_module(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Put arrays in the place of a module's parameters and buffers; ValueError where one is missing or does not fit."""
    with torch.no_grad():
        for name, tensor in _tensors(module):
            array = arrays.get(name)
            if array is None or array.shape != tuple(tensor.shape):
                got = "nothing" if array is None else f"shape {array.shape}"
                raise ValueError(
                    f"{name}: the server sent {got} where the module has shape {tuple(tensor.shape)}; do all clients"
                    " and the server make the same module?"
                )
            tensor.copy_(torch.from_numpy(np.array(array)))


def policy_kl(
    learner: TorchLearner,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    observations: Tensor,
) -> float:
    """Measure the mean KL(before, after) between the policies of two models, over observations [n, ...].

    ValueError for a learner without a distribution.
    """
    if learner.distribution is None:
        raise ValueError("the learner has no distribution, so its KL cannot be measured; give TorchLearner one")
    with torch.no_grad():
        load_module(learner.module, before)
        old = learner.distribution(observations)
        load_module(learner.module, after)
        return float(distributions_kl(old, learner.distribution(observations), len(observations)).mean())


def distributions_kl(old: Policies, new: Policies, count: int) -> Tensor:
    """Compute KL(old, new) at each of `count` observations, [n]: the sum over the parts of an action."""
    pairs = list(zip(_parts(old), _parts(new), strict=True))
    return torch.stack([kl_divergence(first, second).reshape(count, -1).sum(1) for first, second in pairs]).sum(0)


def _parts(policies: Policies) -> Sequence[Distribution]:
    return policies if isinstance(policies, Sequence) else [policies]


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
