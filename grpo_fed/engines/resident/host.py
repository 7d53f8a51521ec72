"""The process of a resident node: a thread for each client of this machine.

`python -m grpo_fed.engines.resident.host --superlink HOST:PORT --client NAME ...`; the other arguments say where the
clients' keys and states are. It ends within seconds of SIGTERM, and its workers with it, however it ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo_fed.engines.workers.fork_server import attach, preload

STOP_SECONDS = 2.0
"""Seconds that the clients have to sign off."""
OWN_KEYS = "node-keys"
"""The folder, among the clients' states, with the keys that nodes made themselves."""


def make_host_command(
    superlink: str,
    clients: Mapping[str, Path | None],
    authority: Path | None = None,
    own_keys: Path | None = None,
    state: Path | None = None,
    devices: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the command that starts the process.

    clients: by name, the file with the client's private key; None if the node makes its own. own_keys: the folder of
    these. state: the folder of the clients' states. devices: by name, the torch device that a client computes on,
    instead of the scenario's.
    """
    options = ["--superlink", superlink]
    for option, value in (("--authority", authority), ("--own-keys", own_keys), ("--state", state)):
        options += [] if value is None else [option, str(value)]
    for client, key in clients.items():
        options += ["--client", client, *([] if key is None else ["--key", f"{client}={key}"])]
    for client, device in (devices or {}).items():
        options += ["--device", f"{client}={device}"]
    return [sys.executable, "-P", "-m", __name__, *options]


def main(arguments: Sequence[str] | None = None, link: socket.socket | None = None) -> None:
    """Serve the clients that the command line names until SIGTERM or SIGINT.

    link: to a process that workers are forked from; None to start one.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--client", action="append", required=True)
    parser.add_argument("--key", action="append", default=[], help="CLIENT=FILE")
    parser.add_argument("--device", action="append", default=[], help="CLIENT=DEVICE")
    for option in ("--authority", "--own-keys", "--state"):
        parser.add_argument(option, type=Path)
    options = parser.parse_args(arguments)
    if link is None:
        preload()
    else:
        attach(link)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())

    from grpo_fed.engines.resident.client import Place, ResidentClient
    from grpo_fed.engines.resident.identity import find_own_key, load_key
    from grpo_fed.engines.resident.run_configs import RunConfigs

    keys, devices = (dict(entry.partition("=")[::2] for entry in entries) for entries in (options.key, options.device))
    configs = RunConfigs()
    clients = []
    for name in options.client:
        made = name not in keys
        key = find_own_key((options.own_keys or Path(OWN_KEYS)) / name) if made else load_key(Path(keys[name]))
        place = Place(name, options.superlink, options.authority, key, made, options.state, devices.get(name))
        clients.append(ResidentClient(place, configs, _say))
    for client in clients:
        threading.Thread(target=client.run, daemon=True).start()
    stopping.wait()
    _run_all([client.stop for client in clients])
    sys.stdout.flush()
    os._exit(0)  # threads may still wait for the SuperLink; the workers end as their sockets close


def _run_all(calls: Sequence[object]) -> None:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(STOP_SECONDS)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
