"""Renders the formulas of the site as MathML, which browsers show without a script and without a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""A formula as pymdownx.arithmatex marks it: in a line, or as a paragraph of its own."""


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Render the formulas of a page; MkDocs calls this."""
    return render_formulas(content)


def render_formulas(content: str) -> str:
    """Replace each marked formula by MathML; ValueError names one that has a command without a meaning."""
    return FORMULA.sub(lambda match: to_mathml(html.unescape(match[2]), is_block=match[1] == "div"), content)


def to_mathml(formula: str, is_block: bool) -> str:
    """Write a formula in TeX as MathML; ValueError for one with a command that is not known."""
    try:
        written = convert(
            formula.strip().replace(r"\arg", r"\mathrm{arg}\,"), display="block" if is_block else "inline"
        )
    except Exception as error:
        raise ValueError(f"{formula.strip()}: cannot be written as MathML: {error!r}") from error
    written = written.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')  # norms, as high as a line
    if unknown := re.findall(r"\\[A-Za-z]+", html.unescape(written)):
        raise ValueError(f"{formula.strip()}: MathML has no {', '.join(unknown)}")
    return written
