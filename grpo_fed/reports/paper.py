"""Figures for a paper: PDF and PGF as wide as its columns, in its letters, with captions in a file of their own.

A PGF file is LaTeX itself: its letters are set by the paper, in the paper's fonts. matplotlib asks LaTeX how wide each
text is when it writes such a file; here its own fonts answer, so that no LaTeX has to be installed.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, no_type_check

from grpo_fed.reports.charts import FIGURE_WIDTH, Drawing
from grpo_fed.reports.figures.write import draw_all
from grpo_fed.reports.latex import escape_latex
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.folder import PAPER
from grpo_fed.runs.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = "figures.tex"
"""The file with a figure environment for each figure, with its caption."""
FONT = "STIXGeneral"
"""The letters of a PDF, like Times: matplotlib's only serif font with all signs. A PGF has the letters of the paper."""


@dataclass(frozen=True)
class PaperStyle:
    """What a paper asks of its figures."""

    width: float
    """Inches of a column, or of the text."""
    points: float
    """Size of letters."""
    environment: str = "figure"
    """`figure*` goes over both columns."""


PAPERS = {
    "article": PaperStyle(4.77, 9),
    "neurips": PaperStyle(5.5, 9),
    "iclr": PaperStyle(5.5, 9),
    "icml": PaperStyle(3.25, 8),
    "icml-wide": PaperStyle(6.75, 8, "figure*"),
    "ieee": PaperStyle(3.49, 8),
    "ieee-wide": PaperStyle(7.16, 8, "figure*"),
    "acm": PaperStyle(3.33, 8),
    "acm-wide": PaperStyle(7.0, 8, "figure*"),
    "jmlr": PaperStyle(6.0, 9),
}
"""Widths of columns and of the text, in inches, and letters a little smaller than the text's."""


def find_paper(name: str) -> PaperStyle:
    """Find a paper by its name; ValueError lists the names."""
    if name not in PAPERS:
        raise ValueError(f"--paper {name}: must be one of {' '.join(PAPERS)}")
    return PAPERS[name]


def write_paper(history: History, paper: PaperStyle) -> list[Path]:
    """Write `paper/*.pdf` and `.pgf` of a run, and `figures.tex` with their captions, in place of earlier ones."""
    folder = history.folder / PAPER
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.suffix in (".pdf", ".pgf", ".png", ".tex"):
            old.unlink()
    return write_paper_figures(folder, draw_all(history), paper)


def write_paper_figures(folder: Path, drawings: Iterable[Drawing], paper: PaperStyle) -> list[Path]:
    """Write a PDF and a PGF of each drawing, without title and caption, and the file of captions."""
    paths, environments = [], []
    for drawing in drawings:
        width = paper.width
        height = drawing.height * (width / FIGURE_WIDTH) ** 0.5  # narrow figures are not as flat as small ones would be
        with drawing.laid_out(headed=False, width=width, height=height, **_style(paper)) as figure:
            write_atomic(folder / f"{drawing.name}.pdf", _to_pdf(figure))
            write_pgf(folder / f"{drawing.name}.pgf", figure)
        paths += [folder / f"{drawing.name}.pdf", folder / f"{drawing.name}.pgf"]
        environments.append(_environment(drawing, paper))
    write_atomic(folder / CAPTIONS, "\n".join(environments))
    return [*paths, folder / CAPTIONS]


def _style(paper: PaperStyle) -> dict[str, Any]:
    """Make the changes to matplotlib's settings: letters of one size, thinner lines, fonts that a printer has."""
    return {
        "font.family": "serif",
        "font.serif": [FONT],
        "font.size": paper.points,
        "axes.labelsize": paper.points,
        "axes.titlesize": paper.points,
        "xtick.labelsize": 0.9 * paper.points,
        "ytick.labelsize": 0.9 * paper.points,
        "figure.facecolor": "none",
        "lines.linewidth": 1.2,
        "pdf.fonttype": 42,
        "pgf.rcfonts": False,
        "pgf.texsystem": "pdflatex",
    }


def _environment(drawing: Drawing, paper: PaperStyle) -> str:
    """Write the LaTeX that shows a figure with its caption."""
    caption = rf"\textbf{{{escape_latex(drawing.title)}.}} {escape_latex(drawing.caption)}"
    return "\n".join(
        [
            rf"\begin{{{paper.environment}}}",
            r"  \centering",
            rf"  \includegraphics{{{drawing.name}.pdf}}% or \input{{{drawing.name}.pgf}}, with the package pgf",
            rf"  \caption{{{caption}}}",
            rf"  \label{{fig:{drawing.name}}}",
            rf"\end{{{paper.environment}}}",
            "",
        ]
    )


def _to_pdf(figure: Figure) -> bytes:
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    file = io.BytesIO()
    canvas: Any = FigureCanvasPdf(figure)
    canvas.print_pdf(file, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return file.getvalue()


@no_type_check  # these parts of matplotlib have no types
def write_pgf(path: Path, figure: Figure) -> None:
    """Write a figure as a `pgfpicture`; its maps are pictures beside the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
    from matplotlib.backends.backend_mixed import MixedModeRenderer
    from matplotlib.backends.backend_pgf import RendererPgf

    width, height = figure.get_size_inches()
    FigureCanvasAgg(figure)
    measure = RendererAgg(width * figure.dpi, height * figure.dpi, figure.dpi)

    class Renderer(RendererPgf):
        """Measures texts by matplotlib's fonts, and writes names with signs that LaTeX would take for commands."""

        def get_text_width_height_descent(self, s: str, prop: Any, ismath: Any) -> tuple[float, float, float]:
            size: tuple[float, float, float] = measure.get_text_width_height_descent(s, prop, ismath)
            return size

        def draw_text(
            self, gc: Any, x: float, y: float, s: str, prop: Any, angle: float, *rest: Any, **more: Any
        ) -> None:
            super().draw_text(gc, x, y, escape_latex(s), prop, angle, *rest, **more)

        def draw_image(self, gc: Any, x: float, y: float, im: Any, transform: Any = None) -> None:
            from matplotlib.backends import backend_pgf

            command = backend_pgf._get_image_inclusion_command
            backend_pgf._get_image_inclusion_command = lambda: r"\includegraphics"  # it would ask LaTeX
            try:
                super().draw_image(gc, x, y, im, transform)
            finally:
                backend_pgf._get_image_inclusion_command = command

    with path.open("w", encoding="utf-8") as file:
        print("% needs \\usepackage{pgf}; with \\usepackage{import} it may lie in another folder", file=file)
        for line in (r"\begingroup", r"\makeatletter", r"\begin{pgfpicture}"):
            print(f"{line}%", file=file)
        corner = rf"\pgfqpoint{{{width:f}in}}{{{height:f}in}}"
        print(rf"\pgfpathrectangle{{\pgfpointorigin}}{{{corner}}}%", file=file)
        # nothing is clipped: the paper's letters may be wider than those that were measured
        print(r"\pgfusepath{use as bounding box}%", file=file)
        renderer: Any = MixedModeRenderer(figure, width, height, figure.dpi, Renderer(figure, file))
        figure.draw(renderer)
        for line in (r"\end{pgfpicture}", r"\makeatother", r"\endgroup"):
            print(f"{line}%", file=file)
