"""Acting with the policies of K clients, in numpy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from grpo_fed.policy.base import StackedPolicy


class Actor:
    """Acts for K clients: numpy in, numpy out, on the parameters' own memory where they are on the CPU."""

    def __init__(self, policy: StackedPolicy, parameters: Tensor) -> None:
        self.policy = policy
        if parameters.device.type == "cpu":
            self.act = policy.numpy_actor(policy.layout.views(parameters.numpy()))
        else:
            self.act = self._on_device
            self.views, self.device = policy.layout.views(parameters), parameters.device

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """The action distributions of K clients, [K, N, D] -> [K, N, M]."""
        return self.act(observations)

    def _on_device(self, observations: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            output = self.policy.act(self.views, torch.from_numpy(observations).to(self.device))
        array: np.ndarray = output.cpu().numpy()
        return array
