"""AdapterPolicy: the adapters of a language model as a policy, whose parameters are cut into layers.

An adapter adds alpha / rank * B A to the linear map W that it adapts, with A [rank, in] and B [out, rank] (LoRA,
2106.09685). With `language.learn = "B"` all clients have the same A, drawn once with orthonormal rows (FFA-LoRA,
2403.12313). Then the mean of the adapters is the adapter of the mean, and ||B1 - B2|| = ||(B1 - B2) A||, so distances
between parameters are distances between the weights that they stand for.
"""

from __future__ import annotations

import zlib
from typing import final

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import Policy
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.language.shape import MAPS, ModelShape
from grpo_fed.policy.patterns import match_names
from grpo_fed.scenario.settings import LanguageSettings, PolicySettings


@final
class AdapterPolicy(Policy):
    """The adapters of one client: `layers.0.q_proj.B` and so on, one for each adapted map of each layer.

    With `language.learn = "B"` a layer is one block, `layers.0`; with `"AB"` it is two, `layers.0.A` and `layers.0.B`.
    """

    def __init__(self, shape: ModelShape, language: LanguageSettings, policy: PolicySettings) -> None:
        self.shape = shape
        self.rank = language.rank
        self.alpha = float(language.rank if language.alpha is None else language.alpha)
        self.learn = language.learn
        self.maps = _adapted_maps(shape, language)
        """The adapted maps of each layer, in the order of `MAPS`."""
        self.layout = Layout.from_shapes(
            ((name, size) for name, size in self._shapes().items() if name.rpartition(".")[2] in self.learn),
            policy,
            _block_of_layer if self.learn == "B" else _block_of_layer_and_factor,
        )

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank

    def initial(self, seed: int) -> Tensor:
        """Return adapters that add nothing, [P]: B is zero, and A, if it is learned, has orthonormal rows."""
        values = {
            slot.name: _orthonormal_rows(slot.name, slot.shape, seed)
            if slot.name.endswith(".A")
            else torch.zeros(slot.shape)
            for slot in self.layout.slots
        }
        return self.layout.flatten(values)

    def frozen_factors(self, seed: int) -> dict[str, Tensor]:
        """Return the factors A that do not learn, [rank, in] by name; none where A is learned.

        seed: the scenario's, so that all clients have the same factors.
        """
        if self.learn == "AB":
            return {}
        shapes = self._shapes().items()
        return {name: _orthonormal_rows(name, shape, seed) for name, shape in shapes if name.endswith(".A")}

    def chain_of(self, parameter: str) -> str:
        return "layers"

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of all factors, learned or not, by name."""
        shapes = {}
        sizes = self.shape.map_shapes()
        for layer in range(self.shape.layers):
            for name in self.maps:
                outputs, inputs = sizes[name]
                shapes[f"layers.{layer}.{name}.A"] = (self.rank, inputs)
                shapes[f"layers.{layer}.{name}.B"] = (outputs, self.rank)
        return shapes


def _adapted_maps(shape: ModelShape, language: LanguageSettings) -> tuple[str, ...]:
    """Return the maps that the patterns of `language.maps` match, and check that the rank fits them."""
    found = {name for pattern in language.maps for name in match_names(pattern, MAPS, "language.maps", "linear map")}
    maps = tuple(name for name in MAPS if name in found)
    for name in maps:
        inputs = shape.map_shapes()[name][1]
        if language.rank > inputs:
            raise ValueError(
                f"language.rank: {language.rank} orthonormal rows do not fit into the {inputs} inputs of {name}; use a"
                f" rank of {inputs} or less"
            )
    return maps


def _block_of_layer(parameter: str) -> str:
    return ".".join(parameter.split(".")[:2])


def _block_of_layer_and_factor(parameter: str) -> str:
    return f"{_block_of_layer(parameter)}.{parameter.rpartition('.')[2]}"


def _orthonormal_rows(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw orthonormal rows, [rank, in], from a stream that the seed, the name and the shape determine."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), *shape])
    columns, triangle = np.linalg.qr(generator.standard_normal(shape[::-1]))
    columns *= np.sign(np.diagonal(triangle))  # without it the signs depend on the library
    return torch.from_numpy(np.ascontiguousarray(columns.T, np.float32))
