"""Differences cut to a bound for each parameter group, and bounds that follow a quantile of their lengths.

S shared parameters in G groups. Adaptive bounds are those of Andrew et al. 2021, 1905.03871.
"""

from __future__ import annotations

import numpy as np


def cut_to_bounds(difference: np.ndarray, groups: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale each group of a difference [S] down to its bound, if it is longer; return it and who was within, [G] bool.

    groups: [S], the group of each parameter. bounds: [G].
    """
    lengths = np.sqrt(np.bincount(groups, np.square(difference, dtype=np.float64), len(bounds)))
    is_within = lengths <= bounds
    factors = np.where(is_within, 1.0, bounds / np.where(is_within, 1.0, lengths))
    return difference * factors[groups], is_within


def next_bounds(bounds: np.ndarray, within: np.ndarray, quantile: float, rate: float) -> np.ndarray:
    """Move bounds towards the lengths below which a quantile of the differences is: C exp(-rate (b - quantile)).

    within: [G], b, the noised fraction of clients whose difference was within the bound.
    """
    moved: np.ndarray = bounds * np.exp(-rate * (np.clip(within, 0.0, 1.0) - quantile))
    return moved
