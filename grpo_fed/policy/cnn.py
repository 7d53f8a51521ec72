"""CnnPolicy: a network for pictures, an encoder before the layers of our actor-critic network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from torch import Tensor

from grpo_fed.policy.activations import ACTIVATIONS
from grpo_fed.policy.autograd import AutogradPolicy
from grpo_fed.policy.base import Parameters, PolicyOutput
from grpo_fed.policy.blocks import Layout
from grpo_fed.policy.distributions import Distribution
from grpo_fed.policy.encoders import ENCODERS, scale_pictures
from grpo_fed.policy.layers import apply_heads, apply_linear, initial_tensor, linear_shapes
from grpo_fed.scenario.settings import PolicySettings
from grpo_fed.tasks.pictures import PictureShape, channels_height_width, has_channels_first


@final
class CnnPolicy(AutogradPolicy):
    """An encoder, hidden layers and an actor's head; the critic has all of its own, or only a head.

    Pictures come flat and as uint8, [K, B, D], and are scaled here; normalised ones come as float32.
    """

    def __init__(self, picture: PictureShape, distribution: Distribution, settings: PolicySettings) -> None:
        """Raise ValueError for pictures that the encoder cannot take. picture: the shape of an observation."""
        self.picture = picture
        self.sizes = channels_height_width(picture)
        self.observation_size = self.sizes[0] * self.sizes[1] * self.sizes[2]
        self.distribution = distribution
        self.settings = settings
        self.encoder = ENCODERS[settings.encoder](*self.sizes)
        self.separate = settings.torso == "separate"
        """Whether the critic has an encoder and hidden layers of its own."""
        self.shapes = dict(self._shapes())
        self.layout = Layout.from_shapes(self.shapes.items(), settings)
        self.trainable = frozenset(self.shapes)
        self.activation = ACTIVATIONS[settings.activation]

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """List the names and shapes of the parameters, in order."""
        chains = ["torso", "critic"] if self.separate else ["torso"]
        width = self.settings.hidden[-1] if self.settings.hidden else self.encoder.features
        for chain in chains:
            yield from ((f"{chain}.{name}", shape) for name, shape in self.encoder.shapes())
            inputs = self.encoder.features
            for number, units in enumerate(self.settings.hidden, self.encoder.layers):
                yield from linear_shapes(f"{chain}.{number}", inputs, units)
                inputs = units
            if chain == "torso":
                yield from linear_shapes("actor", width, self.distribution.head_size)
                if self.distribution.log_std_size:
                    yield "actor.log_std", (self.distribution.log_std_size,)
        yield from linear_shapes("critic.head", width, 1)

    def initial(self, seed: int) -> Tensor:
        settings = self.settings
        values = {
            name: initial_tensor(name, self.shapes, seed, settings.orthogonal, settings.log_std)[None]
            for name in self.shapes
        }
        return self.layout.flatten(values)[0]

    def actor_parameters(self) -> frozenset[str]:
        return frozenset(name for name in self.shapes if not name.startswith("critic."))

    def chain_of(self, parameter: str) -> str:
        return "critic" if self.separate and parameter.startswith("critic.") else "actor"

    def act(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return apply_heads(parameters, self.features(parameters, observations), self.distribution)

    def forward(self, parameters: Parameters, observations: Tensor) -> PolicyOutput:
        pictures = self._pictures(observations)
        features = self._hidden(parameters, "torso", pictures)
        last = self._hidden(parameters, "critic", pictures) if self.separate else features
        values = apply_linear(parameters, "critic.head", last).squeeze(-1)
        return PolicyOutput(apply_heads(parameters, features, self.distribution), values)

    def features(self, parameters: Parameters, observations: Tensor) -> Tensor:
        return self._hidden(parameters, "torso", self._pictures(observations))

    def _pictures(self, observations: Tensor) -> Tensor:
        """Give flat observations [K, B, D] the form of pictures, [K, B, C, H, W] float32."""
        channels, height, width = self.sizes
        scaled = scale_pictures(observations)
        if len(self.picture) == 2 or has_channels_first(self.picture):
            return scaled.view(*scaled.shape[:-1], channels, height, width)
        return scaled.view(*scaled.shape[:-1], height, width, channels).movedim(-1, 2)

    def _hidden(self, parameters: Parameters, chain: str, pictures: Tensor) -> Tensor:
        """Compute the last hidden layer of a chain, [K, B, C, H, W] -> [K, B, F]."""
        hidden = self.encoder.encode(parameters, chain, pictures)
        for number in range(self.encoder.layers, self.encoder.layers + len(self.settings.hidden)):
            hidden = self.activation.forward(apply_linear(parameters, f"{chain}.{number}", hidden))
        return hidden
