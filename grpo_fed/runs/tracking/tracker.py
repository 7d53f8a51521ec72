"""The run's side of tracking: it appends a line to a file for each round, and starts a process that sends them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from grpo_fed.runs.called_as import called_as
from grpo_fed.runs.folder import refuse_all_links
from grpo_fed.runs.results import ENDED, Status
from grpo_fed.runs.tracking.origin import RunOrigin, origin_tags, run_name
from grpo_fed.runs.tracking.probe import find_trouble
from grpo_fed.runs.tracking.spool import SendState, Spool
from grpo_fed.runs.tracking.store import HIDDEN, Store, resolve_store
from grpo_fed.scenario.scenario import Scenario

if TYPE_CHECKING:
    from grpo_fed.runs.tracking.groups import RunGroup

PATIENCE = 120.0
"""Seconds that the end of a run waits until all records are sent."""
GRACE = 5.0
"""Seconds without success after which the writer gives up if the run has ended; `replay` sends the rest."""
TIMEOUT = 10
"""Seconds that one request to a server may take."""
SAMPLE = "--sample"
"""The writer's argument to send how busy the machine is."""
LOCAL = RunOrigin()
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
"""Environment variables of mlflow: no retries, which would take minutes, since the writer sends again itself."""


@final
class Tracker:
    """Tracks one run. Once it is open no method raises, and only `close` waits: tracking never stops a training."""

    @classmethod
    def open(
        cls,
        uri: str | None,
        folder: Path,
        scenario: Scenario,
        resumed: bool = False,
        models: bool = True,
        from_run: bool = False,
        origin: RunOrigin = LOCAL,
        group: RunGroup | None = None,
    ) -> Tracker:
        """Track a run to `uri`, else MLFLOW_TRACKING_URI, else `runs/mlflow.db`; "off" tracks nothing.

        Nothing is written or started before the first round.

        folder: the run's folder. resumed: whether to go on with the MLflow runs that the folder names. models: whether
        the clients' policies are logged when the run has finished. from_run: whether a store that the folder alone
        names may be used, as for `store_of_run`. origin: what the run was started with. group: of a sweep or a
        comparison that the run belongs to. ValueError for a URI that names no store, or another than the folder, and if
        models are to be registered nowhere.
        """
        spool = Spool(folder)
        store = resolve_store(uri)
        if origin.register and store is None:
            raise ValueError(
                "--register needs a store to register models in, and tracking is off: leave one of both out"
            )
        if resumed and store is not None and spool.sent_path.is_file():
            store = store_of_run(store, uri, spool, from_run)
        return cls(store, spool, scenario, resumed, models, origin, group)

    def __init__(
        self,
        store: Store | None,
        spool: Spool,
        scenario: Scenario,
        resumed: bool,
        models: bool,
        origin: RunOrigin,
        group: RunGroup | None = None,
    ) -> None:
        """Prepare to track; see `open`, which makes the store and the spool."""
        self.store, self.spool, self.scenario, self.models = store, spool, scenario, models
        self.origin, self._group = origin, group
        self.trouble: str | None = None
        """A message about what was not tracked, for a person; None if all was."""
        self._resumed = resumed
        self._begun = False
        self._writer: subprocess.Popen[bytes] | None = None

    @property
    def run_id(self) -> str | None:
        """The id of the federation's run; None until the store has assigned it, some seconds after the first round."""
        return None if self.store is None or not self._begun else self.spool.load_state(self.store.uri).parent

    @property
    def link(self) -> str | None:
        """The address of the run's page; None while no server shows it."""
        if self.store is None or not self._begun or self.store.page is None:
            return None
        return page_link(self.store.page, self.spool.load_state(self.store.uri))

    @property
    def place(self) -> str:
        """A server's address or a command that shows the run once it has begun; empty with tracking off."""
        if self.store is None:
            return ""
        return self.store.page or f"{called_as()} ui {shlex.quote(str(self.spool.folder.parent))}"

    def find_trouble(self) -> str | None:
        """Say in a line why the store does not take records now, if it is a server; None if it does."""
        trouble = None if self.store is None else find_trouble(self.store)
        if trouble is None:
            return None
        assert self.store is not None
        command = f"{called_as()} replay {shlex.quote(str(self.spool.folder.parent))}"
        return f"MLflow: {self.store.uri} {trouble}; the run goes on, and {command} sends later what is left at its end"

    def round(self, line: Mapping[str, Any]) -> None:
        """Track a round. line: as in `rounds.jsonl`; round 0 too, if there is one."""
        if self.store is None:
            return
        try:
            self._begin()
            self.spool.append("round", {"line": line})
        except (OSError, ValueError, TypeError) as error:
            self.trouble = f"round {line.get('round')} is not tracked: {error}"

    def close(self, document: Mapping[str, Any] | None, status: Status, patience: float = PATIENCE) -> None:
        """Track the end of the run, and wait until all records are sent, `patience` seconds at most.

        After that the process that sends goes on by itself, but not for a run that was interrupted: that leaves nothing
        behind, and records that are left wait for `replay`.
        document: the content of `results.json`, None if there is none. Everything else must be in the folder by now.
        """
        if self.store is None:
            return
        try:
            self._begin()
            content = {"status": status, "document": document, "models": self.models and status in ENDED}
            content["register"] = self.origin.register
            self.spool.append("end", content)
        except (OSError, ValueError, TypeError) as error:
            self.trouble = f"the end of the run is not tracked: {error}"
        if self._writer is not None:
            _wait(self._writer, patience)
            if status == "interrupted" and self._writer.poll() is None:
                self._writer.kill()
                self._writer.wait()
            if self.spool.has_unsent:
                before = "" if self.trouble is None else f"{self.trouble}; "
                command = f"{called_as()} replay {shlex.quote(str(self.spool.folder.parent))}"
                self.trouble = (
                    f"{before}{self.store.uri} did not take all records; the rest is in {self.spool.path}, and"
                    f" {command} sends it ({self.spool.log} has the errors)"
                )

    def _begin(self) -> None:
        """Write the first record and start the writer, once; with the first round, when the folder exists."""
        if self._begun:
            return
        self._begun = True
        if not self._resumed:
            self.spool.clear()
        self.spool.folder.mkdir(parents=True, exist_ok=True)
        self.spool.end_partial_line()
        assert self.store is not None
        if not self.spool.sent_path.is_file():
            self.spool.save_state(SendState(self.store.uri))
        if not self.spool.path.is_file():
            run = self.spool.load_state("").run if self._resumed else None
            name = self.spool.folder.absolute().parent.name
            group = {} if self._group is None else {"group": asdict(self._group)}
            self.spool.append("begin", {**_begin_content(self.scenario, name, run, self.origin), **group})
        elif self._resumed:
            self.spool.append("resume", {})
        self._writer = start_writer(self.spool, self.store, samples=True)


