"""What a run's page says in words: the result first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_fed.runs.records import list_differences
from grpo_fed.runs.results import idle_clients

ROWS = 24
"""Clients in the table; of more, the worst."""
LONGEST = 8000
"""Letters that a tag may have."""


def page_while_running(begin: Mapping[str, Any], line: Mapping[str, Any] | None) -> str:
    """While it goes on."""
    rounds = begin["params"]["rounds"]
    if line is None:
        return f"**Has begun**: {_what(begin)}."
    score = line.get("eval/score_iqm")
    how = line.get("charts/episodic_return") if score is None else score
    known = "" if how is None else f", {'return in training' if score is None else 'return'} **{how:.1f}**"
    return f"**Round {line['round']} of {rounds}**{known}: {_what(begin)}."


def page_if_killed(begin: Mapping[str, Any], line: Mapping[str, Any] | None) -> str:
    """When it ended without a word."""
    after = 0 if line is None else line["round"]
    return f"**Killed after round {after} of {begin['params']['rounds']}**: {_what(begin)}."


def page_at_end(begin: Mapping[str, Any], document: Mapping[str, Any] | None, status: str) -> str:
    """When it has ended, in whatever way."""
    if document is None:
        return f"**{status.capitalize()}**: {_what(begin)}."
    scores = document["eval"]
    returns = [(name, one) for name, one in document["clients"].items() if one["return"] is not None]
    lines = []
    if status != "finished":
        why = f": {document['error']}" if document.get("error") else ""
        lines.append(
            f"**{status.capitalize()} after {document['rounds']} of {begin['params']['rounds']} rounds**{why}."
        )
    if scores["score_iqm"] is not None:
        before = [one["return_before"] for _, one in returns if one["return_before"] is not None]
        start = f"from {sum(before) / len(before):.1f} " if before else ""
        lines.append(
            f"**Return {scores['score_iqm']:.1f}** (interquartile mean of {len(returns)} clients; mean {start}to"
            f" {scores['score_mean']:.1f}, worst client {scores['score_min']:.1f})."
        )
    for name in (idle := idle_clients(document))[:ROWS]:
        number, kind, reason = document["missing"][name][-1]
        lines.append(f"**{name} learned nothing**: it had no answer, in round {number} {kind}: {reason}")
    if len(idle) > ROWS:
        lines.append(f"**{len(idle) - ROWS} clients more learned nothing.**")
    moved = (document.get("bytes_up", 0) + document.get("bytes_down", 0)) / 1e6
    sent = f", {moved:.1f} MB sent" if moved else ""
    lines.append(f"{_what(begin)}: {document['env_steps']:,} steps in {document['seconds']:.0f} s{sent}.")
    lines.append(_table(document["clients"]))
    if begin["description"]:
        lines.append(f"*{begin['description']}*")
    return "\n\n".join(lines)[:LONGEST]


def client_text(one: Mapping[str, Any]) -> str:
    """Of one client, when all is over."""
    if one["return"] is None:
        return f"{one['episodes']} episodes in training, none after it."
    kind = "In another cluster than most" if one.get("clusters") else "Personal groups"
    own = ", ".join(f"`{name}`" for name in _apart(one)) or "none"
    return f"**Return {one['return']:.1f}**, {_cell(one['return_before'])} before. {kind}: {own}."


def clients_table(document: Mapping[str, Any]) -> dict[str, Any]:
    """Every client of a federation of many, in the form that MLflow shows as a table."""
    columns = ["env", "return", "return_before", "return_best", "episodes", "env_steps"]
    rows = [
        [name, *(one.get(column) for column in columns), ", ".join(_apart(one))]
        for name, one in document["clients"].items()
    ]
    kind = "clusters" if any(one.get("clusters") for one in document["clients"].values()) else "personal_groups"
    return {"columns": ["client", *columns, kind], "data": rows}


def _what(begin: Mapping[str, Any]) -> str:
    params = begin["params"]
    count = len(begin["clients"])
    return f"{begin['scenario']}, {params['method']}, {count} client{'s' * (count != 1)}, seed {params['seed']}"


def _table(clients: Mapping[str, Any]) -> str:
    """Markdown."""
    worst = sorted(clients.items(), key=lambda item: -1e300 if item[1]["return"] is None else item[1]["return"])
    chosen = list(clients.items()) if len(clients) <= ROWS else worst[:ROWS]
    kind = "clusters" if any(one.get("clusters") for one in clients.values()) else "personal groups"
    head = f"| client | before | after | {kind} |\n| --- | ---: | ---: | --- |"
    rows = [
        f"| {name} | {_cell(one['return_before'])} | {_cell(one['return'])} | {', '.join(_apart(one)) or '-'} |"
        for name, one in chosen
    ]
    more = [] if len(chosen) == len(clients) else [f"\nThe {ROWS} worst of {len(clients)}; all are in `clients.json`."]
    return "\n".join([head, *rows, *more])


def _apart(one: Mapping[str, Any]) -> list[str]:
    return list_differences(one.get("personal_groups", ()), one.get("clusters", {}))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
