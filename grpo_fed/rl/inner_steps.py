"""Inner steps: gradients are taken where a step on another minibatch leads (first-order Per-FedAvg, 2002.07948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from grpo_fed.rl.client_stack import ParameterStack


@final
@dataclass
class InnerSteps:
    """Makes the inner steps of `personal.inner_rate`, one for every second minibatch (2002.07948, eq. 8)."""

    before: Tensor | None = None
    """[K, P]: the parameters before the inner step; None while there is none."""

    def make(self, stack: ParameterStack) -> bool:
        """Move the parameters along the gradient if it is the turn of an inner step, and return whether it is.

        Otherwise they go back to where they were: the gradient was taken after the inner step, without its second
        derivatives, and they move by it from before that step.
        """
        rate, before = stack.scenario.personal.inner_rate, self.before
        if not rate:
            return False
        self.before = stack.parameters.clone() if before is None else None
        if before is None:
            stack.parameters.sub_(rate * stack.gradient)
        else:
            stack.parameters.copy_(before)
        return before is None