def replay(folder: str | Path, uri: str | None = None, patience: float = PATIENCE, from_run: bool = False) -> int:
    """Send the records that are left in the spool of a run's folder; return how many there were.

    uri: a store, if it is not the one that the run was tracked to. from_run: as for `store_of_run`. ValueError if the
    folder holds no tracked run; TimeoutError if not all records could be sent in `patience` seconds, or the run is
    still sending them itself.
    """
    spool = Spool(Path(folder))
    if not spool.sent_path.is_file() and not spool.path.is_file():
        raise ValueError(f"{folder}: there is nothing to replay: no run was tracked in it")
    refuse_all_links(Path(folder))
    store = resolve_store(uri)
    if store is None and not (from_run and uri is None):
        raise ValueError(f"{folder}: nothing can be sent with tracking off; name a tracking URI")
    store = store_of_run(store, uri, spool, from_run)
    count = _count_unsent(spool)
    if count:
        with spool.locked(0):
            pass  # TimeoutError if the run is sending them itself
        _wait(start_writer(spool, store), patience)
        if spool.has_unsent:
            left = _count_unsent(spool)
            raise TimeoutError(f"{folder}: {left} of {count} records are not sent: {_last_line(spool.log)}")
    return count


def _count_unsent(spool: Spool) -> int:
    return sum(1 for _ in spool.read(spool.load_state("").position, sys.maxsize))


