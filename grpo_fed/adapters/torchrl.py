"""Actors of TorchRL, which read and write a TensorDict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.distributions import Distribution

from grpo_fed.scenario.extras import write_install_command


class TensorDictActor(Protocol):
    """An actor such as TorchRL's `ProbabilisticActor`."""

    def get_dist(self, tensordict: Any) -> Distribution:
        """Return the distribution of the actions at the observations of a TensorDict."""
        ...


def torchrl_distribution(actor: TensorDictActor, key: str = "observation") -> Callable[[Tensor], Distribution]:
    """Return an actor's policy. key: what it reads observations from."""
    try:
        from tensordict import TensorDict  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"TorchRL is not installed: {write_install_command('torchrl')}") from error

    def distribution(observations: Tensor) -> Distribution:
        return actor.get_dist(TensorDict({key: observations}, [len(observations)]))

    return distribution
