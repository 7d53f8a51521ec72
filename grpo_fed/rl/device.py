"""The device that a learner computes on."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"{count} CUDA devices here, counted from 0" if count else "no CUDA device here"
        raise ValueError(f"device = {name}: torch sees {there}; use cpu or auto")
    return device
