"""Encoders of pictures: convolutions that turn pictures of K clients into features.

An encoder is a shape without parameters, as a policy is; the parameters of its layers come by name. K clients, B
pictures of C channels, H rows and W columns, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from grpo_fed.policy.base import Parameters
from grpo_fed.policy.layers import apply_convolution


class Encoder(ABC):
    """Convolutions for pictures of one size."""

    layers: int
    """How many layers it has by name, 0, 1, ...; those behind it go on counting."""
    features: int
    """F."""

    @abstractmethod
    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """List the names and shapes of its parameters, in order."""

    @abstractmethod
    def encode(self, parameters: Parameters, chain: str, pictures: Tensor) -> Tensor:
        """Compute features, [K, B, C, H, W] -> [K, B, F]. chain: what the names of its parameters begin with."""


@dataclass(frozen=True)
class Convolution:
    """A convolution of the Nature encoder, without padding."""

    channels: int
    size: int
    stride: int


NATURE = (Convolution(32, 8, 4), Convolution(64, 4, 2), Convolution(64, 3, 1))
"""Mnih et al. (2015), "Human-level control through deep reinforcement learning", Extended Data Table 1."""
NATURE_LEAST = 36
"""The least rows and columns of a picture that leave one of each behind the last convolution."""
IMPALA = (16, 32, 32)
"""Channels of the sequences of the deep network of IMPALA (1802.01561, figure 3)."""


@final
class NatureEncoder(Encoder):
    """Three convolutions with large steps, each followed by ReLU."""

    layers = len(NATURE)

    def __init__(self, channels: int, height: int, width: int) -> None:
        """Raise ValueError for pictures that are too small."""
        if min(height, width) < NATURE_LEAST:
            raise ValueError(
                f'policy.encoder = "nature" needs pictures of {NATURE_LEAST} x {NATURE_LEAST} pixels or more, and these'
                f' have {height} x {width}; use "impala", or a wrapper that enlarges them'
            )
        self.channels = channels
        for convolution in NATURE:
            height, width = (1 + (size - convolution.size) // convolution.stride for size in (height, width))
        self.features = NATURE[-1].channels * height * width

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        inputs = self.channels
        for number, convolution in enumerate(NATURE):
            yield f"{number}.weight", (convolution.channels, inputs, convolution.size, convolution.size)
            yield f"{number}.bias", (convolution.channels,)
            inputs = convolution.channels

    def encode(self, parameters: Parameters, chain: str, pictures: Tensor) -> Tensor:
        for number, convolution in enumerate(NATURE):
            pictures = apply_convolution(parameters, f"{chain}.{number}", pictures, convolution.stride).relu()
        return pictures.flatten(2)


@final
class ImpalaEncoder(Encoder):
    """Three sequences of a convolution, a maximum over 3 x 3 pixels with step 2, and two residual blocks."""

    layers = len(IMPALA)

    def __init__(self, channels: int, height: int, width: int) -> None:
        self.channels = channels
        for _ in IMPALA:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.features = IMPALA[-1] * height * width

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        inputs = self.channels
        for number, channels in enumerate(IMPALA):
            for name, before in (("conv", inputs), *((name, channels) for pair in RESIDUAL for name in pair)):
                yield f"{number}.{name}.weight", (channels, before, 3, 3)
                yield f"{number}.{name}.bias", (channels,)
            inputs = channels

    def encode(self, parameters: Parameters, chain: str, pictures: Tensor) -> Tensor:
        clients = len(pictures)
        for number in range(len(IMPALA)):
            name = f"{chain}.{number}"
            wide = apply_convolution(parameters, f"{name}.conv", pictures, padding=1)
            pictures = max_pool2d(wide.flatten(0, 1), 3, 2, 1).unflatten(0, (clients, -1))
            for first, second in RESIDUAL:
                inner = apply_convolution(parameters, f"{name}.{first}", pictures.relu(), padding=1)
                pictures = pictures + apply_convolution(parameters, f"{name}.{second}", inner.relu(), padding=1)
        return pictures.relu().flatten(2)


RESIDUAL = (("residual.0.first", "residual.0.second"), ("residual.1.first", "residual.1.second"))
"""The convolutions of the two residual blocks of a sequence."""

ENCODERS: dict[str, type[NatureEncoder | ImpalaEncoder]] = {"nature": NatureEncoder, "impala": ImpalaEncoder}
"""By their names in a scenario."""


def scale_pictures(observations: Tensor) -> Tensor:
    """Scale uint8 from 0 to 1; numbers of other types, such as normalised ones, stay as they are."""
    return observations.float() / 255 if observations.dtype == torch.uint8 else observations
