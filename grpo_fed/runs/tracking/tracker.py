"""The run's side of tracking: a line in a file for each round, and a process that is started to send them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

from grpo_fed.runs.tracking.spool import SendState, Spool
from grpo_fed.runs.tracking.store import HIDDEN, Store, resolve_store
from grpo_fed.scenario.scenario import Scenario

Status: TypeAlias = Literal["finished", "interrupted", "failed"]

PATIENCE = 120.0
"""Seconds that the end of a run waits for what is still to be sent."""
GRACE = 5.0
"""Seconds without success after which the writer of a run that has ended leaves the rest to `replay`."""
TIMEOUT = 10
"""Seconds that one request to a server may take."""
QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""What mlflow reads when it is imported; its own retries would take minutes, and the spool tries again anyway."""


@final
class Tracker:
    """One run, as it is tracked. Nothing here raises, or waits, once it is open: tracking never stops a training."""

    @classmethod
    def open(
        cls, uri: str | None, folder: Path, scenario: Scenario, resumed: bool = False, models: bool = True
    ) -> Tracker:
        """Track a run to `uri`, else MLFLOW_TRACKING_URI, else `runs/mlflow.db`; "off" tracks nothing.

        Nothing is written or started before the first round. resumed: go on in the runs that `folder` remembers.
        models: log the clients' policies when the run has finished. ValueError for a URI that names no store.
        """
        spool = Spool(folder)
        store = resolve_store(uri)
        if resumed and store is not None and spool.sent_path.is_file():
            store = _store_of_run(store, uri, spool)
        return cls(store, spool, scenario, resumed, models)

    def __init__(self, store: Store | None, spool: Spool, scenario: Scenario, resumed: bool, models: bool) -> None:
        self.store, self.spool, self.scenario, self.models = store, spool, scenario, models
        self.trouble: str | None = None
        """What a person should know of tracking that did not go well; None if nothing."""
        self._resumed = resumed
        self._begun = False
        self._writer: subprocess.Popen[bytes] | None = None

    @property
    def run_id(self) -> str | None:
        """Of the federation's run; None until the store has given it one, some seconds after the first round."""
        return None if self.store is None or not self._begun else self.spool.load_state(self.store.uri).parent

    @property
    def link(self) -> str | None:
        """To the run's page; None where no server shows it yet."""
        if self.store is None or not self._begun or self.store.page is None:
            return None
        return page_link(self.store.page, self.spool.load_state(self.store.uri))

    @property
    def place(self) -> str:
        """Where the run can be looked at as soon as it has begun: a server's page, or a command; empty if nowhere."""
        if self.store is None:
            return ""
        return self.store.page or f"grpo-fed ui {self.spool.folder.parent}"

    def round(self, line: Mapping[str, Any]) -> None:
        """A round, as `rounds.jsonl` has it; number 0, too, if there is one."""
        if self.store is None:
            return
        try:
            self._begin()
            self.spool.append("round", {"line": line})
        except (OSError, ValueError, TypeError) as error:
            self.trouble = f"round {line.get('round')} is not tracked: {error}"

    def close(self, document: Mapping[str, Any] | None, status: Status, patience: float = PATIENCE) -> None:
        """The results, as `results.json` has them, when all else is in the folder; wait a while until all is sent."""
        if self.store is None:
            return
        try:
            self._begin()
            content = {"status": status, "document": document, "models": self.models and status == "finished"}
            self.spool.append("end", content)
        except (OSError, ValueError, TypeError) as error:
            self.trouble = f"the end of the run is not tracked: {error}"
        if self._writer is not None:
            _wait(self._writer, patience)
            if self.spool.waits:
                lost = "" if self.trouble is None else f"{self.trouble}; "
                self.trouble = (
                    f"{lost}{self.store.uri} did not take all; the rest waits in {self.spool.path}, and grpo-fed replay"
                    f" {self.spool.folder.parent} sends it ({self.spool.log} says what was wrong)"
                )

    def _begin(self) -> None:
        """With the first round: the folder is there then, and the run's own start is over."""
        if self._begun:
            return
        self._begun = True
        if not self._resumed:
            self.spool.clear()
        self.spool.folder.mkdir(parents=True, exist_ok=True)
        self.spool.mend()
        assert self.store is not None
        if not self.spool.sent_path.is_file():
            self.spool.save_state(SendState(self.store.uri))
        if not self.spool.path.is_file():
            run = self.spool.load_state("").run if self._resumed else None
            self.spool.append("begin", _begin_content(self.scenario, self.spool.folder.absolute().parent.name, run))
        elif self._resumed:
            self.spool.append("resume", {})
        self._writer = start_writer(self.spool, self.store)


