"""Gaussian noise, from a run's own random streams, or from the operating system's random numbers.

Noise of a run's own streams follows from its seed: whoever knows that can take the noise away. It is for research.
"""

from __future__ import annotations

import os

import numpy as np

TO_UNIT = 2.0**-53


def standard_noise(size: int, stream: np.random.Generator | None) -> np.ndarray:
    """Draw standard normal numbers [size] float64. stream: None draws from the operating system's random numbers."""
    if stream is not None:
        return stream.standard_normal(size)
    half = (size + 1) // 2
    radius, angle = np.sqrt(-2 * np.log(1 - system_uniform(half))), 2 * np.pi * system_uniform(half)  # Box and Muller
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def system_uniform(size: int) -> np.ndarray:
    """Draw numbers [size] from 0 to below 1, in steps of 2^-53, from the operating system's random numbers."""
    words = np.frombuffer(os.urandom(8 * size), np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * TO_UNIT
