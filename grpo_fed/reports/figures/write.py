"""All figures of a run, written as PNG and SVG to its folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

from grpo_fed.reports.charts import Drawing
from grpo_fed.reports.figures.adaptation import draw_adaptation
from grpo_fed.reports.figures.callbacks import draw_callbacks
from grpo_fed.reports.figures.completions import draw_completions
from grpo_fed.reports.figures.constraints import draw_costs
from grpo_fed.reports.figures.cost import draw_time, draw_traffic
from grpo_fed.reports.figures.evidence import draw_evidence
from grpo_fed.reports.figures.learning import draw_learning
from grpo_fed.reports.figures.privacy import draw_privacy
from grpo_fed.reports.figures.sharing import draw_clusters, draw_groups, draw_sites
from grpo_fed.reports.figures.sparsity import draw_penalty
from grpo_fed.reports.figures.stepping import draw_kl, draw_steps
from grpo_fed.reports.figures.twins import draw_twins
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.history import History, read_history

FIGURES = "figures"
"""The folder of figures in a run's folder."""
FIRST = ("learning", "completions", "groups")
"""The figures that are drawn when a run ends: how clients learned, what they are rewarded for, what they share."""
ORDER = (
    "learning",
    "adaptation",
    "twins",
    "completions",
    "costs",
    "groups",
    "sites",
    "evidence",
    "clusters",
    "penalty",
    "kl",
    "steps",
    "privacy",
    "callbacks",
    "bytes",
    "time",
)
"""The names of all figures, in the order in which they are shown."""


def draw_figures(run: str | Path | History, only: Collection[str] = ()) -> list[Path]:
    """Write `figures/*.png` and `.svg` of a run's folder, whether the run has finished or not.

    Figures that would be empty are left out, and those of an earlier call are removed. only: names of figures, of which
    PNG alone is written; by default all. ValueError if the folder holds no run.
    """
    history = run if isinstance(run, History) else read_history(run)
    drawings = [drawing for drawing in draw_all(history) if not only or drawing.name in only]
    target = history.folder / FIGURES
    target.mkdir(exist_ok=True)
    for old in [*target.glob("*.png"), *target.glob("*.svg")]:
        old.unlink()
    return write_drawings(target, drawings, ("png",) if only else ("png", "svg"))


def write_drawings(
    folder: Path, drawings: Sequence[Drawing], endings: Sequence[Literal["png", "svg"]] = ("png", "svg")
) -> list[Path]:
    """Write a PNG and an SVG of each drawing, or one of them."""
    paths = []
    for drawing in drawings:
        for ending in endings:
            paths.append(folder / f"{drawing.name}.{ending}")
            write_atomic(paths[-1], getattr(drawing, ending))
    return paths


def draw_all(history: History) -> Iterator[Drawing]:
    """Draw every figure that has something to show."""
    if not history.lines:
        return
    for draw in (
        draw_learning,
        draw_adaptation,
        draw_twins,
        draw_completions,
        draw_costs,
        draw_groups,
        draw_sites,
        draw_evidence,
        draw_clusters,
        draw_penalty,
        draw_kl,
        draw_steps,
        draw_privacy,
        draw_callbacks,
        draw_traffic,
        draw_time,
    ):
        drawing = draw(history)
        if drawing is not None:
            yield drawing
