"""Runs of MLflow for a server that is not ours: one for the whole, and one for each client inside it.

`Tracker` tracks our own runs, through a folder and a process that sends. A strategy inside another program has no
folder, so it sends at the end of each round. What the store does not take is sent again with the next round.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

from grpo_fed.runs.colours import pick_colour
from grpo_fed.runs.tracking.selection import MOST_CLIENTS, param_name
from grpo_fed.runs.tracking.store import URI, resolve_store
from grpo_fed.runs.tracking.tracker import QUIET

if TYPE_CHECKING:
    from mlflow import MlflowClient

CLIENT_NAME = "grpo_fed.client"
"""The tag with a client's name, as of our own runs."""
BATCH = 1000
"""Metrics that one request may hold."""
WHOLE = ""
"""The name of the run that the clients' runs are in."""

log = logging.getLogger("flwr")


@final
class NestedRuns:
    """Sends metrics of a federation and its clients. Once it is made no method raises: tracking stops no training."""

    def __init__(self, uri: str, experiment: str, name: str, params: Mapping[str, Any]) -> None:
        """Prepare to track. uri: a server or a database, as `grpo-fed run --track` takes it. name: of the whole's run.

        ValueError for an address that names no store.
        """
        store = resolve_store(uri)
        if store is None:
            raise ValueError(f"mlflow = {uri!r}: names no store; leave it out for no tracking")
        for key, value in QUIET.items():
            if key.startswith("MLFLOW"):
                os.environ.setdefault(key, value)
        if store.file is not None:
            store.file.parent.mkdir(parents=True, exist_ok=True)
        self._store, self._uri = store, store.environment[URI]
        self._experiment, self._title, self._params = experiment, name, params
        self._client: MlflowClient | None = None
        self._runs: dict[str, str] = {}
        """The ids of the runs, by client."""
        self._unsent: dict[str, list[tuple[str, float, int, int]]] = {}
        """By client, metrics that the store has not taken: key, value, time and round."""

    def round(self, number: int, whole: Mapping[str, float], clients: Mapping[str, Mapping[str, float]]) -> None:
        """Send the metrics of a round."""
        now = time.time_ns() // 1_000_000
        for client, metrics in {WHOLE: whole, **(clients if len(clients) <= MOST_CLIENTS else {})}.items():
            finite = {param_name(key): float(value) for key, value in metrics.items() if math.isfinite(value)}
            self._unsent.setdefault(client, []).extend((key, value, now, number) for key, value in finite.items())
        self._attempt(self._send)

    def close(self, status: str) -> None:
        """Send what is left, and end all runs. status: of MLflow, such as FINISHED."""
        self._attempt(self._send)
        self._attempt(lambda: self._end(status))
        if any(self._unsent.values()):
            log.warning("MLflow at %s did not take all metrics; the rest is lost", self._store.uri)

    def _attempt(self, do: Callable[[], None]) -> None:
        """Do something with the store; a failure is logged, and what was not sent is kept."""
        try:
            do()
        except Exception as error:  # noqa: BLE001, whatever a store does, the training goes on
            log.warning("MLflow at %s: %s: %s", self._store.uri, type(error).__name__, error)

    def _send(self) -> None:
        """Send all metrics that are left."""
        from mlflow.entities import Metric

        for client, rows in self._unsent.items():
            if rows:
                run = self._run_of(client)
                for start in range(0, len(rows), BATCH):
                    self._connected().log_batch(run, metrics=[Metric(*row) for row in rows[start : start + BATCH]])
                self._unsent[client] = []

    def _end(self, status: str) -> None:
        for run in self._runs.values():
            self._connected().set_terminated(run, status)

    def _connected(self) -> MlflowClient:
        """Connect to the store, with the import of mlflow, which takes seconds."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._uri)
        return self._client

    def _run_of(self, client: str) -> str:
        """Return the id of a client's run, or of the whole's, and create it if there is none yet."""
        if client not in self._runs:
            tags = {"mlflow.runColor": pick_colour(len(self._runs))}
            if client != WHOLE:
                tags |= {"mlflow.parentRunId": self._run_of(WHOLE), CLIENT_NAME: client}
            run = self._connected().create_run(self._find_experiment(), tags=tags, run_name=client or self._title)
            self._runs[client] = run.info.run_id
            if client == WHOLE:
                for key, value in self._params.items():
                    self._connected().log_param(run.info.run_id, param_name(key), value)
        return self._runs[client]

    def _find_experiment(self) -> str:
        """Return the id of the experiment, and create it if there is none."""
        found = self._connected().get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        artifacts = self._store.artifacts
        location = None if artifacts is None else (artifacts / self._experiment).as_uri()
        return str(self._connected().create_experiment(self._experiment, location))