def start_writer(spool: Spool, store: Store, samples: bool = False) -> subprocess.Popen[bytes]:
    """Start the process that sends; it ends when its input is closed and all records are sent.

    samples: whether it sends how busy the machine is, too, while its input is open.

    It has a session of its own, so that Ctrl-C in the terminal does not stop it.
    """
    # -P: without it, modules of the current folder, which may be a run's, would come before all others
    command = [sys.executable, "-P", "-m", "grpo_fed.runs.tracking.writer", str(spool.folder.parent), store.uri]
    command += [SAMPLE] if samples else []
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
    environment = {**make_writer_environment(store), "PYTHONPATH": path}
    with spool.log.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def make_writer_environment(store: Store) -> dict[str, str]:
    """Return the environment variables of a process that sends: the store's address, and its password."""
    return {**os.environ, **QUIET, **store.environment}


def page_link(address: str, sent: SendState) -> str | None:
    """Make the link to a run's page on a server; None if the store has not assigned the run's id yet."""
    if sent.experiment is None or sent.parent is None:
        return None
    return f"{address}/#/experiments/{sent.experiment}/runs/{sent.parent}?workflowType=machine_learning"


def store_of_run(store: Store | None, given: str | None, spool: Spool, from_run: bool = False) -> Store:
    """Return the store that a run goes on in: the one that it was tracked to, if no other would be used without it.

    The address in a run's folder is not trusted: another may have made the folder, and the credentials of the
    environment would go where it says. If no record has arrived there, the store that was given is used instead.

    store: the one that the user's argument, the environment or the default name; None if tracking is off, with
    `from_run` alone. given: the argument, if there is one. from_run: whether the user trusts the folder's address.
    ValueError if another store was recorded, or if its address with its password must be given again.
    """
    sent, folder = spool.load_state("" if store is None else store.uri), spool.folder.parent
    recorded = sent.store
    if store is not None and recorded == store.uri:
        return store
    here = "nowhere" if store is None else store.uri
    if given and store is not None and sent.experiment is None:
        spool.save_state(SendState(store.uri, sent.run))  # no record has arrived: perhaps its address was wrong
        return store
    if given:
        raise ValueError(f"{folder}: is tracked at {recorded}, and goes on there, not at {here}")
    if not from_run:
        raise ValueError(
            f"{folder}: is tracked at {recorded}, and you at {here}; if this folder is yours, go on there with"
            " --tracking-from-run, or give the address with --track"
        )
    if HIDDEN in recorded:
        raise ValueError(
            f"{folder}: is tracked at {recorded}; give that address with its password in MLFLOW_TRACKING_URI"
        )
    original = resolve_store(recorded)
    if original is None:
        raise ValueError(f"{folder}: {spool.sent_path.name} names no store; give one with --track")
    return original


def _begin_content(scenario: Scenario, folder: str, run: str | None, origin: RunOrigin) -> dict[str, Any]:
    """Make the first record: what MLflow's runs are created from. run: the unique name of a run that goes on."""
    settings = scenario.model_dump(mode="json", exclude={"clients", "description"})
    clients = {
        name: {
            "task": entry.name,
            "env": entry.task,
            **{f"kwargs.{key}": value for key, value in entry.kwargs.items()},
            **{
                f"changes.{change.round}.{key}": value
                for change in entry.changes
                for key, value in change.kwargs.items()
            },
        }
        for entry in scenario.clients
        for name in entry.names
    }
    return {
        "run": run or uuid.uuid4().hex,
        "name": run_name(scenario.method, scenario.seed, origin),
        "tags": origin_tags(origin),
        "scenario": scenario.name,
        "description": scenario.description,
        "folder": folder,
        "params": {**dict(_flatten(settings)), "clients": len(clients)},
        "clients": clients,
    }


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys such as `objective.clip` with their values, without empty ones."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != "":
            yield f"{prefix}{key}", value


def _wait(writer: subprocess.Popen[bytes], patience: float) -> None:
    """Wait until the writer ends; after `patience` seconds it goes on by itself."""
    assert writer.stdin is not None
    writer.stdin.close()
    until = time.monotonic() + patience
    while writer.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return lines[-1] if lines else "no reason is known"
