"""The colours of clients and methods, the same in figures and in MLflow."""

from __future__ import annotations

INK, MUTED, GRID, PAPER = "#1f2329", "#666d77", "#d9dee4", "#ffffff"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195")
"""Okabe and Ito's colours, but for black, which is the ink, and yellow, which is invisible on white: violet instead."""


def pick_colour(index: int) -> str:
    """Return the colour of the client or method with this number: the palette first, then darker, then lighter."""
    cycle, position = divmod(index, len(PALETTE))
    channels = [int(PALETTE[position][i : i + 2], 16) for i in (1, 3, 5)]
    target, share = [(0, 0.0), (0, 0.4), (255, 0.45)][cycle % 3]
    return "#" + "".join(f"{round(channel + (target - channel) * share):02x}" for channel in channels)
