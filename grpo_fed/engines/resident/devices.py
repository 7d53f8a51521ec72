"""What a node says of the device of its client, for `deploy status`; it does not import torch for that."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass

QUERY = ["--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
"""What the driver's own program is asked for."""
SECONDS = 10.0
"""Seconds that it has for its answer."""


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    index: str
    uuid: str
    name: str
    mebibytes: int


def describe_device(device: str) -> str:
    """Describe the device that a client computes on: its name in torch, and a GPU's own name and memory.

    device: auto, cpu, cuda or cuda:N, where N counts the GPUs that `CUDA_VISIBLE_DEVICES` shows.
    """
    gpus = _visible(_list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if device == "auto":
        device = "cuda:0" if gpus else "cpu"
    kind, _, number = device.partition(":")
    place = int(number or 0)
    if kind != "cuda" or place >= len(gpus):
        return device
    gpu = gpus[place]
    return f"cuda:{place} {gpu.name}, {gpu.mebibytes / 1024:.0f} GiB"


def parse_gpus(text: str) -> list[Gpu]:
    """Read the GPUs from the answer of the driver's program, a line each."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [Gpu(row[0], row[1], row[2], int(row[3])) for row in rows if len(row) == 4 and row[3].isdigit()]


def _visible(gpus: list[Gpu], shown: str | None) -> list[Gpu]:
    """Return the GPUs that programs see, in their order; an entry that is unknown hides all after it, as in CUDA."""
    if shown is None:
        return gpus
    visible: list[Gpu] = []
    for entry in filter(None, map(str.strip, shown.split(","))):
        found = [gpu for gpu in gpus if entry == gpu.index or gpu.uuid.startswith(entry)]
        if len(found) != 1:
            break
        visible += found
    return visible


@functools.cache
def _list_gpus() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(done.stdout)
