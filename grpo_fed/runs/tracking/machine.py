"""Samples how busy the machine is while a run goes on, under the names that MLflow's page "System metrics" shows."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import final

import psutil  # type: ignore[import-untyped]

PREFIX = "system/"
FIRST, INTERVAL = 1.0, 10.0
"""Seconds from the beginning to the first sample, and between two."""
MOST = 10_000
"""Samples that are kept while the store takes none; older ones are dropped."""
QUERY = "--query-gpu=utilization.gpu,memory.used,memory.total"
PATIENCE = 5.0
"""Seconds that a query of the GPUs may take."""


@dataclass(frozen=True)
class MachineSample:
    """Holds one sample."""

    time: int
    """Milliseconds since 1970."""
    values: dict[str, float]
    """Numbers by their keys."""


@final
class MachineSampler:
    """Samples in a thread of its own, until it is stopped."""

    def __init__(self, first: float = FIRST, interval: float = INTERVAL) -> None:
        self._samples: deque[MachineSample] = deque(maxlen=MOST)
        self._pauses, self._stopping = (first, interval), threading.Event()
        self._has_gpus = shutil.which("nvidia-smi") is not None
        self._thread = threading.Thread(target=self._sample_often, daemon=True)
        self._thread.start()

    def waiting(self) -> list[MachineSample]:
        """Return the samples that were not sent yet."""
        return list(self._samples)

    def drop(self, sent: list[MachineSample]) -> None:
        """Forget samples that were sent."""
        for sample in sent:
            if self._samples and self._samples[0] is sample:
                self._samples.popleft()

    def stop(self) -> None:
        """Take a last sample, and sample no more."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._thread.join(2 * PATIENCE)

    def _sample_often(self) -> None:
        psutil.cpu_percent()  # the first call of a thread returns nothing of use: it begins to measure
        pause, interval = self._pauses
        while not self._stopping.wait(pause):
            self._sample()
            pause = interval
        self._sample()

    def _sample(self) -> None:
        values = machine_values() | (gpu_values() if self._has_gpus else {})
        self._samples.append(MachineSample(time.time_ns() // 1_000_000, values))


def machine_values() -> dict[str, float]:
    """Measure the whole machine's processors, since the last call, and its memory."""
    memory = psutil.virtual_memory()
    return {
        f"{PREFIX}cpu_utilization_percentage": psutil.cpu_percent(),
        f"{PREFIX}system_memory_usage_megabytes": (memory.total - memory.available) / 1e6,
        f"{PREFIX}system_memory_usage_percentage": memory.percent,
    }


def gpu_values() -> dict[str, float]:
    """Ask the driver of NVIDIA's GPUs how busy they are; nothing where it does not answer."""
    try:
        done = subprocess.run(
            ["nvidia-smi", QUERY, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_gpu_lines(done.stdout)


def read_gpu_lines(text: str) -> dict[str, float]:
    """Read a line for each GPU: percent of the time that it computed, MiB of memory used and in all."""
    values = {}
    for number, line in enumerate(text.splitlines()):
        try:
            busy, used, total = (float(field) for field in line.split(","))
        except ValueError:  # a field that the GPU does not have is "[N/A]"
            continue
        values[f"{PREFIX}gpu_{number}_utilization_percentage"] = busy
        values[f"{PREFIX}gpu_{number}_memory_usage_megabytes"] = used * 1.048576
        values[f"{PREFIX}gpu_{number}_memory_usage_percentage"] = 100 * used / total
    return values
