"""What the parts of benchmarks/gpu.py have in common: their extent, their report, their learners and their clock."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks

NUM_ENVS, HORIZON, EPOCHS, MINIBATCHES = 8, 128, 4, 4
PPO = {
    "rollout": {"num_envs": NUM_ENVS, "horizon": HORIZON},
    "objective": {"preset": "ppo", "epochs": EPOCHS, "minibatches": MINIBATCHES},
}
BATCH = NUM_ENVS * HORIZON
"""Steps of each client between two updates."""


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    compared: int
    """Clients whose parameters are compared between devices."""
    rounds: int
    """Rounds of that comparison."""
    on_device: Sequence[int]
    """Numbers of clients whose speed is measured on the device."""
    on_cpu: Sequence[int]
    """The same on the CPU."""
    later_on_cpu: Sequence[int]
    """More of these, at the end."""
    threaded: Sequence[int]
    """The same with all cores as torch's threads."""
    timed: int
    """Rounds whose median is reported."""
    solving: int
    """Clients that learn until they have solved their task."""
    every: int
    """Updates between two evaluations."""
    updates: int
    """Updates after which nobody waits any longer for clients that have not solved it."""
    cap: float
    """Seconds after which the same holds."""
    seeds: Sequence[int]
    """Seeds of the peer's runs."""
    profiled: int
    """Clients whose kernels are counted."""
    graphed: Sequence[int]
    """Numbers of clients whose CUDA graphs are measured."""
    repeats: int
    """Repetitions of what takes less than a millisecond."""


class Report:
    """Prints every line at once, appends its numbers to a file of JSON lines, and knows how much time is left."""

    def __init__(self, out: Path | None, limit: float) -> None:
        self._out = out
        self._began = time.perf_counter()
        self._limit = limit

    def line(self, part: str, text: str, **values: Any) -> None:
        """One finding, in words and as numbers."""
        print(f"[{self.seconds:6.1f} s] {part}: {text}", flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(json.dumps({"part": part, "text": text, **values}) + "\n")

    @property
    def seconds(self) -> float:
        """Since the benchmark began."""
        return time.perf_counter() - self._began

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return self.seconds + seconds <= self._limit


def machine(device: torch.device) -> dict[str, Any]:
    """What measures and what is measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matmul": torch.get_float32_matmul_precision(),
    }


def make_learner(clients: int, device: torch.device, sections: Mapping[str, Any] = PPO, **more: Any) -> StackedLearner:
    """A learner of so many carts, each with first parameters and random streams of its own."""
    scenario = Scenario.model_validate(
        {
            "name": "gpu",
            "method": "local",
            "device": str(device),
            "policy": {"same_start": False},
            "clients": [{"name": "cart", "env": "grpo_fed/CartPole-v1", "count": clients}],
            **sections,
            **more,
        }
    )
    learner = StackedLearner(resolve_tasks(scenario), scenario)
    if device.type == "cuda":
        assert len(learner.stacks) == 1, "on a GPU the clients of a learner are one stack"
    return learner


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what the last learner had, and begin to look for the most memory in use anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Time of one call."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def milliseconds_each(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean time of a call among many, after two that do not count; the device is waited for after the last alone."""
    action()
    action()

    def repeated() -> None:
        for _ in range(repeats):
            action()

    return 1000 * seconds_of(repeated, device) / repeats
