"""Adam for K stacked clients (1412.6980): each with its own learning rate, step count and right to pause."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BETA1, BETA2 = 0.9, 0.999


@dataclass(frozen=True)
class Adam:
    """Moments of the gradient; the tensors change in place, so slices of one Adam serve slices of its clients."""

    mean: Tensor
    """[K, P]."""
    square: Tensor
    """[K, P]."""
    count: Tensor
    """[K, 1] float64: steps taken by each client."""
    epsilon: float

    @classmethod
    def start(cls, clients: int, size: int, epsilon: float, device: torch.device | str = "cpu") -> Adam:
        zeros = torch.zeros(clients, size, device=device)
        return cls(zeros, zeros.clone(), torch.zeros(clients, 1, dtype=torch.float64), epsilon)

    def rows(self, chunk: slice) -> Adam:
        """The same moments, seen for some clients only."""
        return Adam(self.mean[chunk], self.square[chunk], self.count[chunk], self.epsilon)

    def step(self, parameters: Tensor, gradient: Tensor, learning_rate: Tensor, active: Tensor | None = None) -> None:
        """Move parameters [K, P] down the gradient [K, P] in place, by learning_rate [K, 1]; the inactive [K] rest."""
        if active is not None:
            self._step_some(parameters, gradient, learning_rate, active)
            return
        self.count.add_(1)
        self.mean.lerp_(gradient, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        pace = (learning_rate / (1 - BETA1**self.count)).to(parameters)
        spread = (1 - BETA2**self.count).sqrt().to(parameters)
        parameters.addcdiv_(self.mean * pace, self.square.sqrt().div_(spread).add_(self.epsilon), value=-1)

    def _step_some(self, parameters: Tensor, gradient: Tensor, learning_rate: Tensor, active: Tensor) -> None:
        rows = active.nonzero().squeeze(1)
        if len(rows) == 0:
            return
        here = rows.to(self.count.device)
        some = Adam(self.mean[rows], self.square[rows], self.count[here], self.epsilon)
        moved = parameters[rows]
        some.step(moved, gradient[rows], learning_rate[here])
        for whole, part, index in (
            (self.mean, some.mean, rows),
            (self.square, some.square, rows),
            (self.count, some.count, here),
            (parameters, moved, rows),
        ):
            whole[index] = part
