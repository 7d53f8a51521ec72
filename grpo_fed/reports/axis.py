"""What the horizontal axis of figures counts: rounds, steps of all clients, or the bytes that were sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from grpo_fed.reports.charts import set_round_axis
from grpo_fed.runs.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AxisName: TypeAlias = Literal["rounds", "steps", "bytes"]
AXES: tuple[AxisName, ...] = get_args(AxisName)
MOST_MEGABYTES = 1000.0
"""Above, bytes are counted in GB."""


@dataclass(frozen=True, eq=False)
class XAxis:
    """The horizontal axis of a run's figures."""

    name: AxisName
    values: np.ndarray
    """[R]: where each round is."""
    label: str
    """What it counts, below the axis."""
    short: str
    """The same in a title: `round`."""

    @property
    def with_start(self) -> np.ndarray:
        """[R + 1]: the values with 0, before the first round."""
        return np.array([0, *self.values])

    @property
    def edges(self) -> np.ndarray:
        """[R + 1]: where a level begins that holds for a round each, and where the last one ends."""
        half = 0.5 if self.name == "rounds" else (self.values[-1] - self.values[0]) / max(1, len(self.values) - 1) / 2
        return np.array([self.values[0] - half, *self.values[1:], self.values[-1] + half])

    def place(self, axes: Axes, with_start: bool = False, label: bool = True) -> None:
        """Set the limits, the ticks and the label of axes. with_start: begin before the first round."""
        values = self.with_start if with_start else self.values
        if self.name == "rounds":
            set_round_axis(axes, values, label)
            return
        from matplotlib.ticker import EngFormatter, MaxNLocator

        room = 0.012 * float(values[-1] - values[0]) or 0.5
        axes.set_xlim(float(values[0]) - room, float(values[-1]) + room)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if self.name == "steps":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if label:
            axes.set_xlabel(self.label)


def x_axis(history: History, name: AxisName | None = None, in_megabytes: bool = False) -> XAxis:
    """Make the axis of a run's figures; ValueError if a round has no such number.

    name: by default the one that the figures of this history were asked to have. in_megabytes: for runs side by side,
    of which some may send nothing.
    """
    name = name or history.axis
    if name == "rounds":
        return XAxis(name, history.rounds, "round", "round")
    if name == "steps":
        steps = history.server_series("global_step")
        unit = "environment steps" if history.scenario.unit == "steps" else history.scenario.unit
        return XAxis(name, _checked(history, name, steps), f"{unit} of all clients", unit.removesuffix("s"))
    if name != "bytes":
        raise ValueError(f"--x {name}: must be one of {' '.join(AXES)}")
    megabytes = np.cumsum(np.nan_to_num(history.server_series("comm/MB_up") + history.server_series("comm/MB_down")))
    if in_megabytes:
        return XAxis(name, megabytes, "MB sent by all", "bytes sent")
    if not len(megabytes) or not megabytes[-1]:
        raise ValueError(f"{history.folder}: --x bytes: its clients sent nothing; use --x rounds or --x steps")
    in_gigabytes = megabytes[-1] >= MOST_MEGABYTES
    label = f"{'GB' if in_gigabytes else 'MB'} sent by all"
    return XAxis(name, megabytes / 1000 if in_gigabytes else megabytes, label, "bytes sent")


def _checked(history: History, name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(f"{history.folder}: --x {name}: rounds.jsonl lacks the number of some round; use --x rounds")
    return values
