"""The formulas of the documentation are rendered on its site, without a script."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\w$\\])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])", re.DOTALL)


def load_formulas() -> ModuleType:
    """Import docs/formulas.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("formulas", ROOT / "docs" / "formulas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FORMULAS = load_formulas()


def formulas_of_pages() -> Iterator[tuple[str, bool]]:
    """Yield the formulas of all pages, and whether they stand by themselves."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for match in FORMULA.finditer(text):
            yield match[1] or match[2], match[1] is not None


def test_every_formula_of_the_pages_can_be_rendered():
    formulas = list(formulas_of_pages())
    assert len(formulas) > 100
    for formula, is_block in formulas:
        assert FORMULAS.to_mathml(formula, is_block).startswith("<math ")


def test_a_fraction_is_written_as_mathml():
    written = FORMULAS.to_mathml(r"\frac{\mu}{2}", is_block=False)
    assert re.search(r"<mfrac><mrow><mi>(μ|&#x003BC;)</mi></mrow><mrow><mn>2</mn></mrow></mfrac>", written)


def test_marked_formulas_are_replaced_and_nothing_else():
    page = '<p>if <span class="arithmatex">\\(a &lt; b\\)</span> then</p><div class="arithmatex">\\[\nx\n\\]</div>'
    rendered = FORMULAS.render_formulas(page)
    assert rendered.startswith("<p>if <math ")
    assert "<mo>&#x0003C;</mo>" in rendered
    assert 'display="block"' in rendered
    assert "arithmatex" not in rendered


def test_a_command_without_a_meaning_is_an_error():
    with pytest.raises(ValueError, match=re.escape(r"\nonsense{x}: MathML has no \nonsense")):
        FORMULAS.to_mathml(r"\nonsense{x}", is_block=False)
