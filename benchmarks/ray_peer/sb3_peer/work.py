"""The work of the clients, and the learner that does it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger

NUM_ENVS, HORIZON, EPOCHS, MINIBATCHES = 8, 128, 4, 4
NOTHING = "nothing"
"""The task of a client that answers with the parameters that it was sent."""
NUMBERS = 25_400
"""Number of parameters that an idle client is sent: 100 KB."""


@dataclass(frozen=True)
class Work:
    """The work of a federation."""

    task: str
    """A gymnasium id, or `NOTHING`."""
    clients: int
    rounds: int
    steps: int
    """Environment steps of a client in a round."""

    def record(self) -> ConfigRecord:
        """Make the record that is sent to the clients."""
        return ConfigRecord(asdict(self))


def first_arrays(work: Work) -> ArrayRecord:
    """Make the first parameters of the federation."""
    if work.task == NOTHING:
        return ArrayRecord([np.zeros(NUMBERS, np.float32)])
    return ArrayRecord(learner(work.task, 0, num_envs=1).policy.state_dict())


def learner(task: str, seed: int, num_envs: int = NUM_ENVS) -> PPO:
    """Make the peer's PPO: 64x64 tanh units by default, without a render mode, which would cost time, and a log."""
    environments = make_vec_env(task, n_envs=num_envs, seed=seed, env_kwargs={"render_mode": None})
    settings: dict[str, Any] = {
        "n_steps": HORIZON,
        "batch_size": num_envs * HORIZON // MINIBATCHES,
        "n_epochs": EPOCHS,
    }
    model = PPO("MlpPolicy", environments, seed=seed, device="cpu", **settings)
    model.set_logger(Logger(None, []))
    return model


def one_thread() -> None:
    """Use one thread, since the matrices are small and every core has its own actor."""
    torch.set_num_threads(1)
