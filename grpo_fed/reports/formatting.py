"""Numbers, counts and lists of names as people read them, on a terminal and in pages."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TypeGuard

import numpy as np

from grpo_fed.scenario.toml.text import shorten

MAX_LETTERS = 160
"""Characters of a list of names in a sentence."""
MAX_TEXT = 400
"""Characters of a prompt or a completion in a table."""
CURVE_WIDTH = 24
"""Characters of a curve where there is room for it."""
LEVELS = "▁▂▃▄▅▆▇█"


def is_finite(value: float | None) -> TypeGuard[float]:
    """Decide whether a value is known and finite."""
    return value is not None and math.isfinite(value)


def format_return(value: float | None) -> str:
    """Write a return: `9.55`, `307.6`, `12,345`; `-` if it is unknown."""
    if not is_finite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}"


def format_small(value: float | None) -> str:
    """Write a KL or an entropy, with four digits below 1; `-` if it is unknown."""
    if not is_finite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def format_share(value: float | None) -> str:
    """Write a share in percent; `-` if it is unknown."""
    return f"{value:.0%}" if is_finite(value) else "-"


def format_duration(seconds: float) -> str:
    """Write a duration: `0.8 s`, `12 s`, `3:05`, `1:02:03`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_megabytes(megabytes: float) -> str:
    """Write an amount of data as GB, MB or kB."""
    if megabytes >= 1000:
        return f"{megabytes / 1000:,.2f} GB"
    return f"{megabytes:,.1f} MB" if megabytes >= 1 else f"{megabytes * 1000:,.1f} kB"


def format_count(count: int, noun: str) -> str:
    """Write a count with its noun: `1 client`, `6 clients`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short_task(task: str) -> str:
    """Shorten a source of prompts to the name of its function; ids of environments stay."""
    return task.rpartition(":")[2] or task


def format_names(names: Sequence[str], most: int = 3) -> str:
    """Write up to `most` names and how many more there are: `a, b, c and 2 more`."""
    rest = len(names) - most
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:most])} and {rest} more"


def printable_text(text: str) -> str:
    """Replace what would control a terminal, such as escapes; lines and tabs stay."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def visible_text(text: str, most: int = MAX_TEXT) -> str:
    """Write what a model reads or writes in a cell: the ends of lines as `↵`, of a long text the beginning and the end.

    An empty text is `∅`.
    """
    shown = printable_text(text).replace("\r\n", "\n").replace("\n", "↵").replace("\t", " ")
    if len(shown) > most:
        shown = f"{shown[: most * 2 // 3].rstrip()} … {shown[-(most // 3) :].lstrip()}"
    return shown or "∅"


def draw_curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """Draw values as a line of block characters, from the lowest to the highest.

    Of more values than `width`, each character stands for the mean of several.
    """
    if not values:
        return ""
    parts = np.array_split(np.asarray(values, float), min(width, len(values)))
    means = np.array([part.mean() for part in parts])
    low, high = means.min(), means.max()
    heights = np.zeros(len(means)) if high == low else (means - low) / (high - low)
    return "".join(LEVELS[round(float(height) * (len(LEVELS) - 1))] for height in heights)


def list_names(names: Iterable[str]) -> str:
    """Write names in a sentence, shortened if they are many."""
    return shorten(", ".join(names), MAX_LETTERS)


def format_range(weights: Collection[float]) -> str:
    """Write the weights of the clients: one number, or a range."""
    low, high = min(weights), max(weights)
    return f"{low:g}" if low == high else f"{low:g} to {high:g} (by client)"
