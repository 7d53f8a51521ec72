"""Adam for K stacked clients (1412.6980), each with its own learning rate and step count; clients may pause."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BETA1, BETA2 = 0.9, 0.999


@dataclass(frozen=True)
class Adam:
    """Moments of the gradient. The arrays change in place, so that a slice of rows is an Adam of those clients."""

    mean: Tensor
    """[K, P]: running mean of the gradient."""
    square: Tensor
    """[K, P]: running mean of its square."""
    count: np.ndarray
    """[K, 1] float64: steps taken by each client."""
    epsilon: float
    columns: Tensor | None = None
    """[n] int64: the parameters that it moves; None for all."""

    @classmethod
    def start(cls, clients: int, size: int, epsilon: float, device: torch.device | str = "cpu") -> Adam:
        """Moments of 0."""
        zeros = torch.zeros(clients, size, device=device)
        return cls(zeros, zeros.clone(), np.zeros((clients, 1)), epsilon)

    def rows(self, rows: slice) -> Adam:
        """The same moments, for some clients."""
        return Adam(self.mean[rows], self.square[rows], self.count[rows], self.epsilon, self.columns)

    def for_columns(self, columns: Tensor) -> Adam:
        """The same moments, but only these parameters [n] int64 move. It counts its own steps, from 0."""
        return Adam(self.mean, self.square, np.zeros_like(self.count), self.epsilon, columns)

    def step(
        self, parameters: Tensor, gradient: Tensor, learning_rate: np.ndarray, active: Tensor | None = None
    ) -> None:
        """Move parameters [K, P] down the gradient [K, P] in place.

        learning_rate: [K, 1].
        active: [K] bool, the clients that move; None for all.
        """
        if active is not None or self.columns is not None:
            self._step_some(parameters, gradient, learning_rate, active)
            return
        self.count[:] += 1
        self.mean.lerp_(gradient, 1 - BETA1)
        self.square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        step_size = per_client(learning_rate / (1 - BETA1**self.count), parameters)
        root_correction = per_client(np.sqrt(1 - BETA2**self.count), parameters)
        denominator = self.square.sqrt().div_(root_correction).add_(self.epsilon)
        parameters.addcdiv_(self.mean * step_size, denominator, value=-1)

    def step_lengths(self, learning_rate: np.ndarray) -> Tensor:
        """The length of the last step for each parameter, [K, P]: it moved by this times the mean gradient.

        It has no meaning for clients without a step, and for parameters that `columns` leaves out.
        """
        root_correction = per_client(np.sqrt(1 - BETA2**self.count), self.square)
        denominator = self.square.sqrt().div_(root_correction).add_(self.epsilon)
        return denominator.reciprocal_().mul_(per_client(learning_rate, self.square))

    def _step_some(
        self, parameters: Tensor, gradient: Tensor, learning_rate: np.ndarray, active: Tensor | None
    ) -> None:
        """The same step for the active clients and the columns that move, on copies of their entries."""
        all_clients = torch.ones(len(parameters), dtype=torch.bool, device=parameters.device)
        rows = (all_clients if active is None else active).nonzero().squeeze(1)
        if len(rows) == 0:
            return
        moving = rows.cpu().numpy()
        entries = (rows,) if self.columns is None else (rows[:, None], self.columns)
        adam = Adam(self.mean[entries], self.square[entries], self.count[moving], self.epsilon)
        moved = parameters[entries]
        adam.step(moved, gradient[entries], learning_rate[moving])
        self.mean[entries], self.square[entries], parameters[entries] = adam.mean, adam.square, moved
        self.count[moving] = adam.count


def per_client(values: np.ndarray, like: Tensor) -> Tensor:
    """Numbers of each client, [K, 1], as a float32 tensor on the device of `like`."""
    numbers = values.astype(np.float32)
    return torch.from_numpy(numbers) if like.device.type == "cpu" else copy_to_device(numbers, like.device)


def copy_to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Put numbers [K, 1] on a GPU without waiting for what it computes.

    Numbers that are all equal are not copied: the GPU fills a tensor with them.
    """
    if (numbers == numbers[0]).all():
        return torch.full(numbers.shape, float(numbers[0, 0]), device=device)
    return torch.from_numpy(numbers).to(device, non_blocking=True)  # staged by CUDA before this returns
