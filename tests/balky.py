"""A CartPole that fails when it is told to: `tests.balky:Balky-v0`."""

import os
import time
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv


class Balky(CartPoleEnv):
    """While the file `when` is there, its first step raises, ends the process or hangs: `how`."""

    def __init__(self, when: str = "", how: str = "raise", render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.when = when
        self.how = how

    def step(self, action: Any) -> Any:
        if self.when and Path(self.when).exists():
            match self.how:
                case "raise":
                    raise RuntimeError("it will not move")
                case "exit":
                    os._exit(5)
                case "hang":
                    time.sleep(3600)
        return super().step(action)


gymnasium.register("Balky-v0", entry_point="tests.balky:Balky", max_episode_steps=50)
