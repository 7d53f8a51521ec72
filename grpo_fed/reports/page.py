"""A run as one page that needs nothing else: no network, no script; light or dark as the reader has it, and printable.

What it says is the summary's, so that page and file agree; figures are SVG in the page's own colours.
"""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image

from grpo_fed.reports.charts import AT_NIGHT, inline
from grpo_fed.reports.episodes import EPISODES
from grpo_fed.reports.figures import drawings
from grpo_fed.reports.summary import Section, Table, headline, sections, setting
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.history import History, read_history

PAGE = "report.html"
FIRST = ("learning", "groups")
"""Figures before any table: how they learned and what they share."""


def write_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run folder, to `report.html` in it or to `out`; ValueError if it is none."""
    folder = Path(folder)
    path = folder / PAGE if out is None else Path(out)
    write_atomic(path, page(read_history(folder)))
    return path


def page(history: History) -> str:
    """The whole page."""
    name, result = html.escape(history.scenario.name), headline(history)
    parts = [f"<header><h1>{name}</h1>", f'<p class="result">{_text(result[:1].upper() + result[1:])}</p>']
    parts += [f"<p>{_text(setting(history))}</p></header>", "<main>"]
    figures = {one.name: f'<figure id="{one.name}">{inline(one)}</figure>' for one in drawings(history)}
    parts += [figures.pop(name, "") for name in FIRST]
    parts += [_episodes(history.folder)]
    parts += [_section(section) for section in sections(history)]
    parts += figures.values()
    scenario = html.escape(history.scenario.dumps())
    parts += [f"<details><summary>The scenario, with every value</summary><pre>{scenario}</pre></details>", "</main>"]
    body = "\n".join(part for part in parts if part)
    return _FRAME.format(title=name, style=_style(), body=body)


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}: a run of grpo_fed</title>
<style>
{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _style() -> str:
    day = " ".join(f"--{name}: {light};" for light, (name, _) in AT_NIGHT.items())
    night = " ".join(f"--{name}: {dark};" for name, dark in AT_NIGHT.values())
    return f""":root {{ {day} color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ @media screen {{ :root {{ {night} }} }} }}
{_RULES}"""


_RULES = """* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 54rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", Verdana, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.75rem; } h2 { margin: 2.25rem 0 .5rem; font-size: 1.2rem; }
p { margin: .5rem 0; } .result { font-size: 1.1rem; font-weight: 600; }
figure { margin: 1.5rem 0; } figure svg { display: block; width: 100%; height: auto; }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid var(--grid); border-radius: 6px; font-size: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .75rem 0; min-width: 50%; }
caption { text-align: left; color: var(--muted); }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 600; } th[scope=row] { color: var(--ink); }
.words { text-align: left; } td.words { min-width: 8rem; }
.films { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.films figure { margin: 0; } .films img { width: 100%; border: 1px solid var(--grid); border-radius: 4px; }
figcaption { color: var(--muted); font-size: .88rem; }
summary { cursor: pointer; margin-top: 2rem; }
/* on a telephone a figure would shrink until nobody could read it: it keeps its size, and moves under the finger */
@media screen and (max-width: 640px) { figure { overflow-x: auto; } figure svg { min-width: 620px; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } figure, tr, .films { break-inside: avoid; }
  h2 { break-after: avoid; } details { display: none; } .wide { overflow: visible; } }"""


# Its parts ------------------------------------------------------------------------------------------------------------


def _episodes(folder: Path) -> str:
    """The GIFs that are there; who wants nothing to move sees the first picture."""
    found = sorted((folder / EPISODES).glob("*.gif"), key=lambda path: path.stem.replace("-before", "-0"))
    if not found:
        return ""
    films = []
    for path in found:
        client, _, when = path.stem.rpartition("-")
        words = {"before": "before it learned", "after": "after it learned"}.get(when, when)
        alt = html.escape(f"An episode of {client} {words}, its step and return below", quote=True)
        still = _data("png", _first(path))
        films.append(
            f'<figure><picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
            f'<img src="{_data("gif", path.read_bytes())}" alt="{alt}"></picture>'
            f"<figcaption>{html.escape(client)}, {words}</figcaption></figure>"
        )
    return f'<section><h2>Episodes</h2><div class="films">{"".join(films)}</div></section>'


def _first(path: Path) -> bytes:
    file = io.BytesIO()
    with Image.open(path) as film:
        film.save(file, "png")
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>", *(f"<p>{_text(text)}</p>" for text in section.text)]
    if section.points:
        parts.append(f"<ul>{''.join(f'<li>{_text(point)}</li>' for point in section.points)}</ul>")
    parts += [_table(table) for table in section.tables]
    return f"<section>{''.join(parts)}</section>"


def _table(table: Table) -> str:
    words = [place == 0 or name in table.words for place, name in enumerate(table.head)]
    kinds = [' class="words"' if word else "" for word in words]
    head = "".join(f'<th scope="col"{kind}>{_text(cell)}</th>' for kind, cell in zip(kinds, table.head, strict=True))
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds[1:], rest, strict=True))
        rows.append(f'<tr><th scope="row" class="words">{_text(first)}</th>{cells}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _text(text: str) -> str:
    """Escaped, with names as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
