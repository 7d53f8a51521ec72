"""The scales of clients' returns, and scores that make returns of unlike environments comparable.

A return of 200 is good in one environment and poor in another, so returns of unlike environments are never averaged.
A normalised score is 0 for random actions and 1 for a reference, (return - random) / (reference - random), as Atari's
human-normalised scores are (Mnih et al. 2015). Where it is not known for all clients, each environment has its own
mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # a resident node imports this room's records, and stays small
    from grpo_fed.scenario.scenario import Scenario
    from grpo_fed.scenario.settings import ClientSettings

T = TypeVar("T", float, np.ndarray)

KNOWN: Mapping[str, tuple[float, float]] = {
    "CartPole-v1": (24.09, 475.0),
    "Acrobot-v1": (-498.94, -100.0),
    "MountainCar-v0": (-200.0, -110.0),
    "MountainCarContinuous-v0": (-33.26, 90.0),
    "Pendulum-v1": (-1239.56, -152.25),
    "LunarLander-v3": (-193.24, 200.0),
    "LunarLanderContinuous-v3": (-212.4, 200.0),
    "BipedalWalker-v3": (-100.29, 300.0),
    "FrozenLake-v1": (0.01, 0.7),
    "FrozenLake8x8-v1": (0.0, 0.85),
    "Taxi-v4": (-773.49, 8.0),
    "grpo_fed/CartPole-v1": (24.09, 475.0),
    "grpo_fed/Acrobot-v1": (-498.94, -100.0),
    "grpo_fed/MountainCar-v0": (-200.0, -110.0),
    "grpo_fed/MountainCarContinuous-v0": (-33.26, 90.0),
    "grpo_fed/Pendulum-v1": (-1239.56, -152.25),
    "grpo_fed/PointMass-v0": (-92.97, -4.17),
    "grpo_fed/Catch-v0": (-2.19, 4.5),
    "grpo_fed/Recall-v0": (0.12, 0.95),
}
"""Returns of random actions and of a reference, by environment: means of 200 episodes with seeds 0 to 199, and the
environment's own threshold, or where it has none those of a scripted policy (`python -m benchmarks.random_returns`)."""


@dataclass(frozen=True)
class ReturnScale:
    """What the returns of an entry's clients are measured by."""

    label: str
    """The environment, or the rewards of completions; of two scales in one environment, the entry's name."""
    random: float | None = None
    """The return of random actions; None if no scale is known."""
    reference: float | None = None
    """The return of the reference."""

    @property
    def is_known(self) -> bool:
        """Whether returns can be normalised."""
        return self.random is not None and self.reference is not None

    def normalise(self, value: T) -> T:
        """Compute the normalised score of a return: 0 for random actions, 1 for the reference."""
        assert self.random is not None, "the scale is known"
        assert self.reference is not None, "the scale is known"
        return (value - self.random) / (self.reference - self.random)


def scales_of(scenario: Scenario) -> dict[str, ReturnScale]:
    """Return the scale of each entry's returns; empty if all clients have the same, so that returns can be averaged.

    Completions with the same rewards have the same scale, whatever their prompts.
    """
    if len({entry.scale for entry in scenario.clients}) == 1:
        return {}
    labels = Counter(label for label, _ in {entry.scale for entry in scenario.clients})
    return {entry.name: _scale_of(entry, is_single=labels[entry.scale[0]] == 1) for entry in scenario.clients}


def are_known(scales: Iterable[ReturnScale]) -> bool:
    """Return whether all returns can be normalised."""
    return all(scale.is_known for scale in scales)


def unknown_scales_cure(scales: Mapping[str, ReturnScale]) -> str:
    """Say which entries have no scale, and what gives them one."""
    missing = [name for name, scale in scales.items() if not scale.is_known]
    return (
        f"the clients have unlike environments, and no scale is known for {', '.join(missing)}:"
        " give each score = { random = ..., reference = ... }"
    )


def check_scales(scenario: Scenario) -> None:
    """ValueError for a run that ends by a median of returns that have none."""
    stop, scales = scenario.stop, scales_of(scenario)
    if (stop.target is not None or stop.patience) and not are_known(scales.values()):
        key = "target" if stop.target is not None else "patience"
        raise ValueError(f"stop.{key} = {getattr(stop, key):g}: {unknown_scales_cure(scales)}")


def _scale_of(entry: ClientSettings, is_single: bool) -> ReturnScale:
    """Make the scale of an entry's returns. is_single: whether its environment has one scale in the scenario.

    Wrappers may change rewards, so the table is not used for environments with wrappers.
    """
    label, given = entry.scale
    if given is not None:
        return ReturnScale(label if is_single else entry.name, given.random, given.reference)
    random, reference = (None, None) if entry.wrappers else KNOWN.get(label, (None, None))
    return ReturnScale(label if is_single else entry.name, random, reference)
