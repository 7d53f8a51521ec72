"""The device that tensors are on."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """The device of this name; `auto` is CUDA where there is one, else the CPU. ValueError for one that is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        available = f"{count} CUDA devices here, counted from 0" if count else "no CUDA device here"
        raise ValueError(f"device = {name}: torch sees {available}; use cpu or auto")
    return device
