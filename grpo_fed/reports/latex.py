"""Text as LaTeX, for captions, tables and the letters of figures."""

from __future__ import annotations

from collections.abc import Sequence

SIGNS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\ensuremath{<}",
    ">": r"\ensuremath{>}",
    "\N{MINUS SIGN}": r"\ensuremath{-}",
    "\u2264": r"\ensuremath{\leq}",
    "\u2265": r"\ensuremath{\geq}",
    "\u00d7": r"\ensuremath{\times}",
    "\u00b1": r"\ensuremath{\pm}",
    "\u03c1": r"\ensuremath{\rho}",
    "\u03b1": r"\ensuremath{\alpha}",
    "\u2026": r"\dots{}",
    "\u2013": "--",
}
"""Signs that LaTeX takes for commands or that its fonts may lack."""


def escape_latex(text: str) -> str:
    """Write a text so that LaTeX prints it as it is; backticks mark names, as in summaries."""
    parts = ["".join(SIGNS.get(sign, sign) for sign in part) for part in text.split("`")]
    if len(parts) % 2 == 0:  # an odd backtick marks nothing
        return "`".join(parts)
    return "".join(rf"\texttt{{{part}}}" if index % 2 else part for index, part in enumerate(parts))


def tabular(head: Sequence[str], rows: Sequence[Sequence[str]], columns: str) -> str:
    """Write a table with the rules of the package booktabs; cells are escaped. columns: such as `lrr`."""
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(head), r"\midrule"]
    return "\n".join([*lines, *map(_row, rows), r"\bottomrule", r"\end{tabular}"]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(escape_latex, cells))} \\"
