"""Sums over the steps of episodes, taken apart where episodes end."""

from __future__ import annotations

import numpy as np


def split_sums(sums: np.ndarray, t: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split sums over the steps of each copy at the E ends of episodes: each episode's part, and the running one's.

    sums: [T, L]. t, rows: [E], the steps and copies of the ends, in order of time.

    Returns the sums of the episodes [E], and of the steps after each copy's last end [L].
    """
    order = np.argsort(rows, kind="stable")  # copy by copy, in order of time
    copies, at_end = rows[order], sums[t, rows][order]
    is_first, is_last = np.diff(copies, prepend=-1) != 0, np.diff(copies, append=-1) != 0
    episodes, running = np.empty_like(at_end), sums[-1].copy()
    episodes[order] = at_end - np.where(is_first, 0, np.roll(at_end, 1))
    running[copies[is_last]] -= at_end[is_last]
    return episodes, running
