"""What `grpo-fed deploy status` shows: the nodes of a deployment, their clients, and its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.exchange.exchange import SILENT_SECONDS
from grpo_fed.engines.flower.connections import SuperLinkAddress, read_connection
from grpo_fed.engines.flower.control import ListedNode, ListedRun, SuperLinkControl
from grpo_fed.engines.wire.flower_private import NoConnectionError, RefusedError, send_request

MOST_RUNS = 10
"""How many runs are shown, the latest."""


@dataclass(frozen=True)
class NodeRow:
    """A node, as it is shown."""

    client: str
    node: str
    state: str
    sign_of_life: str
    work: str
    device: str
    version: str


def describe_deployment(connection: str, registered: Mapping[str, str]) -> list[str]:
    """List the nodes and the runs of a deployment, line by line.

    connection: its name in Flower's configuration. registered: by node, the client for which its key was made.
    ValueError if there is no such connection, RuntimeError if its server does not answer.
    """
    link = read_connection(connection)
    with SuperLinkControl(link) as control:
        nodes, runs = control.list_nodes(), control.list_runs()
    rows = make_rows(nodes, _ask_exchange(link), registered)
    return [f"{connection} at {link.address}", "", *_format_nodes(rows), "", *_format_runs(runs)]


def make_rows(
    nodes: Sequence[ListedNode], at_exchange: Sequence[Mapping[str, Any]], registered: Mapping[str, str]
) -> list[NodeRow]:
    """Join what Flower, the exchange and the keys say of each node.

    nodes: Flower's. at_exchange: those that were there, as `NodeStatus` has them.
    """
    here = {str(entry["node"]): entry for entry in at_exchange}
    rows = []
    for node in nodes:
        number, state = str(node.node), node.status
        entry = here.get(number)
        client = registered.get(number) or (str(entry["client"]) if entry else "") or "?"
        if entry is not None:
            seconds, working = float(entry["silent_seconds"]), int(entry["working"])
            is_here = seconds < SILENT_SECONDS
            state = "resident" if is_here else "missed"
            words = f"{seconds:.0f} s ago", f"{working}" if working else "", str(entry["device"]), str(entry["version"])
            rows.append(NodeRow(client, number, state, *words))
        else:
            rows.append(NodeRow(client, number, state, node.since or "never", "", "", ""))
    return sorted(rows, key=lambda row: (row.client, row.node))


def _ask_exchange(link: SuperLinkAddress) -> list[dict[str, Any]]:
    """Return what the server's exchange knows of its nodes; nothing if it has none."""
    try:
        answer = send_request(link.address, link.authority, protocol.STATUS, protocol.encode({}))
    except (NoConnectionError, RefusedError):
        return []
    nodes: list[dict[str, Any]] = protocol.decode(answer)[0]["nodes"]
    return nodes


def _format_nodes(rows: Sequence[NodeRow]) -> list[str]:
    if not rows:
        return ["no node is registered: start one with `grpo-fed deploy client`"]
    table = [("client", "state", "last sign of life", "works on", "device", "grpo_fed", "node")]
    table += [(row.client, row.state, row.sign_of_life, row.work, row.device, row.version, row.node) for row in rows]
    return _align(table)


def _format_runs(runs: Sequence[ListedRun]) -> list[str]:
    if not runs:
        return ["no run yet: `grpo-fed run SCENARIO --engine flower --superlink NAME`"]
    table = [("run", "status", "since")]
    table += [(str(run.run), str(run.status), run.since) for run in reversed(runs[:MOST_RUNS])]
    return _align(table)


def _align(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def read_registered(path: Path) -> dict[str, str]:
    """Read by node for which client each key was made; empty without a file."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {str(entry["node"]): client for client, entry in entries.items()}
