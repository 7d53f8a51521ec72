"""The tutorials: notebooks in docs/tutorials, which the site shows as pages.

    python docs/notebooks.py     runs all of them, each in an empty folder, and stores what they print

A cell is Python without any magic, so a notebook also runs as a script. The tests run the cells, and compare nothing
that depends on the machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tutorials"
NAMES = ("own-environment", "own-policy", "sweep", "deployment", "language-model")
"""The notebooks, in the order of the site."""


def read_notebook(name: str) -> dict[str, Any]:
    """Read a notebook."""
    notebook: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


def source_of(cell: dict[str, Any]) -> str:
    """Return the text of a cell."""
    return "".join(cell["source"])


def run_notebook(notebook: dict[str, Any], folder: Path) -> list[str]:
    """Run the code of a notebook in a folder, and return what each cell prints."""
    names: dict[str, Any] = {"__name__": "__notebook__"}
    printed = []
    with contextlib.chdir(folder), _importing_from(folder):
        for number, cell in enumerate(notebook["cells"]):
            if cell["cell_type"] == "code":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(source_of(cell), f"cell {number}", "exec"), names)
                printed.append(out.getvalue())
    return printed


@contextlib.contextmanager
def _importing_from(folder: Path) -> Any:
    """Import modules that cells write from the folder, and forget them afterwards."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]


def page_of(notebook: dict[str, Any]) -> str:
    """Write a notebook as Markdown: its texts, its code, and what that prints."""
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(source_of(cell).replace(".ipynb)", ".md)"))
            continue
        parts.append(f"```python\n{source_of(cell)}\n```")
        parts += [f"```text\n{''.join(output['text']).rstrip()}\n```" for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook; MkDocs calls this."""
    from mkdocs.structure.files import File

    for name in NAMES:
        files.append(File.generated(config, f"tutorials/{name}.md", content=page_of(read_notebook(name))))
    return files


def main() -> None:
    """Run all notebooks, and store what they print."""
    for name in NAMES:
        notebook = read_notebook(name)
        with tempfile.TemporaryDirectory() as folder:
            printed = iter(run_notebook(notebook, Path(folder)))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                text = next(printed)
                lines = text.splitlines(keepends=True)
                cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.ipynb").write_text(text, encoding="utf-8")
        print(f"{name}: {sum(cell['cell_type'] == 'code' for cell in notebook['cells'])} cells")


if __name__ == "__main__":
    main()
