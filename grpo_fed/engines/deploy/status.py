"""What `grpo-fed deploy status` shows: the nodes of a deployment, their clients, and its runs."""

from __future__ import annotations

import json
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.exchange.exchange import SILENT_SECONDS
from grpo_fed.engines.flower.flwr_command import FlwrCommand, check_connection, find_flower_home
from grpo_fed.engines.flower.superlink import make_flower_environment
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


def describe_deployment(connection: str, registered: Mapping[str, str]) -> list[str]:
    """List the nodes and the runs of a deployment, line by line.

    connection: its name in Flower's configuration. registered: by node, the client for which its key was made.
    ValueError if there is no such connection, RuntimeError if its server does not answer.
    """
    check_connection(connection)
    config = tomllib.loads((find_flower_home() / "config.toml").read_text(encoding="utf-8"))["superlink"][connection]
    authority = Path(config["root-certificates"]) if "root-certificates" in config else None
    with tempfile.TemporaryDirectory() as folder:
        flwr = FlwrCommand(connection, make_flower_environment(), Path(folder))
        nodes, runs = flwr.list_nodes(), flwr.list_runs()
    rows = make_rows(nodes, _ask_exchange(config["address"], authority), registered)
    return [f"{connection} at {config['address']}", "", *_format_nodes(rows), "", *_format_runs(runs)]


def make_rows(
    nodes: Sequence[Mapping[str, Any]], at_exchange: Sequence[Mapping[str, Any]], registered: Mapping[str, str]
) -> list[NodeRow]:
    """Join what Flower, the exchange and the keys say of each node.

    nodes: Flower's, as `flwr supernode list` has them. at_exchange: those that were there, as `NodeStatus` has them.
    """
    here = {str(entry["node"]): entry for entry in at_exchange}
    rows = []
    for node in nodes:
        number, state = str(node["node-id"]), str(node["status"])
        entry = here.get(number)
        client = registered.get(number) or (str(entry["client"]) if entry else "") or "?"
        if entry is not None:
            seconds, working = float(entry["silent_seconds"]), int(entry["working"])
            is_here = seconds < SILENT_SECONDS
            state = "resident" if is_here else "missed"
            rows.append(NodeRow(client, number, state, f"{seconds:.0f} s ago", f"{working}" if working else ""))
        else:
            when = str(node["online-at"] if state == "online" else node["offline-at"]) or "never"
            rows.append(NodeRow(client, number, state, when, ""))
    return sorted(rows, key=lambda row: (row.client, row.node))


def _ask_exchange(address: str, authority: Path | None) -> list[dict[str, Any]]:
    """Return what the server's exchange knows of its nodes; nothing if it has none."""
    try:
        answer = send_request(address, authority, protocol.STATUS, protocol.encode({}))
    except (NoConnectionError, RefusedError):
        return []
    nodes: list[dict[str, Any]] = protocol.decode(answer)[0]["nodes"]
    return nodes


def _format_nodes(rows: Sequence[NodeRow]) -> list[str]:
    if not rows:
        return ["no node is registered: start one with `grpo-fed deploy client`"]
    table = [("client", "state", "last sign of life", "works on", "node")]
    table += [(row.client, row.state, row.sign_of_life, row.work, row.node) for row in rows]
    return _align(table)


def _format_runs(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not runs:
        return ["no run yet: `grpo-fed run SCENARIO --engine flower --superlink NAME`"]
    latest = sorted(runs, key=lambda run: str(run.get("created-at", "")))[-MOST_RUNS:]
    table = [("run", "status", "since")]
    table += [(str(run["run-id"]), str(run["status"]), str(run.get("created-at", ""))) for run in latest]
    return _align(table)


def _align(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def read_registered(path: Path) -> dict[str, str]:
    """Read by node for which client each key was made; empty without a file."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {str(entry["node"]): client for client, entry in entries.items()}
