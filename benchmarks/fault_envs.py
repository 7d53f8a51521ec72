"""A CartPole that misbehaves when a benchmark says so: `benchmarks.fault_envs:Faulty-v0`.

The file `<folder>/<client>` holds the name of what it does and the number of steps until then; the environment removes
the file when it reads it, so that each happens once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.classic_control import CartPoleEnv

RAISED = (RuntimeError, MemoryError, RecursionError, SystemExit, KeyboardInterrupt, StopIteration, AssertionError)
"""What it raises, by name."""
LEAKS: list[object] = []


class FaultyCartPole(CartPoleEnv):
    def __init__(self, folder: str = "", client: str = "", pause: float = 0.0, render_mode: str | None = None) -> None:
        """pause: seconds that a step takes."""
        super().__init__(render_mode=render_mode)
        self._pause = pause
        self._file = Path(folder, client) if folder else None
        self._fault, self._left = "", 0

    def step(self, action: Any) -> Any:
        time.sleep(self._pause)
        if not self._fault and self._file is not None and self._file.exists():
            self._fault, steps = self._file.read_text().rsplit(" ", 1)
            self._left = int(steps)
            self._file.unlink()
        if self._fault:
            self._left -= 1
            if self._left < 0:
                fault, self._fault = self._fault, ""
                return misbehave(fault, super().step(action))
        return super().step(action)


def misbehave(fault: str, answer: Any) -> Any:
    """Do what is asked, and return what the step returns then."""
    observation, reward, terminated, truncated, info = answer
    for kind in RAISED:
        if fault == f"raises {kind.__name__}":
            raise kind("on request")
    values = {
        "observes NaN": (np.full(4, np.nan, np.float32), reward, terminated, truncated, info),
        "observes infinity": (np.full(4, np.inf, np.float32), reward, terminated, truncated, info),
        "observes another shape": (np.zeros(5, np.float32), reward, terminated, truncated, info),
        "observes words": ("nothing", reward, terminated, truncated, info),
        "observes nothing": (None, reward, terminated, truncated, info),
        "is rewarded with NaN": (observation, float("nan"), terminated, truncated, info),
        "is rewarded with infinity": (observation, float("inf"), terminated, truncated, info),
        "is rewarded with words": (observation, "much", terminated, truncated, info),
        "is rewarded with nothing": (observation, None, terminated, truncated, info),
        "returns nothing": None,
        "returns four values": (observation, reward, terminated, info),
    }
    if fault in values:
        return values[fault]
    if fault in DEEDS:
        DEEDS[fault]()
        return answer
    raise ValueError(f"{fault} is no fault")


def _flood() -> None:
    for _ in range(20_000):
        print("x" * 100)


def _leave() -> None:
    os._exit(7)


def _leak_handles() -> None:
    LEAKS.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(100))


def _reseed() -> None:
    np.random.seed(1)  # noqa: NPY002, that a user's environment does so must not matter
    torch.manual_seed(1)


DEEDS = {
    "ends its process": _leave,
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hangs": lambda: time.sleep(3600),
    "prints 2 MB": _flood,
    "starts a process": lambda: LEAKS.append(subprocess.Popen(["sleep", "3600"], start_new_session=True)),
    "leaks 20 MB": lambda: LEAKS.append(bytearray(20_000_000)),
    "leaks 100 handles": _leak_handles,
    "seeds the global generators": _reseed,
    "changes the folder": lambda: os.chdir("/"),
    "clears sys.path": sys.path.clear,
    "warns": lambda: warnings.warn("on request", stacklevel=1),
    "sleeps a little": lambda: time.sleep(0.2),
    "takes two threads": lambda: torch.set_num_threads(2),
}
"""What it does beside the step, by name."""
FAULTS = (
    *(f"raises {kind.__name__}" for kind in RAISED),
    "observes NaN",
    "observes infinity",
    "observes another shape",
    "observes words",
    "observes nothing",
    "is rewarded with NaN",
    "is rewarded with infinity",
    "is rewarded with words",
    "is rewarded with nothing",
    "returns nothing",
    "returns four values",
    *DEEDS,
)

gymnasium.register("Faulty-v0", entry_point=f"{__name__}:FaultyCartPole", max_episode_steps=50)
