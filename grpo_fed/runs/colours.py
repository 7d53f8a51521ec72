"""Colours of clients and methods, the same in figures and in MLflow."""

from __future__ import annotations

INK, MUTED, GRID, PAPER = "#1f2329", "#666d77", "#d9dee4", "#ffffff"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195")
"""Okabe and Ito's, without the black, that is our ink, and the yellow, that white paper swallows; a violet for it."""


def client_colour(number: int) -> str:
    """Of a client: the palette, then darker, then lighter."""
    turn, place = divmod(number, len(PALETTE))
    base = [int(PALETTE[place][i : i + 2], 16) for i in (1, 3, 5)]
    toward, share = [(0, 0.0), (0, 0.4), (255, 0.45)][turn % 3]
    return "#" + "".join(f"{round(part + (toward - part) * share):02x}" for part in base)
