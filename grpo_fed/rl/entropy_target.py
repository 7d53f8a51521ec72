"""Targets for a policy's entropy: the weight of the entropy bonus is a multiplier, adapted by dual ascent.

A client maximises its surrogate subject to entropy >= target. The constraint's multiplier is the bonus's weight, and
ascent is on its logarithm, as for the temperature of soft actor-critic (1812.05905, section 5): so it stays above 0 and
moves by the same factor wherever it is.

K clients, G groups of action components that have a target, C components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from grpo_fed.scenario.settings import ObjectiveSettings

FIRST, LEAST, MOST = 0.01, 1e-3, 100.0
"""The weight that begins where none is given, and the limits of a weight: without the lower one it would sink so far
while a policy is still random that it came too late afterwards."""
WHOLE = "action"
"""The name of the only group where the target is for the whole action."""


@dataclass(frozen=True, eq=False)
class EntropyTargets:
    """The groups of action components whose entropy has a target."""

    names: tuple[str, ...]
    """[G]."""
    values: Tensor
    """[G]: the targets, in nats."""
    members: Tensor
    """[G, C] float: 1 for the components of a group, else 0. Groups do not overlap."""

    @classmethod
    def of(cls, settings: ObjectiveSettings, components: int, device: torch.device) -> Self | None:
        """Read `objective.entropy_target` for actions of C components; None without a target."""
        target = settings.entropy_target
        if target is None:
            return None
        whole = not isinstance(target, dict)
        values = {WHOLE: target} if not isinstance(target, dict) else target
        members = torch.zeros(len(values), components)
        for group, name in enumerate(values):
            members[group, range(components) if whole else settings.entropy_groups[name]] = 1.0
        return cls(tuple(values), torch.tensor([*values.values()]).to(device), members.to(device))

    def first_weights(self, weights: Tensor) -> Tensor:
        """The weights [..., C] that components begin with: where a group has a target, within the limits."""
        begin = torch.where(weights == 0, FIRST, weights).clamp(LEAST, MOST)
        return torch.where(self.members.any(0), begin, weights)

    def adapt(self, weights: Tensor, entropies: Tensor, rate: float) -> Tensor:
        """Adapt the weights [K, C] to the components' mean entropies [K, C] by one step."""
        of_groups = entropies @ self.members.T
        multipliers = (weights @ self.members.T) / self.members.sum(1)
        adapted = adapt_multipliers(multipliers, of_groups, self.values, rate)
        return torch.where(self.members.any(0), adapted @ self.members, weights)

    def metrics(self, weights: Tensor, entropies: Tensor) -> dict[str, Tensor]:
        """The entropy and the multiplier of each group, [K] each, by the metrics' keys."""
        of_groups, multipliers = entropies @ self.members.T, (weights @ self.members.T) / self.members.sum(1)
        return {
            **{f"entropy/{name}": of_groups[:, group] for group, name in enumerate(self.names)},
            **{f"entropy_multiplier/{name}": multipliers[:, group] for group, name in enumerate(self.names)},
        }


def adapt_multipliers(multipliers: Tensor, entropies: Tensor, targets: Tensor, rate: float) -> Tensor:
    """One step of dual ascent on log multipliers, [K, G], [K, G], [G] -> [K, G].

    log m <- log m + rate (target - entropy), within the limits. It stays where an entropy is unknown, NaN.
    """
    stepped = (multipliers * (rate * (targets - entropies)).exp()).clamp(LEAST, MOST)
    return torch.where(entropies.isnan(), multipliers, stepped)


def refuse_unreachable(settings: ObjectiveSettings, client: str, choices: Sequence[int]) -> None:
    """ValueError where a target is no less than the entropy of actions that are all equally likely.

    choices: [C], the number of options of each component; empty where actions are no choices.
    """
    target = settings.entropy_target
    if target is None or not choices:
        return
    groups = settings.entropy_groups if isinstance(target, dict) else {WHOLE: [*range(len(choices))]}
    for name, value in (target if isinstance(target, dict) else {WHOLE: target}).items():
        most = sum(math.log(choices[member]) for member in groups[name])
        if value >= most:
            key = f"objective.entropy_target.{name}" if isinstance(target, dict) else "objective.entropy_target"
            raise ValueError(
                f"client {client}: {key} = {value:g}: the entropy of its actions is {most:.4g} nats at most, where all"
                " are equally likely; set a lower one"
            )
