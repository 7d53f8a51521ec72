"""What all figures have in common: a style of their own, colours that everybody can tell apart, labels beside lines.

matplotlib is imported when something is drawn and not before. Its settings are ours for as long as that takes: who uses
it too keeps their own. Nothing goes through pyplot, so there is no state and no window.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fed.runs.colours import GRID, INK, MUTED, PALETTE, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)))
"""The second and the third time round the palette: colour is never all that tells two lines apart."""
SHARED, PERSONAL = "#c9dff0", "#d55e01"
"""The ends of a map's scale; the second is no colour of the palette to the letter, so that it stays as it is."""
AT_NIGHT = {
    INK: ("ink", "#e6edf3"),
    MUTED: ("muted", "#9aa4af"),
    GRID: ("grid", "#3a424c"),
    PAPER: ("paper", "#11161d"),
    **{
        light: (f"line-{number}", dark)
        for number, (light, dark) in enumerate(
            zip(
                PALETTE,
                ("#4aa8e0", "#f28b4b", "#2fc79b", "#e39cc4", "#8fd0f7", "#f2bd4a", "#b391d6"),
                strict=True,
            )
        )
    },
}
"""For each colour, its name in a page's style sheet, and what it is on dark paper."""
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
NAMED = 10
"""So many lines of an axes have a name beside them; more would be small print."""
THIN = 40
"""Up to so many clients have a line or a row each; more are a fan of quantiles, or rows without names."""
PANELS = 12
WIDTH = 8.0
"""Inches. Pages show it about 800 points wide: then letters are as large as those around it."""
HEAD, LINE = 0.3, 0.19
"""Inches of the title, and of each line below it."""
LETTERS = 116
"""In a line below the title."""
FONTS = "'DejaVu Sans', Verdana, sans-serif"


@dataclass(frozen=True)
class Drawing:
    """A figure, ready to be written or put into a page."""

    name: str
    """Of its files."""
    title: str
    alt: str
    """What it shows, in words, with its main numbers."""
    png: bytes
    svg: str


def drawing(name: str, title: str, caption: str, alt: str, height: float, paint: Callable[[Figure], None]) -> Drawing:
    """What `paint` draws, under a title and a caption that says how to read it; `height` in inches, without these."""
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    below = list(_wrapped(caption))
    head = HEAD + LINE * len(below) + 0.1
    tall = height + head
    backend = ("backend", "backend_fallback", "interactive", "toolbar")
    theirs = {key: value for key, value in rcParamsDefault.items() if key not in backend}
    style: Any = {**theirs, **STYLE, "svg.hashsalt": name}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, tall))
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - head / tall), h_pad=0.06, w_pad=0.06)
        figure.text(0.08 / WIDTH, 1 - 0.08 / tall, title, size=12.5, weight="bold", va="top")
        for number, line in enumerate(below):
            figure.text(0.08 / WIDTH, 1 - (HEAD + LINE * number + 0.03) / tall, line, size=9, color=MUTED, va="top")
        paint(figure)
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.execute(figure)
        figure.set_layout_engine("none")  # a second pass would move what is placed beside it now
        for axes in figure.axes:
            _settle(axes)
        return Drawing(name, title, alt, _png(figure), _svg(figure))


def _wrapped(text: str) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and len(line) + len(word) >= LETTERS:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    if line:
        yield line


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(file, metadata={"Software": None})  # savefig would draw everything twice
    return file.getvalue()


def _svg(figure: Figure) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(file, metadata={"Date": None, "Creator": None})
    return file.getvalue().replace("'DejaVu Sans'", FONTS)


# For a page -----------------------------------------------------------------------------------------------------------


def inline(one: Drawing) -> str:
    """The SVG as an element of a page: its colours are the page's, and its ids no other figure's."""
    text = one.svg[one.svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{one.name}-", text)
    for colour, (name, _) in AT_NIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    head = re.match("<svg[^>]*>", text)
    assert head is not None
    box = re.search('viewBox="[^"]*"', head[0])
    assert box is not None
    label = one.alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} {box[0]} role="img" aria-label="{label}">{text[head.end() :]}'


# Labels beside lines --------------------------------------------------------------------------------------------------


def colour_of(number: int) -> str:
    """Of the number-th line of a figure."""
    return PALETTE[number % len(PALETTE)]


def dash_of(number: int) -> Any:
    """Of the number-th line of a figure."""
    return DASHES[number // len(PALETTE) % len(DASHES)]


def label_end(axes: Axes, y: float, text: str, colour: str, weight: str = "normal") -> None:
    """Name a line at its right end; the labels of an axes make room for each other when all are there."""
    label = axes.annotate(
        text,
        xy=(1, y),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        weight=weight,
        size=9,
        annotation_clip=False,
    )
    label.set_gid("end")


def _settle(axes: Axes) -> None:
    """Move an axes' end labels apart."""
    labels: list[Any] = [text for text in axes.texts if text.get_gid() == "end"]
    for label in labels:
        label.set_gid(None)
    if len(labels) < 2:
        return
    dpi = axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    box = axes.get_window_extent()
    wanted = [float(axes.transData.transform((0, label.xy[1]))[1]) for label in labels]
    found = spread(wanted, 11.5 * dpi / 72, box.y0, box.y1)
    for label, old, new in zip(labels, wanted, found, strict=True):
        label.set_position((5, (new - old) * 72 / dpi))


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, in the same order and as near as can be to those wanted; between low and high if
    there is room.

    Least squares: what touches moves as one, to the mean of where its members want to be.
    """
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    clusters: list[tuple[float, int]] = []  # where the first of it is, how many
    for place, number in enumerate(order):
        start, count = wanted[number] - place * gap, 1
        while clusters and clusters[-1][0] >= start:
            before, many = clusters.pop()
            start, count = (before * many + start * count) / (many + count), many + count
        clusters.append((start, count))
    starts = [start for start, count in clusters for _ in range(count)]
    room = max(low, high - (len(wanted) - 1) * gap)
    places = [0.0] * len(wanted)
    for place, (number, start) in enumerate(zip(order, starts, strict=True)):
        places[number] = min(max(start, low), room) + place * gap
    return places


# Axes -----------------------------------------------------------------------------------------------------------------


def by_round(axes: Axes, rounds: np.ndarray, label: bool = True) -> None:
    """Whole numbers below, from the first round to the last."""
    from matplotlib.ticker import MaxNLocator

    first, last = (int(rounds[0]), int(rounds[-1])) if len(rounds) else (0, 1)
    room = max(0.4, 0.012 * (last - first))
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    if label:
        axes.set_xlabel("round")


def marks(count: int) -> dict[str, Any]:
    """A line of few points shows them, and one point alone is seen at all."""
    return {"marker": "o", "markersize": 3.2} if count <= 20 else {}


def grid_of(panels: int, most: int = 3) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = min(panels, most)
    if panels == most + 1:
        columns = (panels + 1) // 2
    return -(-panels // columns), columns
