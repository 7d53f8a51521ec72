"""A run on one page, `report.html`, that needs no network and no script, follows light or dark mode, and prints well.

It has the sections of the summary, so that page and `summary.md` agree; figures are SVG in the page's own colours.
"""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image

from grpo_fed.reports.charts import DARK_COLOURS, Drawing, inline_svg
from grpo_fed.reports.episodes import EPISODES, client_levels
from grpo_fed.reports.figures.write import draw_all
from grpo_fed.reports.section import Section, Table
from grpo_fed.reports.sections import make_sections
from grpo_fed.reports.summary import describe_run, headline
from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.history import History, read_history
from grpo_fed.runs.played_levels import describe_level

PAGE = "report.html"
"""The page's name in a run's folder."""


def write_page(run: str | Path | History, out: str | Path | None = None) -> Path:
    """Write the page of a run, to `report.html` in its folder or to `out`; ValueError if the folder holds no run."""
    history = run if isinstance(run, History) else read_history(run)
    path = history.folder / PAGE if out is None else Path(out)
    write_atomic(path, page_html(history))
    return path


def page_html(history: History) -> str:
    """Write the whole page as HTML."""
    name, result = html.escape(history.scenario.name), headline(history)
    parts = [f"<header><h1>{name}</h1>", f'<p class="result">{_text(result[:1].upper() + result[1:])}</p>']
    parts += [f"<p>{_text(describe_run(history))}</p></header>", "<main>"]
    figures = {drawing.name: _figure(drawing) for drawing in draw_all(history)}
    sections = [_section(section, figures) for section in make_sections(history)]
    sections.insert(1, _episodes(history))
    parts += [*sections, *figures.values()]
    scenario = html.escape(history.scenario.dumps())
    parts += [f"<details><summary>The scenario with all values</summary><pre>{scenario}</pre></details>", "</main>"]
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
    """Write the style sheet: colours for light and for dark mode, then the rules."""
    light = " ".join(f"--{name}: {colour};" for colour, (name, _) in DARK_COLOURS.items())
    dark = " ".join(f"--{name}: {colour};" for name, colour in DARK_COLOURS.values())
    return f""":root {{ {light} color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ @media screen {{ :root {{ {dark} }} }} }}
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
.text { text-align: left; } td.text { min-width: 8rem; }
.films { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.films figure { margin: 0; } .films img { width: 100%; border: 1px solid var(--grid); border-radius: 4px; }
figcaption { color: var(--muted); font-size: .88rem; }
summary { cursor: pointer; margin-top: 2rem; }
/* on a telephone a figure would become too small to read: it keeps its size and scrolls */
@media screen and (max-width: 640px) { figure { overflow-x: auto; } figure svg { min-width: 620px; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } figure, tr, .films { break-inside: avoid; }
  h2 { break-after: avoid; } details { display: none; } .wide { overflow: visible; } }"""


# Parts of the body ----------------------------------------------------------------------------------------------------


def _episodes(history: History) -> str:
    """Show the GIFs that are in the folder; readers who prefer reduced motion see the first picture."""
    paths = sorted((history.folder / EPISODES).glob("*.gif"), key=lambda path: path.stem.replace("-before", "-0"))
    if not paths:
        return ""
    films = []
    for path in paths:
        client, _, when = path.stem.rpartition("-")
        caption = {"before": "before training", "after": "after training"}.get(when, when)
        levels = client_levels(history, client) if client in history.clients else None
        if levels is not None:
            caption += f", at {describe_level(levels.middle)}: the middle of {levels}"
        alt = html.escape(f"An episode of {client} {caption}, with its step and return below", quote=True)
        still = _data_url("png", _first_picture(path))
        films.append(
            f'<figure><picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
            f'<img src="{_data_url("gif", path.read_bytes())}" alt="{alt}"></picture>'
            f"<figcaption>{html.escape(client)}, {caption}</figcaption></figure>"
        )
    return f'<section><h2>Episodes</h2><div class="films">{"".join(films)}</div></section>'


def _first_picture(path: Path) -> bytes:
    file = io.BytesIO()
    with Image.open(path) as film:
        film.save(file, "png")
    return file.getvalue()


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _figure(drawing: Drawing) -> str:
    """Put a picture beside its title and caption, which are text of the page."""
    caption = f"<figcaption><strong>{_text(drawing.title)}.</strong> {_text(drawing.caption)}</figcaption>"
    return f'<figure id="{drawing.name}">{inline_svg(drawing)}{caption}</figure>'


def _section(section: Section, figures: dict[str, str]) -> str:
    """Write a section; its figures are taken out of those that are left."""
    parts = [f"<h2>{_text(section.title)}</h2>", *(f"<p>{_text(text)}</p>" for text in section.paragraphs)]
    parts += [figures.pop(name) for name in section.figures if name in figures]
    if section.points:
        parts.append(f"<ul>{''.join(f'<li>{_text(point)}</li>' for point in section.points)}</ul>")
    parts += [_table(table) for table in section.tables]
    return f"<section>{''.join(parts)}</section>"


def _table(table: Table) -> str:
    is_text = [index == 0 or name in table.text_columns for index, name in enumerate(table.head)]
    classes = [' class="text"' if text else "" for text in is_text]
    head = "".join(f'<th scope="col"{kind}>{_text(cell)}</th>' for kind, cell in zip(classes, table.head, strict=True))
    rows = []
    for first, *rest in table.rows:
        columns = zip(classes[1:], table.head[1:], rest, strict=True)
        cells = "".join(
            f"<td{kind}>{_literal(cell) if name in table.literal_columns else _text(cell)}</td>"
            for kind, name, cell in columns
        )
        rows.append(f'<tr><th scope="row" class="text">{_text(first)}</th>{cells}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _literal(text: str) -> str:
    """Escape a text that somebody or a model wrote, backticks and all."""
    return f"<code>{html.escape(text)}</code>"


def _text(text: str) -> str:
    """Escape a text, and mark the names in backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
