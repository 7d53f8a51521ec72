"""Figures of a run, from its folder alone: how clients learned, what they share, how far steps went, what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo_fed.reports.charts import Drawing
from grpo_fed.reports.figures.cost import pace, traffic
from grpo_fed.reports.figures.learning import learning
from grpo_fed.reports.figures.sharing import clusters, groups
from grpo_fed.reports.figures.stepping import kl, steps
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.history import History, read_history

FIGURES = "figures"
ORDER = ("learning", "groups", "clusters", "kl", "steps", "bytes", "time")
"""The names of all figures, as one looks at them."""


def draw_figures(folder: str | Path) -> list[Path]:
    """Write `figures/*.png` and `.svg` of a run folder, finished or not; what there is nothing to say of is left out.

    Those of an earlier time go. ValueError if it is no run folder.
    """
    folder = Path(folder)
    drawn = list(drawings(read_history(folder)))
    home = folder / FIGURES
    home.mkdir(exist_ok=True)
    for old in [*home.glob("*.png"), *home.glob("*.svg")]:
        old.unlink()
    return write(home, drawn)


def write(home: Path, drawn: Sequence[Drawing]) -> list[Path]:
    """A PNG and an SVG of each."""
    paths = []
    for one in drawn:
        write_atomic(home / f"{one.name}.png", one.png)
        write_atomic(home / f"{one.name}.svg", one.svg)
        paths += [home / f"{one.name}.png", home / f"{one.name}.svg"]
    return paths


def drawings(history: History) -> Iterator[Drawing]:
    """All figures that there is something to show in."""
    if not history.lines:
        return
    for one in (learning, groups, clusters, kl, steps, traffic, pace):
        drawn = one(history)
        if drawn is not None:
            yield drawn
