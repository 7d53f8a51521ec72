"""What a SuperLink costs with many nodes that do nothing, and what a network's latency adds.

A real SuperLink with TLS and keys, a server's app that sends 100 KB to every node and waits for 100 KB from each, and
nodes in one other process, a thread each, with the links of the resident node, which give back what they get. Between
nodes and SuperLink is a proxy that delays every byte by the latency, in each direction.

    python -m benchmarks.deployment_nodes

Every run appends a JSON line to benchmarks/results/deployment_nodes.jsonl and is not repeated.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.deployment import PACKAGES
from benchmarks.learning import describe_machine
from benchmarks.network import Proxy

FILE = Path(__file__).parent / "results" / "deployment_nodes.jsonl"
NODES, LATENCIES = (8, 64, 256), (0.0, 0.002, 0.05)
TRIPS, WARM_UP, KILOBYTES = 12, 2, 100
TARGET = 1.0
"""Milliseconds of the SuperLink's processor that a message may cost."""
MARK = "trips "
PROJECT = """
[project]
name = "no-op"
version = "1.0.0"
description = "Sends messages to nodes that do nothing."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmarks"

[tool.flwr.app.components]
serverapp = "app.server:app"
clientapp = "app.server:app"

[tool.flwr.app.config]
scenario = ""
nodes = 0
trips = 0
kilobytes = 0
superlink = 0
"""
SERVER = """
import json
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

from benchmarks.deployment_nodes import MARK
from benchmarks.deployment_trial import measure_processor_time
from grpo_fed.engines.flower.superlink_grid import SuperLinkGrid

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    grid = SuperLinkGrid(grid)
    while len(nodes := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.2)
    array = Array(np.zeros(256 * config["kilobytes"], np.float32))
    content = RecordDict({"arrays": ArrayRecord({"all": array})})
    seconds, processor = [], []
    for _ in range(config["trips"]):
        began, before = time.monotonic(), measure_processor_time(config["superlink"])
        ids = set(grid.push_messages([grid.create_message(content, "train", node, "") for node in nodes]))
        until = time.monotonic() + 120
        while ids:
            assert time.monotonic() < until, "some answers do not come"
            replies = list(grid.pull_messages(ids, 5.0))
            assert all(reply.has_content() for reply in replies)
            ids -= {reply.metadata.reply_to_message_id for reply in replies}
        seconds.append(time.monotonic() - began)
        processor.append(measure_processor_time(config["superlink"]) - before)
    print(MARK + json.dumps({"seconds": seconds, "processor": processor}), flush=True)
"""


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=NODES)
    options = parser.parse_args()
    finished = {(line["nodes"], line["latency"]) for line in read_results()}
    for nodes in options.nodes:
        for latency in LATENCIES:
            if (nodes, latency) not in finished:
                run_trial(nodes, latency)
    print("\n".join(format_table(read_results())))


def run_trial(nodes: int, latency: float) -> None:
    """Do a run, and append its line."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        trips = measure(Path(name), nodes, latency)
    line = {
        "nodes": nodes,
        "latency": latency,
        "seconds": trips["seconds"][WARM_UP:],
        "processor": trips["processor"][WARM_UP:],
        "load": load,
        "machine": describe_machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{nodes} nodes, {1000 * latency:g} ms: {median(line['seconds']):.2f} s at load {load:.1f}", flush=True)


def measure(folder: Path, nodes: int, latency: float) -> dict[str, list[float]]:
    """Start a SuperLink, nodes and the app; return the seconds and the SuperLink's processor seconds of each trip."""
    from grpo_fed.engines.deploy import commands as deploy
    from grpo_fed.engines.flower.control import RunStatus, SuperLinkControl
    from grpo_fed.engines.flower.processes import SupervisedProcesses
    from grpo_fed.engines.flower.superlink import Identity, SuperLink, find_free_port, make_flower_environment

    names = [f"node-{number}" for number in range(nodes)]
    deploy.init(folder, [], names)
    app = folder / "project"
    (app / "app").mkdir(parents=True)
    (folder / "neutral").mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "app" / "__init__.py").touch()
    (app / "app" / "server.py").write_text(SERVER)
    server, text = folder / "server", ""
    environment = make_flower_environment(folder / "home")
    with SupervisedProcesses(folder / "neutral", environment, folder) as processes:
        identity = Identity(server / "ca.pem", server / "server.pem", server / "server-key.pem")
        link = SuperLink(processes, folder, find_free_port(), identity=identity)
        link.start()
        with SuperLinkControl(link.connection) as control, Proxy(link.port, latency) as proxy:
            for name in names:
                control.register(server / "nodes" / f"{name}.pub", name)
            arguments = (f"127.0.0.1:{proxy.port}", folder, names)
            worker = multiprocessing.get_context("spawn").Process(target=serve_nodes, args=arguments, daemon=True)
            worker.start()
            config = {"nodes": nodes, "trips": TRIPS, "kilobytes": KILOBYTES, "superlink": processes.pid("superlink")}
            items = control.follow(control.start(control.prepare(app), config, {}))
            while isinstance(item := items.get(), str):
                text += item
            worker.kill()
            worker.join()
    assert isinstance(item, RunStatus), item
    assert item.outcome == "completed", text[-3000:]
    (trips,) = (line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK))
    measured: dict[str, list[float]] = json.loads(trips)
    return measured