def replay(folder: str | Path, uri: str | None = None, patience: float = PATIENCE) -> int:
    """Send what a run folder's spool still holds; how many records that was.

    ValueError if the folder holds no tracked run; TimeoutError if not all could be sent, or a run is sending it itself.
    """
    spool = Spool(Path(folder))
    if not spool.sent_path.is_file() and not spool.path.is_file():
        raise ValueError(f"{folder}: there is nothing to replay: no run was tracked in it")
    kept = spool.load_state("").store
    store = resolve_store(uri or (kept if kept and HIDDEN not in kept else None))
    if store is None:
        raise ValueError(f"{folder}: nothing can be sent with tracking off; name a tracking URI")
    store = _store_of_run(store, uri, spool)
    count = sum(1 for _ in _waiting(spool))
    if count:
        with spool.locked(0):
            pass  # else a run is sending it itself: TimeoutError says so
        _wait(start_writer(spool, store), patience)
        if spool.waits:
            left = sum(1 for _ in _waiting(spool))
            raise TimeoutError(f"{folder}: {left} of {count} records wait on: {_last_line(spool.log)}")
    return count


def _waiting(spool: Spool) -> Iterator[object]:
    return iter(list(spool.read(spool.load_state("").position, sys.maxsize)))


def start_writer(spool: Spool, store: Store) -> subprocess.Popen[bytes]:
    """It lives until its input is closed and all is sent; it is nobody's terminal's, so that Ctrl-C is not for it."""
    command = [sys.executable, "-m", "grpo_fed.runs.tracking.writer", str(spool.folder.parent), store.uri]
    environment = {**os.environ, **QUIET, **store.environment}
    with spool.log.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def page_link(page: str, sent: SendState) -> str | None:
    """To a run's page on a server."""
    if sent.experiment is None or sent.parent is None:
        return None
    return f"{page}/#/experiments/{sent.experiment}/runs/{sent.parent}?workflowType=machine_learning"


def _store_of_run(store: Store, given: str | None, spool: Spool) -> Store:
    """A run that was tracked somewhere goes on there, unless nothing ever got there; only a database's password has to
    be said again.
    """
    sent = spool.load_state(store.uri)
    kept = sent.store
    if kept == store.uri:
        return store
    if given and sent.experiment is None:
        spool.save_state(SendState(store.uri, sent.run))  # nothing got there: perhaps its address was wrong
        return store
    if given:
        raise ValueError(f"{spool.folder.parent}: is tracked at {kept}, and goes on there, not at {store.uri}")
    if HIDDEN in kept:
        raise ValueError(f"{spool.folder.parent}: is tracked at {kept}; give it in MLFLOW_TRACKING_URI to go on there")
    again = resolve_store(kept)
    assert again is not None
    return again


def _begin_content(scenario: Scenario, folder: str, run: str | None) -> dict[str, Any]:
    """What the runs are made from; run: the name that it had before, if it had."""
    settings = scenario.model_dump(mode="json", exclude={"clients", "description"})
    clients = {
        name: {
            "task": entry.name,
            "env": entry.env,
            **{f"kwargs.{key}": value for key, value in entry.kwargs.items()},
        }
        for entry in scenario.clients
        for name in entry.names
    }
    return {
        "run": run or uuid.uuid4().hex,
        "scenario": scenario.name,
        "description": scenario.description,
        "folder": folder,
        "params": {**dict(_flat(settings)), "clients": len(clients)},
        "clients": clients,
    }


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`objective.clip` and so on; what is empty is left out."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != "":
            yield f"{prefix}{key}", value


def _wait(writer: subprocess.Popen[bytes], patience: float) -> None:
    """Until it ends; after `patience` seconds it is left to go on alone."""
    assert writer.stdin is not None
    writer.stdin.close()
    until = time.monotonic() + patience
    while writer.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return lines[-1] if lines else "nothing is known"
