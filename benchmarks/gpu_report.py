"""Extent, Report, learners and timing, which the parts of benchmarks/gpu.py have in common."""

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
"""Environment steps of each client between two updates."""


@dataclass(frozen=True)
class Extent:
    """Sizes and repetitions of the measurements."""

    compared: int
    """Number of clients whose parameters are compared between devices."""
    rounds: int
    """Number of rounds of that comparison."""
    on_device: Sequence[int]
    """Numbers of clients whose speed is measured on the device."""
    on_cpu: Sequence[int]
    """Numbers of clients whose speed is measured on the CPU."""
    later_on_cpu: Sequence[int]
    """Further numbers of clients on the CPU, measured at the end."""
    threaded: Sequence[int]
    """Numbers of clients measured on the CPU with a thread for each core."""
    timed: int
    """Number of rounds whose median is reported."""
    solving: int
    """Number of clients that learn until they have solved their task."""
    every: int
    """Number of updates between two evaluations."""
    updates: int
    """Number of updates after which training stops, even if some clients have not solved their task."""
    cap: float
    """Seconds after which training stops in the same way."""
    seeds: Sequence[int]
    """Seeds of the peer's runs."""
    profiled: int
    """Number of clients whose kernels are profiled."""
    graphed: Sequence[int]
    """Numbers of clients whose CUDA graphs are measured."""
    repeats: int
    """Number of repetitions of short measurements."""
    writing: Sequence[int]
    """Numbers of clients with a language model."""
    width: int
    """Width of the random language model whose speed is measured."""
    layers: int
    """Number of its layers."""


class Report:
    """Prints each result at once, appends it to a file of JSON lines, and tracks how much time is left."""

    def __init__(self, out: Path | None, limit: float) -> None:
        self._out = out
        self._began = time.perf_counter()
        self._limit = limit

    def add(self, part: str, text: str, **values: Any) -> None:
        """Report one result, as text and as values."""
        print(f"[{self.seconds:6.1f} s] {part}: {text}", flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(json.dumps({"part": part, "text": text, **values}) + "\n")

    @property
    def seconds(self) -> float:
        """Seconds since the benchmark began."""
        return time.perf_counter() - self._began

    def has_time(self, seconds: float) -> bool:
        """Return whether so much time is left."""
        return self.seconds + seconds <= self._limit


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the device, the CPU and the versions."""
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
    """Make a learner of CartPole clients, each with its own initial parameters and random streams."""
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
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Release the memory of the last learner, and reset the measurement of peak memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def time_call(action: Callable[[], object], device: torch.device) -> float:
    """Measure the seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def mean_milliseconds(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Measure the mean milliseconds of a call among many, after two warm-up calls; waits for the device at the end."""
    action()
    action()

    def repeated() -> None:
        for _ in range(repeats):
            action()

    return 1000 * time_call(repeated, device) / repeats
