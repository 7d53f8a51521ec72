"""The tutorials: every notebook runs as it stands, and prints what its text says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def load_notebooks() -> ModuleType:
    """Import docs/notebooks.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NOTEBOOKS = load_notebooks()
ENDS: dict[str, str] = {
    "own-environment": r"\[ True\]\n",
    "own-policy": r"\{'body': 'row'\}\n\(1, 211\)\n",
    "sweep": r"True\n",
    "deployment": r"[\d,]+ bytes from the clients, [\d,]+ to them\n",
    "language-model": r"\[True\]\n",
}
"""What the last cell of each notebook prints."""


def stored_outputs(notebook: dict[str, Any]) -> list[str]:
    """Return what the code cells printed when the notebook was stored."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(text for output in cell["outputs"] for text in output["text"]) for cell in cells]


def without_numbers(printed: str) -> str:
    """Replace numbers, which depend on how a processor rounds."""
    return re.sub(r"-?\d[\d.,]*", "#", printed)


def test_every_tutorial_is_listed_and_on_the_site():
    assert sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.ipynb")) == sorted(NOTEBOOKS.NAMES)
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"tutorials/([\w-]+)\.md", site) == [*NOTEBOOKS.NAMES]


@pytest.mark.parametrize("name", ENDS)
def test_a_tutorial_prints_what_is_stored_in_it(name: str, tmp_path: Path):
    notebook = NOTEBOOKS.read_notebook(name)
    printed = NOTEBOOKS.run_notebook(notebook, tmp_path)
    assert re.fullmatch(ENDS[name], printed[-1])
    kept = [without_numbers(text) for text in stored_outputs(notebook)]
    # which learning rate is better after two rounds may depend on rounding
    pairs = re.findall(r"return (-[\d.]+) before, (-[\d.]+) after", "".join(printed))
    assert all(float(after) > float(before) for before, after in pairs)  # of an environment of one's own
    assert len(pairs) == (3 if name == "own-environment" else 0)
    assert [sorted(text.split("\n")) for text in map(without_numbers, printed)] == [
        sorted(text.split("\n")) for text in kept
    ]


@pytest.mark.parametrize("name", ENDS)
def test_a_page_of_the_site_has_the_code_and_its_output(name: str):
    notebook = NOTEBOOKS.read_notebook(name)
    page = NOTEBOOKS.page_of(notebook)
    assert page.startswith("# ")
    assert page.count("```python") == sum(cell["cell_type"] == "code" for cell in notebook["cells"])
    assert page.count("```text") == sum(bool(text) for text in stored_outputs(notebook))
    assert ".ipynb" not in page
