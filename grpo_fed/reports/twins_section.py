"""Whether sharing pays for the clients, in a run's summary."""

from __future__ import annotations

import numpy as np

from grpo_fed.federation.twins import MARGIN
from grpo_fed.reports.formatting import format_return
from grpo_fed.reports.section import Section, Table
from grpo_fed.reports.tables import MAX_ROWS
from grpo_fed.runs.history import History, fill_forward
from grpo_fed.runs.metrics import TWIN_RETURN
from grpo_fed.runs.sharing_verdicts import SharingVerdict, verdicts_line

HEAD = ("client", "verdict", "since round", "sharing brings", "95 % at any time", "training", "twin's training")


def sharing_section(history: History) -> Section | None:
    """Make a row for each client that has a twin; None if there are none."""
    verdicts = latest_verdicts(history)
    if not verdicts:
        return None
    twins = fill_forward(history.client_series(TWIN_RETURN))[-1]
    column = {name: k for k, name in enumerate(history.clients)}
    order = sorted(verdicts, key=lambda name: verdicts[name].gain)[:MAX_ROWS]
    rows = [
        (
            name,
            each.verdict,
            f"{each.since}" if each.since else "",
            _percent(each.gain),
            f"{_percent(each.low)} to {_percent(each.high)}",
            format_return(history.returns[-1, column[name]]),
            format_return(twins[column[name]]),
        )
        for name, each in verdicts.items()
        if name in order
    ]
    line = verdicts_line(verdicts)
    few = f" Shown are the {MAX_ROWS} to which it brings least." if len(order) < len(verdicts) else ""
    text = (
        f"{line[:1].upper()}{line[1:]}, as their twins tell, which learn the same tasks alone. What sharing brings is"
        " the mean over the rounds of the difference of the two training returns, as a part of what the better one has"
        f" learned. It pays or costs where that is surely beyond {100 * MARGIN:.0f} %: at 95 %, in all rounds"
        f" together.{few}"
    )
    return Section("Does sharing pay?", (text,), tables=(Table(HEAD, tuple(rows), ("verdict",)),))


def latest_verdicts(history: History) -> dict[str, SharingVerdict]:
    """Read the latest verdict of each client from the rounds' lines."""
    verdicts: dict[str, SharingVerdict] = {}
    for line in history.lines:
        for name, metrics in line["clients"].items():
            if name in history.clients and (verdict := SharingVerdict.of(metrics)) is not None:
                verdicts[name] = verdict
    return {name: verdicts[name] for name in history.clients if name in verdicts}


def _percent(part: float) -> str:
    return "-" if np.isnan(part) else f"{100 * part:+.0f} %"
