"""All knobs of a scenario as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from grpo_fed.scenario.knobs import list_knobs
from grpo_fed.scenario.toml.text import closest_match, did_you_mean


def knob_tables(section: str | None = None) -> Iterator[RenderableType]:
    """A table for each section, or for one; ValueError if there is none of that name."""
    knobs = list_knobs()
    names = list(dict.fromkeys(knob.section for knob in knobs))
    wanted = names if section is None else [name for name in names if name and name == section.strip("[]")]
    if not wanted:
        known = [name for name in names if name]
        cure = did_you_mean(closest_match(str(section), known)) or f"; there are {', '.join(known)}"
        raise ValueError(f"config {section}: there is no such section{cure}")
    for name in wanted:
        yield Text(f"[{name}]" if name else "at the top of the file", style="bold cyan")
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
        table.add_column("key", style="bold", no_wrap=True)
        table.add_column("default", style="green", overflow="fold", max_width=24)
        table.add_column("meaning", overflow="fold")
        for knob in (knob for knob in knobs if knob.section == name):
            kind = f"{knob.type}, {knob.limits}" if knob.limits else knob.type
            table.add_row(Text(knob.key), Text(knob.default), Text.assemble(knob.doc, (f" ({kind})", "dim")))
        yield table
