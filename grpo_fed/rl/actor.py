"""Acting with the policies of K clients, in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy
from grpo_fed.policy.recurrent import RecurrentPolicy


class Actor:
    """Acts for K clients: numpy in, numpy out, on the parameters' own memory where they are on the CPU."""

    def __init__(self, policy: StackedPolicy, parameters: Tensor) -> None:
        self.policy = policy
        self.memory = np.zeros((len(parameters), 0, policy.memory_size), np.float32)
        """[K, N, H]: what the policies remember after the last call; [K, 0, H] before the first."""
        self.views, self.device = policy.layout.views(parameters), parameters.device
        self.act: Callable[[np.ndarray], np.ndarray]
        if isinstance(policy, RecurrentPolicy):
            self.act = self._remember
        elif parameters.device.type == "cpu":
            self.act = policy.numpy_actor(policy.layout.views(parameters.numpy()))
        else:
            self.act = self._on_device

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """The action distributions of K clients, [K, N, D] -> [K, N, M]; with memory, [K, N, D + H + 1]."""
        return self.act(observations)

    def forget(self) -> None:
        """Remember nothing, as before the first call."""
        self.memory = self.memory[:, :0]

    def _on_device(self, observations: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            output = self.policy.act(self.views, torch.from_numpy(observations).to(self.device))
        array: np.ndarray = output.cpu().numpy()
        return array

    def _remember(self, observations: np.ndarray) -> np.ndarray:
        assert isinstance(self.policy, RecurrentPolicy)
        with torch.inference_mode():
            inputs = torch.from_numpy(observations).to(self.device)
            output, memory = self.policy.act_and_remember(self.views, inputs)
        array: np.ndarray = output.cpu().numpy()
        self.memory = memory.cpu().numpy()
        return array