# In the process of the nodes -----------------------------------------------------------------------------------------


def serve_nodes(superlink: str, folder: Path, names: Sequence[str]) -> None:
    """Run the nodes until the process is killed."""
    from grpo_fed.engines.resident.run_configs import RunConfigs

    configs = RunConfigs()
    for name in names:
        node = IdleNode(superlink, folder / "clients" / name, name, configs)
        threading.Thread(target=node.run, daemon=True).start()
    threading.Event().wait()


class IdleNode:
    """A node that gives back what it gets; it stands for the workers and for the link to Flower's Fleet API, too."""

    def __init__(self, superlink: str, keys: Path, name: str, configs: Any) -> None:
        from grpo_fed.engines.resident.exchange_link import ExchangeLink
        from grpo_fed.engines.resident.identity import load_key
        from grpo_fed.engines.wire.flower_private import NodeConnection

        connection = NodeConnection(superlink, keys / "ca.pem", load_key(keys / "node-key"))
        self.busy: list[str] = []
        self.ids: list[str] = []
        stand_in: Any = self
        self._link = ExchangeLink(connection, {"client": name}, stand_in, configs, stand_in)

    def run(self) -> None:
        """Take messages, and answer them at once."""
        from grpo_fed.engines.wire.flower_private import NoConnectionError

        while True:
            try:
                while not self._link.sign_on():
                    time.sleep(0.2)
                while True:
                    self._link.serve()
            except NoConnectionError:
                time.sleep(0.2)

    def begin(self, message: Any) -> None:
        """Answer a message."""
        from grpo_fed.engines.resident.workers import Outcome

        self._link.answer(message, Outcome(content=message.content))

    def cancel(self, message_id: str) -> None:
        """Forget a message: there is nothing to end."""

    def pull(self) -> bool:
        """Say that Flower has no message."""
        return False


# The table -----------------------------------------------------------------------------------------------------------


def read_results() -> list[dict[str, Any]]:
    """Read the finished runs."""
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()] if FILE.exists() else []


def format_table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write the table, and whether the target is reached.

    The model of a trip: what it takes without latency, and two round trips. The message and its answer are one; the
    other is what lies between an answer and the node's next request, since trips follow each other without a pause.
    """
    if not lines:
        return
    base = {line["nodes"]: median(line["seconds"]) for line in lines if line["latency"] == 0}
    yield "| nodes | latency, ms | a trip, s | as modelled, s | SuperLink's processor a message, ms | load |"
    yield "| --- | --- | --- | --- | --- | --- |"
    costs = []
    for line in sorted(lines, key=lambda line: (line["nodes"], line["latency"])):
        costs.append(1000 * fmean(line["processor"]) / (2 * line["nodes"]))  # the clock of processors has 10 ms steps
        model = f"{base[line['nodes']] + 4 * line['latency']:.2f}" if line["nodes"] in base else ""
        cells = [f"{line['nodes']}", f"{1000 * line['latency']:g}", f"{median(line['seconds']):.2f}", model]
        yield f"| {' | '.join(cells)} | {costs[-1]:.2f} | {line['load']:.0f} |"
    yield ""
    yield (
        f"- At most {TARGET:g} ms of the SuperLink's processor for a message or an answer: {max(costs):.2f} ms at most,"
        f" {'reached' if max(costs) <= TARGET else 'missed'}."
    )


if __name__ == "__main__":
    main()
