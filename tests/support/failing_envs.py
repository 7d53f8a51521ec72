"""CartPoles that fail, log their process, or wait, when a test says so.

Scenarios name them `tests.support.failing_envs:Failing-v0`, `...:PidLogging-v0` and `...:Waiting-v0`.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv


class FailingCartPole(CartPoleEnv):
    """While the file `when` exists, a step raises, ends the process, hangs or waits, as `how` says."""

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


class PidLoggingCartPole(FailingCartPole):
    """Appends the id of the process that makes it to the file `pid_file`."""

    def __init__(self, pid_file: str, when: str = "", how: str = "raise", render_mode: str | None = None) -> None:
        super().__init__(when, how, render_mode)
        with Path(pid_file).open("a") as file:
            file.write(f"{os.getpid()}\n")


class WaitingCartPole(CartPoleEnv):
    """Waits for a file in `folder`, in its first step after its client's state of each of `rounds` is written.

    Each process that begins to wait appends its id to a file. once: only the first process waits.
    """

    def __init__(
        self,
        client: str,
        state: str,
        rounds: Sequence[int],
        folder: str,
        once: bool = False,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(render_mode=render_mode)
        self.client = client
        self.state_folder = Path(state)
        self.rounds = rounds
        self.once = once
        self.folder = Path(folder)

    def step(self, action: Any) -> Any:
        for number in self.rounds:
            waits, go = (self.folder / f"{self.client} {what} after {number}" for what in ("waits", "goes"))
            if go.exists() or (self.once and waits.exists()):
                continue
            if any(self.state_folder.glob(f"*/{self.client}/round-{number:04d}.safetensors")):
                with waits.open("a") as file:
                    print(os.getpid(), file=file, flush=True)
                while not go.exists():
                    time.sleep(0.05)
        return super().step(action)


gymnasium.register("Failing-v0", entry_point=f"{__name__}:FailingCartPole", max_episode_steps=50)
gymnasium.register("PidLogging-v0", entry_point=f"{__name__}:PidLoggingCartPole", max_episode_steps=50)
gymnasium.register("Waiting-v0", entry_point=f"{__name__}:WaitingCartPole", max_episode_steps=50)
