"""What all figures share: a style, colours that readers with colour blindness can tell apart, labels beside lines.

matplotlib is imported when a figure is drawn and not before. Its settings are changed only for that time, so a program
that uses matplotlib too keeps its own. No figure goes through pyplot, so there is no global state and no window.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fed.runs.colours import GRID, INK, MUTED, PALETTE, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)))
"""Line styles for the first, the second and the third use of the palette, so that colour alone never tells two lines
apart."""
SHARED_COLOUR, DEPARTED_COLOUR = "#c9dff0", "#d55e01"
"""The ends of a map's scale. The second differs by one from the palette's orange, so that a page does not replace it
by the palette's colour on dark paper."""
DARK_COLOURS = {
    INK: ("ink", "#e6edf3"),
    MUTED: ("muted", "#9aa4af"),
    GRID: ("grid", "#3a424c"),
    PAPER: ("paper", "#11161d"),
    **{
        light: (f"line-{index}", dark)
        for index, (light, dark) in enumerate(
            zip(
                PALETTE,
                ("#4aa8e0", "#f28b4b", "#2fc79b", "#e39cc4", "#8fd0f7", "#f2bd4a", "#b391d6"),
                strict=True,
            )
        )
    },
}
"""For each colour its name in a page's style sheet, and the colour that replaces it on dark paper."""
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.unicode_minus": True,
    "figure.dpi": 200,
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names may have a dollar in them
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
}
MAX_LABELS = 10
"""How many lines of one pair of axes have a name beside them; more names would be too small to read."""
MAX_SINGLE_CLIENTS = 40
"""How many clients have a line or a named row each; more are shown as bands of quantiles, or rows without names."""
MAX_PANELS = 12
"""How many panels a figure has."""
FIGURE_WIDTH = 8.0
"""Inches. A page shows figures about 800 points wide, so that their letters are as large as those of the text."""
TITLE_HEIGHT, LINE_HEIGHT = 0.3, 0.19
"""Inches of the title, and of each line of the caption below it."""
CAPTION_WIDTH = 116
"""Characters in a line of the caption."""
LABEL_GAP = 11.5
"""Points between the labels of two lines."""
FONTS = "'DejaVu Sans', Verdana, sans-serif"


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure that is drawn when its picture is asked for."""

    name: str
    """Name of its files, without the ending."""
    title: str
    caption: str
    """How to read the figure."""
    alt: str
    """Alternative text: what the figure shows, with its main numbers."""
    height: float
    """Inches, without title and caption."""
    paint: Callable[[Figure], None]
    """Draws the axes."""

    @cached_property
    def png(self) -> bytes:
        """The picture with its title and caption."""
        with self.laid_out() as figure:
            return _to_png(figure)

    @cached_property
    def svg(self) -> str:
        """The same as vectors."""
        with self.laid_out() as figure:
            return _to_svg(figure)

    @cached_property
    def bare_svg(self) -> str:
        """The picture alone, for a page that has the title and the caption as its own text."""
        with self.laid_out(headed=False) as figure:
            return _to_svg(figure)

    @contextmanager
    def laid_out(
        self, headed: bool = True, width: float = FIGURE_WIDTH, height: float | None = None, **changes: Any
    ) -> Iterator[Figure]:
        """Give the figure with everything in its place, while matplotlib has our style.

        headed: with title and caption. width, height: inches; the height without title and caption. changes: to the
        style.
        """
        from matplotlib import rc_context, rcParamsDefault
        from matplotlib.figure import Figure

        lines = list(_wrap(self.caption)) if headed else []
        head = TITLE_HEIGHT + LINE_HEIGHT * len(lines) + 0.1 if headed else 0.0
        full_height = (self.height if height is None else height) + head
        backend = ("backend", "backend_fallback", "interactive", "toolbar")
        defaults = {key: value for key, value in rcParamsDefault.items() if key not in backend}
        style: Any = {**defaults, **STYLE, "svg.hashsalt": self.name, **changes}
        with rc_context(style):
            figure = Figure(figsize=(width, full_height))
            figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - head / full_height), h_pad=0.06, w_pad=0.06)
            left = 0.08 / width
            if headed:
                figure.text(left, 1 - 0.08 / full_height, self.title, size=12.5, weight="bold", va="top")
            for index, line in enumerate(lines):
                top = 1 - (TITLE_HEIGHT + LINE_HEIGHT * index + 0.03) / full_height
                figure.text(left, top, line, size=9, color=MUTED, va="top")
            self.paint(figure)
            engine = figure.get_layout_engine()
            assert engine is not None
            engine.execute(figure)
            figure.set_layout_engine("none")  # a second pass would move the axes away from the labels placed now
            for axes in figure.axes:
                _spread_labels(axes)
            yield figure


def make_drawing(
    name: str, title: str, caption: str, alt: str, height: float, paint: Callable[[Figure], None]
) -> Drawing:
    """Make a figure with a title and a caption.

    caption: how to read the figure. height: inches, without title and caption. paint: draws the axes.
    """
    return Drawing(name, title, caption, alt, height, paint)


def scaled(size: float) -> float:
    """Scale points, of letters or between them, that suit a page to the letters of the figure that is being drawn."""
    from matplotlib import rcParams

    return size * float(rcParams["font.size"]) / float(STYLE["font.size"])


def _wrap(text: str) -> Iterator[str]:
    """Break a caption into lines."""
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= CAPTION_WIDTH:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    if line:
        yield line


def _to_png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(
        file, metadata={"Software": None}, pil_kwargs={"compress_level": 4}
    )  # savefig would draw everything twice
    return file.getvalue()


def _to_svg(figure: Figure) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(file, metadata={"Date": None, "Creator": None})
    return file.getvalue().replace("'DejaVu Sans'", FONTS)


# For a page -----------------------------------------------------------------------------------------------------------


def inline_svg(drawing: Drawing) -> str:
    """Make the bare SVG an element of a page, with the page's colours and with ids that no other figure has."""
    text = drawing.bare_svg[drawing.bare_svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{drawing.name}-", text)
    for colour, (name, _) in DARK_COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    head = re.match("<svg[^>]*>", text)
    assert head is not None
    box = re.search('viewBox="[^"]*"', head[0])
    assert box is not None
    label = drawing.alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {box[0]} role="img" aria-label="{label}">{text[head.end() :]}'


# Lines and the labels beside them -------------------------------------------------------------------------------------


def line_colour(index: int) -> str:
    """Choose the colour of a figure's line by its index."""
    return PALETTE[index % len(PALETTE)]


def line_dashes(index: int) -> Any:
    """Choose the dashes of a figure's line by its index."""
    return DASHES[index // len(PALETTE) % len(DASHES)]


def marker_style(count: int) -> dict[str, Any]:
    """Show the points of a line that has few of them, so that a single point can be seen too."""
    return {"marker": "o", "markersize": 3.2} if count <= 20 else {}


def label_line(axes: Axes, y: float, text: str, colour: str, weight: str = "normal") -> None:
    """Write a line's name at its right end; overlapping labels are moved apart when the figure is complete.

    y: the line's last value.
    """
    label = axes.annotate(
        text,
        xy=(1, y),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        weight=weight,
        size=scaled(9),
        annotation_clip=False,
    )
    label.set_gid("end")


def _spread_labels(axes: Axes) -> None:
    """Move the labels at the ends of lines apart."""
    labels: list[Any] = [text for text in axes.texts if text.get_gid() == "end"]
    for label in labels:
        label.set_gid(None)
    if len(labels) < 2:
        return
    dpi = axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    box = axes.get_window_extent()
    wanted = [float(axes.transData.transform((0, label.xy[1]))[1]) for label in labels]
    chosen = spread_positions(wanted, scaled(LABEL_GAP) * dpi / 72, box.y0, box.y1)
    for label, old, new in zip(labels, wanted, chosen, strict=True):
        label.set_position((5, (new - old) * 72 / dpi))


def spread_positions(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions at least `gap` apart, in the same order, between low and high if there is room.

    The result is as near to the wanted positions as can be in least squares: positions that touch form a run, which
    stands where the mean of its members is the mean of their wanted positions.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    runs: list[tuple[float, int]] = []  # position less rank * gap, equal for all of a run's members; its length
    for rank, index in enumerate(order):
        start, length = wanted[index] - rank * gap, 1
        while runs and runs[-1][0] >= start:
            before, length_before = runs.pop()
            start = (before * length_before + start * length) / (length_before + length)
            length += length_before
        runs.append((start, length))
    starts = [start for start, length in runs for _ in range(length)]
    highest_start = max(low, high - (len(wanted) - 1) * gap)
    positions = [0.0] * len(wanted)
    for rank, (index, start) in enumerate(zip(order, starts, strict=True)):
        positions[index] = min(max(start, low), highest_start) + rank * gap
    return positions


# Axes -----------------------------------------------------------------------------------------------------------------


def set_round_axis(axes: Axes, rounds: np.ndarray, label: bool = True) -> None:
    """Let the horizontal axis go from the first round to the last, in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    first, last = (int(rounds[0]), int(rounds[-1])) if len(rounds) else (0, 1)
    room = max(0.4, 0.012 * (last - first))
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    if label:
        axes.set_xlabel("round")


def panel_grid(panels: int, max_columns: int = 3) -> tuple[int, int]:
    """Choose rows and columns for a number of panels."""
    columns = min(panels, max_columns)
    if panels == max_columns + 1:
        columns = (panels + 1) // 2
    return -(-panels // columns), columns
