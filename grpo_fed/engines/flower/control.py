"""Starts, follows and stops runs on a SuperLink, and lists and accepts nodes: what `flwr` does, in this process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias, final

from grpo_fed.engines.flower.connections import SuperLinkAddress
from grpo_fed.engines.wire.flower_private import ControlConnection, NoConnectionError, RefusedError, build_bundle

PATIENCE = 60.0
"""Seconds for which a SuperLink may be out of reach during a run."""
RETRY_PAUSE = 0.25
"""Seconds before a SuperLink that is out of reach is asked again."""


class ControlError(RuntimeError):
    """A SuperLink refuses what it is asked, or does not answer; the text says why."""


@dataclass(frozen=True)
class RunStatus:
    """What Flower says about a run."""

    stage: str
    """pending, starting, running or finished."""
    outcome: str
    """Of a finished run: completed, failed or stopped."""
    details: str

    def __str__(self) -> str:
        return f"{self.stage}:{self.outcome}" if self.outcome else self.stage


@dataclass(frozen=True)
class ListedRun:
    """A run, as the SuperLink lists it."""

    run: int
    status: RunStatus
    since: str
    """When it was asked for."""


@dataclass(frozen=True)
class ListedNode:
    """A node, as the SuperLink lists it."""

    node: int
    status: str
    """registered, online or offline."""
    since: str
    """When it went online or offline; empty if it never was online."""


LogItem: TypeAlias = str | RunStatus | BaseException
"""A part of a run's log; how the run ended; why its log cannot be read any more."""


@final
class SuperLinkControl:
    """Calls a SuperLink's Control API; its methods raise ControlError with the SuperLink's words."""

    def __init__(self, link: SuperLinkAddress) -> None:
        self._link = link
        self._connection = ControlConnection(link.address, link.authority)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, app: Path) -> bytes:
        """Return the app in a folder as the bundle that `start` takes; the SuperLink is not asked."""
        return build_bundle(app)

    def start(self, bundle: bytes, run_config: Mapping[str, Any], simulation: Mapping[str, float]) -> int:
        """Start a run of an app, and return its id. simulation: settings of Flower's simulation; empty without one."""
        with self._words("start the run"):
            return self._connection.start_run(bundle, run_config, simulation)

    def status(self, run: int) -> RunStatus:
        """Return the status of a run."""
        with self._words("say how the run is"):
            (entry,) = self._connection.list_runs(run)
            return _status(entry)

    def list_runs(self) -> list[ListedRun]:
        """Return the latest runs, the newest first."""
        with self._words("list its runs"):
            runs = self._connection.list_runs()
            listed = [ListedRun(run.run_id, _status(run), _to_seconds(run.pending_at)) for run in runs]
            return sorted(listed, key=lambda run: run.since, reverse=True)

    def stop(self, run: int) -> None:
        """Stop a run."""
        with self._words("stop the run"):
            self._connection.stop_run(run)

    def list_nodes(self) -> list[ListedNode]:
        """Return all nodes."""
        with self._words("list its nodes"):
            return [
                ListedNode(
                    node.node_id,
                    node.status,
                    _to_seconds(node.last_activated_at if node.status == "online" else node.last_deactivated_at),
                )
                for node in self._connection.list_nodes()
            ]

    def list_keys(self) -> dict[bytes, int]:
        """Return the ids of the accepted nodes by their public keys, in the format of OpenSSH."""
        with self._words("list its keys"):
            return self._connection.list_keys()

    def register(self, key: Path, client: str) -> int:
        """Accept a client's node by the file with its public key, and return the node's id."""
        with self._words(f"accept the key of {client}"):
            return self._connection.register_node(key.read_bytes(), client)

    def unregister(self, node: int) -> None:
        """Accept a node no longer."""
        with self._words(f"give up node {node}"):
            self._connection.unregister_node(node)

    def follow(self, run: int) -> queue.SimpleQueue[LogItem]:
        """Read a run's log in a thread, until the run ends; a SuperLink that was killed is waited for.

        The last item of the queue is the run's status, or why the log cannot be read any more.
        """
        items: queue.SimpleQueue[LogItem] = queue.SimpleQueue()
        threading.Thread(target=self._follow, args=(run, items), name="log of a run", daemon=True).start()
        return items

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _follow(self, run: int, items: queue.SimpleQueue[LogItem]) -> None:
        after, until = 0.0, time.monotonic() + PATIENCE
        while True:
            try:
                for text, latest in self._connection.stream_log(run, after):
                    after = latest
                    items.put(text)
                    until = time.monotonic() + PATIENCE
                (entry,) = self._connection.list_runs(run)
                until = time.monotonic() + PATIENCE
                if (status := _status(entry)).stage == "finished":
                    items.put(status)
                    return
            except NoConnectionError as error:
                if time.monotonic() > until:
                    items.put(ControlError(f"the SuperLink at {self._link.address} is out of reach: {error}"))
                    return
            except BaseException as error:  # noqa: BLE001, an exception in a thread would go unnoticed
                items.put(error)
                return
            time.sleep(RETRY_PAUSE)

    @contextmanager
    def _words(self, deed: str) -> Iterator[None]:
        """Turn what may go wrong into words."""
        try:
            yield
        except (NoConnectionError, RefusedError) as error:
            raise ControlError(f"the SuperLink at {self._link.address} does not {deed}: {error}") from error


def _status(run: Any) -> RunStatus:
    return RunStatus(run.status.status, run.status.sub_status, run.status.details)


def _to_seconds(when: str) -> str:
    """Format a time of Flower's to the second; empty if it is."""
    return when.partition(".")[0].partition("+")[0].replace("T", " ") + "Z" if when else ""
