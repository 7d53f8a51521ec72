"""Adam for K stacked clients (1412.6980): each with its own learning rate, step count and right to pause."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
    count: np.ndarray
    """[K, 1] float64: steps taken by each client."""
    epsilon: float
    columns: Tensor | None = None
    """[n] int64: the parameters that it moves; None for all."""

    @classmethod
    def start(cls, clients: int, size: int, epsilon: float, device: torch.device | str = "cpu") -> Adam:
        zeros = torch.zeros(clients, size, device=device)
        return cls(zeros, zeros.clone(), np.zeros((clients, 1)), epsilon)

    def rows(self, chunk: slice) -> Adam:
        """The same moments, seen for some clients only."""
        return Adam(self.mean[chunk], self.square[chunk], self.count[chunk], self.epsilon, self.columns)

    def for_columns(self, columns: Tensor) -> Adam:
        """The same moments, for some parameters [n] int64 alone: the others rest. It counts its own steps, from 0."""
        return Adam(self.mean, self.square, np.zeros_like(self.count), self.epsilon, columns)

    def step(
        self, parameters: Tensor, gradient: Tensor, learning_rate: np.ndarray, active: Tensor | None = None
    ) -> None:
        """Move parameters [K, P] down the gradient [K, P] in place, by learning_rate [K, 1]; the inactive [K] rest."""
        if active is not None or self.columns is not None:
            self._step_some(parameters, gradient, learning_rate, active)
            return
        self.count[:] += 1
        self.mean.lerp_(gradient, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        pace = per_client(learning_rate / (1 - BETA1**self.count), parameters)
        spread = per_client(np.sqrt(1 - BETA2**self.count), parameters)
        parameters.addcdiv_(self.mean * pace, self.square.sqrt().div_(spread).add_(self.epsilon), value=-1)

    def _step_some(
        self, parameters: Tensor, gradient: Tensor, learning_rate: np.ndarray, active: Tensor | None
    ) -> None:
        everybody = torch.ones(len(parameters), dtype=torch.bool, device=parameters.device)
        rows = (everybody if active is None else active).nonzero().squeeze(1)
        if len(rows) == 0:
            return
        here = rows.cpu().numpy()
        place = (rows,) if self.columns is None else (rows[:, None], self.columns)
        some = Adam(self.mean[place], self.square[place], self.count[here], self.epsilon)
        moved = parameters[place]
        some.step(moved, gradient[place], learning_rate[here])
        self.mean[place], self.square[place], parameters[place] = some.mean, some.square, moved
        self.count[here] = some.count


def per_client(values: np.ndarray, like: Tensor) -> Tensor:
    """One number for each client, [K, 1], as a tensor beside parameters [K, P]."""
    return torch.from_numpy(values.astype(np.float32)).to(like.device)
