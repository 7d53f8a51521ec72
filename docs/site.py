"""Turns README and docs/ into the pages of the site, and adds the reference of the code; `make docs` calls it.

MkDocs reads this file as a hook (mkdocs.yml). The pages are those that a reader of the repository sees. Links between
them become links of the site; a link to code leads to its entry in the reference; one to another file loses its target.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ORIGINS = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "results.md": "benchmarks/RESULTS.md",
}
"""Pages of the site that are not in docs/, and their files."""
ROOMS = ("scenario", "tasks", "policy", "rl", "aggregation", "runs", "federation", "flower", "adapters", "callbacks")
ROOMS += ("engines", "reports")
"""The packages of the reference; the command line has its own help."""
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\(([^()\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/, and a page of the reference for each package."""
    for page, origin in ORIGINS.items():
        files.append(File.generated(config, page, content=(ROOT / origin).read_text(encoding="utf-8")))
    names = "\n".join(f"- [`grpo_fed.{room}`]({room}.md)" for room in ROOMS)
    about = "# Reference\n\nThe packages of grpo_fed, each with all of its public functions and classes."
    files.append(File.generated(config, "reference/index.md", content=f"{about}\n\n{names}\n"))
    for room in ROOMS:
        text = f"# grpo_fed.{room}\n\n::: grpo_fed.{room}\n"
        files.append(File.generated(config, f"reference/{room}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    path = page.file.src_uri
    if path.startswith("reference/"):
        return markdown
    origin = PurePosixPath(ORIGINS.get(path, f"docs/{path}"))
    return LINK.sub(lambda match: _link(match[1], match[2], PurePosixPath(path), origin), markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page with a link to code that the reference does not have."""
    if broken := re.findall(r"\]\[(grpo_fed\.[\w.]+)\]", output):
        raise PluginError(f"{page.file.src_uri}: the reference has no {', '.join(broken)}")
    return output


def _link(text: str, target: str, page: PurePosixPath, origin: PurePosixPath) -> str:
    """Write a link of the site for one of the repository. page, origin: where it stands there and here."""
    if target.startswith(("https://", "http://", "#")):
        return f"[{text}]({target})"
    name, _, anchor = target.partition("#")
    file = os.path.normpath(origin.parent / name)
    pages = {origin: site for site, origin in ORIGINS.items()}
    if file in pages or file.startswith("docs/"):
        inside = pages.get(file, file.removeprefix("docs/").replace(".ipynb", ".md"))
        there = os.path.relpath(inside, page.parent)
        return f"[{text}]({there}{'#' if anchor else ''}{anchor})"
    symbol = text.strip("`")
    if file.startswith("grpo_fed/") and file.endswith(".py") and re.fullmatch(r"`[\w.]+`", text):
        if symbol.rpartition(".")[2].startswith("_"):  # the reference has public names alone
            return text
        module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        return f"[{text}][{module}.{symbol.removeprefix(module.rpartition('.')[2] + '.')}]"
    return text
