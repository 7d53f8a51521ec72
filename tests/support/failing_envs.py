"""CartPoles that fail, `tests.support.failing_envs:Balky-v0`, or wait, `tests.support.failing_envs:Waiting-v0`, when they are told to.

`tests.support.failing_envs:Signed-v0` says in which process it lives.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv


class Balky(CartPoleEnv):
    """While the file `when` is there, its first step raises, ends the process, hangs or waits: `how`."""

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
                case "wait":
                    while Path(self.when).exists():
                        time.sleep(0.02)
        return super().step(action)


gymnasium.register("Balky-v0", entry_point="tests.support.failing_envs:Balky", max_episode_steps=50)


class Signed(Balky):
    """Writes down in which process it was made."""

    def __init__(self, book: str, when: str = "", how: str = "raise", render_mode: str | None = None) -> None:
        super().__init__(when, how, render_mode)
        with Path(book).open("a") as file:
            file.write(f"{os.getpid()}\n")


gymnasium.register("Signed-v0", entry_point="tests.support.failing_envs:Signed", max_episode_steps=50)


class Waiting(CartPoleEnv):
    """In its first step after each of `rounds`, once its client's state is written, it waits for a file in `folder`."""

    def __init__(
        self, client: str, state: str, rounds: Sequence[int], folder: str, render_mode: str | None = None
    ) -> None:
        super().__init__(render_mode=render_mode)
        self.client = client
        self.home = Path(state)
        self.rounds = rounds
        self.folder = Path(folder)

    def step(self, action: Any) -> Any:
        for number in self.rounds:
            waits, go = (self.folder / f"{self.client} {what} after {number}" for what in ("waits", "goes"))
            if not go.exists() and any(self.home.glob(f"*/{self.client}/round-{number:04d}.safetensors")):
                waits.touch()
                while not go.exists():
                    time.sleep(0.05)
        return super().step(action)


gymnasium.register("Waiting-v0", entry_point="tests.support.failing_envs:Waiting", max_episode_steps=50)
