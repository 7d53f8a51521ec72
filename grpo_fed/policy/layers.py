"""Layers of stacked networks: linear maps and convolutions of K clients at once, and first values of parameters."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from grpo_fed.policy.base import Parameters
from grpo_fed.policy.distributions import Distribution

GAINS = {"actor.weight": 0.01, "critic.head.weight": 1.0}
"""The gains of orthogonal weights, as usual for PPO; sqrt(2) for all others."""


def apply_linear(parameters: Parameters, name: str, inputs: Tensor) -> Tensor:
    """Apply a linear layer, [K, B, in] -> [K, B, out]."""
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    return torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2))


def apply_convolution(parameters: Parameters, name: str, pictures: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Apply a convolution, [K, B, in, H, W] -> [K, B, out, H', W'].

    On a CPU one client comes after the other, which takes as long as one grouped convolution and gives a client the
    same bits whoever is in the stack; on a GPU the launches would take longer than the arithmetic.
    """
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    if len(pictures) == 1 or pictures.device.type == "cpu":
        rows = zip(pictures.unbind(), weight.unbind(), bias.unbind(), strict=True)
        return torch.stack([conv2d(of_client, w, b, stride, padding) for of_client, w, b in rows])
    return convolve_together(pictures, weight, bias, stride, padding)


def convolve_together(pictures: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """Apply the convolutions of K clients as one with groups, [K, B, in, H, W] -> [K, B, out, H', W'].

    weight: [K, out, in, h, w]. bias: [K, out].
    """
    together = pictures.transpose(0, 1).flatten(1, 2)
    output = conv2d(together, weight.flatten(0, 1), bias.flatten(), stride, padding, groups=len(pictures))
    return output.view(len(output), len(pictures), -1, *output.shape[2:]).transpose(0, 1)


def apply_heads(parameters: Parameters, features: Tensor, distribution: Distribution) -> Tensor:
    """Compute distribution parameters [K, B, M] from features [K, B, F] by the layer `actor` and `actor.log_std`."""
    mean = apply_linear(parameters, "actor", features)
    if not distribution.log_std_size:
        return mean
    log_std = parameters["actor.log_std"].unsqueeze(1).expand(*mean.shape[:-1], -1)
    return torch.cat([mean, log_std], -1)


def initial_tensor(
    name: str, shapes: Mapping[str, Sequence[int]], seed: int, orthogonal: bool, log_std: float
) -> Tensor:
    """Make one tensor's first value: orthogonal with PPO's usual gains, or uniform as torch's own layers have it.

    It depends on the seed, the tensor's name and its shape alone. log_std: of `actor.log_std`.
    """
    value = torch.empty(tuple(shapes[name]))
    if name == "actor.log_std":
        return value.fill_(log_std)
    generator = parameter_generator(name, shapes[name], seed)
    is_weight = name.endswith("weight")
    if orthogonal:
        gain = GAINS.get(name, 2**0.5)
        return nn.init.orthogonal_(value, gain, generator=generator) if is_weight else value.zero_()
    weight = shapes[name] if is_weight else shapes[name.removesuffix("bias") + "weight"]
    bound = prod(weight[1:]) ** -0.5
    return nn.init.uniform_(value, -bound, bound, generator=generator)


def parameter_generator(name: str, shape: Sequence[int], seed: int) -> torch.Generator:
    """Make the generator of a tensor's first values, which depends on the seed, the name and the shape."""
    return torch.Generator().manual_seed(seed ^ zlib.crc32(f"{name}{tuple(shape)}".encode()))


def linear_shapes(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List the names and shapes of a linear layer's parameters; weights are [out, in]."""
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)
