"""Sends a run's records to MLflow: a run of MLflow for the federation and one for each client.

`model_sender.py`, `inputs.py` and `refusals.py` are parts of it. Besides these and `nested_runs.py` no module imports
mlflow; `ui.py` starts its server as a command.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.store.db import utils as database

from grpo_fed.policy.shared_names import CHECKPOINTS
from grpo_fed.runs.colours import pick_colour
from grpo_fed.runs.folder import EPISODES, FIGURES, REPORT, ROUNDS, SCENARIO, SUMMARY
from grpo_fed.runs.markdown import escape_markdown, plain
from grpo_fed.runs.results import ENDED, RESULTS
from grpo_fed.runs.serialisation import from_json
from grpo_fed.runs.tracking import run_page
from grpo_fed.runs.tracking.groups import RunGroup, find_parent
from grpo_fed.runs.tracking.inputs import task_inputs
from grpo_fed.runs.tracking.machine import MachineSample
from grpo_fed.runs.tracking.model_sender import ModelSender
from grpo_fed.runs.tracking.refusals import log_if_refused, log_left_out
from grpo_fed.runs.tracking.selection import (
    MOST_CLIENTS,
    client_metrics,
    client_quantiles,
    is_same_round,
    metric_keys,
    param_name,
    tracked_metrics,
    with_first_charts,
)
from grpo_fed.runs.tracking.spool import SendState, Spool, SpoolRecord, hold_lock
from grpo_fed.runs.tracking.store import Store, resolve_store
from grpo_fed.runs.tracking.views import CLIENT, FEDERATION, GROUP, ROLE, has_fewer_charts, make_view_tags, make_views
from grpo_fed.scenario.methods import METHODS

RUN = "grpo_fed.run"
"""The tag with the run's unique name."""
CLIENT_NAME = "grpo_fed.client"
"""The tag with the client's name."""
PAGE = "mlflow.note.content"
"""MLflow's tag with the text on a run's page."""
STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
FILES = (SCENARIO, RESULTS, ROUNDS, SUMMARY, REPORT)
FOLDERS = (FIGURES, EPISODES, CHECKPOINTS)
MAX_FOLDER_BYTES = 200_000_000
"""The size up to which a folder is sent: checkpoints of large policies are not."""
BATCH, PARAMS = 1000, 100
"""Metrics and parameters that one request may hold."""
database.MAX_RETRY_COUNT = 0
"""No retries of mlflow's own, which block for minutes, since the writer sends again itself."""
LOCK_PATIENCE = 60.0
"""Seconds that another run may take to create a new database."""


@final
class MlflowRuns:
    """Sends records to MLflow. Sending a record again changes nothing."""

    def __init__(self, spool: Spool, shown: str) -> None:
        """Connect to the store that the environment names. shown: its address as in `Store.uri`, without a password."""
        store = resolve_store(None)
        assert store is not None, "the tracker has put a store into the environment"
        self.store, self.spool = store, spool
        with _one_at_a_time(store):
            mlflow.set_tracking_uri(store.environment["MLFLOW_TRACKING_URI"])
            self.client = MlflowClient()
            self.client.search_experiments(max_results=1)  # creates a new database's tables; raises without a server
        first = next(spool.read(), None)
        self.begin: Mapping[str, Any] = {} if first is None else first.content
        self.began = 0 if first is None else first.time
        """When the run began, in milliseconds since 1970."""
        self.sent = spool.load_state(shown)
        if self.sent.run not in (None, self.begin.get("run", self.sent.run)):
            self.sent = SendState(shown)
        self.lines: dict[int, Mapping[str, Any]] = {}
        """The lines that were sent, by round."""
        self.metrics: set[str] = set()
        """The keys of all metrics in lines of rounds that were sent."""
        self.latest: Mapping[str, Any] | None = None
        self.has_ended = False
        """Whether the last record says how the run ended."""
        for record in spool.read(most=self.sent.position):
            if record.end <= self.sent.position:
                self._remember(record)

    @property
    def _parent(self) -> str:
        """The id of the federation's run."""
        assert self.sent.parent is not None, "the first record has been sent"
        return self.sent.parent

    def send(self, records: Sequence[SpoolRecord]) -> None:
        """Send one record, or several rounds."""
        match records[0].kind:
            case "begin":
                self._send_begin(records[0])
            case "resume":
                self._for_each_run(lambda run: self.client.update_run(run, status="RUNNING"))
            case "round":
                self._send_rounds(records)
            case "end":
                self._send_end(records[0])
        for record in records:
            self._remember(record)

    def send_machine(self, samples: Sequence[MachineSample]) -> None:
        """Send how busy the machine was, by seconds since the run began."""
        metrics = [
            Metric(key, value, sample.time, max(0, (sample.time - self.began) // 1000))
            for sample in samples
            for key, value in sample.values.items()
        ]
        for start in range(0, len(metrics), BATCH):
            with log_if_refused(f"system metrics of run {self._parent}"):
                self.client.log_batch(self._parent, metrics=metrics[start : start + BATCH])

    def close(self) -> None:
        """Finish, when no record will follow: a run without a record of its end was killed."""
        if self.sent.parent is not None and not self.has_ended and not self.sent.done:
            self._set_tags(self._parent, {PAGE: run_page.page_if_killed(self.begin, self.latest)})
            self._for_each_run(lambda run: self.client.set_terminated(run, "KILLED"))
        if self.sent.done and self.spool.path.is_file():
            self.sent = replace(self.sent, position=0)
            self.spool.save_state(self.sent)
            self.spool.path.unlink()

    def _remember(self, record: SpoolRecord) -> None:
        """Take note of a record that has been sent."""
        self.has_ended = record.kind == "end"
        if record.kind == "round":
            self.latest = record.content["line"]
            self.metrics |= metric_keys([record.content["line"]])
            self.lines[record.content["line"]["round"]] = record.content["line"]

    # The beginning -----------------------------------------------------------------------------------------------

    def _send_begin(self, record: SpoolRecord) -> None:
        """Create the experiment and the runs that do not exist yet."""
        begin, self.began = record.content, record.time
        self.begin = begin
        self.sent.run, self.sent.done = begin["run"], False
        self.sent.experiment = self._find_experiment(begin)
        existing = self._existing_runs(begin["run"])
        params = begin["params"]
        is_new = self.sent.parent is None
        if self.sent.parent is None:
            name = begin.get("name") or f"{params['method']} seed {params['seed']}"
            group = None if begin.get("group") is None else from_json(RunGroup, begin["group"])
            colour = pick_colour(_colour_index(params["method"]))  # since federations are compared by their methods
            self.sent.parent = existing.get("") or self._create_run(
                record.time, (group and group.label) or name, FEDERATION, "", colour, group
            )
        self.spool.save_state(self.sent)
        self._log_params(self._parent, {**params, "folder": begin["folder"]})
        self._set_tags(self._parent, {**begin.get("tags", {}), PAGE: run_page.page_while_running(begin, None)})
        self._log_inputs(self._parent, begin["clients"].values())
        if len(begin["clients"]) <= MOST_CLIENTS:
            for index, (client, task) in enumerate(begin["clients"].items()):
                if client not in self.sent.clients:
                    run = existing.get(client) or self._create_run(
                        record.time, client, CLIENT, client, pick_colour(index)
                    )
                    self.sent.clients[client] = run
                self._log_params(self.sent.clients[client], {"client": client, "method": params["method"], **task})
                self._log_inputs(self.sent.clients[client], [task])
            self.spool.save_state(self.sent)
        if not is_new:
            self._for_each_run(lambda run: self.client.update_run(run, status="RUNNING"))
        self._send_file(self.spool.folder.parent / SCENARIO)

    def _find_experiment(self, begin: Mapping[str, Any]) -> str:
        """Return the id of the experiment with the scenario's name, and create or restore it if need be."""
        experiment = self.client.get_experiment_by_name(begin["scenario"])
        if experiment is not None:
            if experiment.lifecycle_stage != "active":
                self.client.restore_experiment(experiment.experiment_id)
            return str(experiment.experiment_id)
        artifacts = self.store.artifacts
        location = None if artifacts is None else (artifacts / begin["scenario"]).as_uri()
        tags = {"mlflow.experimentKind": "custom_model_development", PAGE: escape_markdown(plain(begin["description"]))}
        return str(self.client.create_experiment(begin["scenario"], location, tags))

    def _existing_runs(self, name: str) -> dict[str, str]:
        """Find the ids of runs that a killed writer has created but not stored, by client, "" for the federation.

        name: the run's unique name.
        """
        assert self.sent.experiment is not None
        runs: dict[str, str] = {}
        token = None
        while True:
            page = self.client.search_runs([self.sent.experiment], f"tags.`{RUN}` = '{name}'", page_token=token)
            runs |= {run.data.tags.get(CLIENT_NAME, ""): run.info.run_id for run in page}
            if not (token := page.token):
                return runs

    def _create_run(
        self, began: int, name: str, role: str, client: str, colour: str, group: RunGroup | None = None
    ) -> str:
        """Create a run and return its id. began: milliseconds since 1970. group: whose parent it is below."""
        tags = {RUN: self.begin["run"], ROLE: role, "mlflow.runColor": colour}
        if group is not None:
            assert self.sent.experiment is not None, "the experiment was found"
            tags |= {GROUP: group.unique, "mlflow.parentRunId": find_parent(self.client, self.sent.experiment, group)}
        if role == CLIENT:
            tags |= {CLIENT_NAME: client, "mlflow.parentRunId": self._parent}
        assert self.sent.experiment is not None
        return str(self.client.create_run(self.sent.experiment, began, tags, name).info.run_id)

    def _log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Log a run's parameters."""
        entries = [Param(*each) for each in {param_name(key): str(value) for key, value in params.items()}.items()]
        for start in range(0, len(entries), PARAMS):
            with log_if_refused(f"parameters of run {run}"):
                self.client.log_batch(run, params=entries[start : start + PARAMS])

    def _log_inputs(self, run: str, tasks: Iterable[Mapping[str, Any]]) -> None:
        """Log tasks as a run's datasets."""
        with log_if_refused(f"tasks of run {run}"):
            self.client.log_inputs(run, datasets=task_inputs(tasks))

    # Rounds --------------------------------------------------------------------------------------------------------

    def _send_rounds(self, records: Sequence[SpoolRecord]) -> None:
        """Send rounds, with a request or a few for each run."""
        new = [record for record in records if not self._was_sent(record.content["line"])]
        metrics: dict[str, list[Metric]] = {}
        for record in new:
            line = record.content["line"]
            self._add_newcomers(line, record.time)
            whole = with_first_charts(tracked_metrics(line)) | (client_quantiles(line) if not self.sent.clients else {})
            metrics.setdefault(self._parent, []).extend(_make_metrics(whole, record.time, line["round"]))
            for client, values in client_metrics(line):
                if client in self.sent.clients:
                    run = self.sent.clients[client]
                    metrics.setdefault(run, []).extend(
                        _make_metrics(with_first_charts(values), record.time, line["round"])
                    )
        for run, points in metrics.items():
            for start in range(0, len(points), BATCH):
                with log_if_refused(f"metrics of run {run}"):
                    self.client.log_batch(run, metrics=points[start : start + BATCH])
        if new:
            line = new[-1].content["line"]
            self._set_tags(self._parent, {PAGE: run_page.page_while_running(self.begin, line)})
            metrics_now = metric_keys(record.content["line"] for record in new)
            if line["round"] > 0 and (self.latest is None or self.latest["round"] == 0 or metrics_now - self.metrics):
                self._save_views(self.metrics | metrics_now)  # some metrics begin late: rho after rounds of evidence

    def _add_newcomers(self, line: Mapping[str, Any], time: int) -> None:
        """Make runs for clients that have joined since the run began; none where clients have no runs of their own."""
        new = [client for client in line["clients"] if client not in self.sent.clients] if self.sent.clients else []
        for client in new[: max(0, MOST_CLIENTS - len(self.sent.clients))]:
            colour = pick_colour(len(self.sent.clients))
            self.sent.clients[client] = self._create_run(time, client, CLIENT, client, colour)
            method = self.begin["params"]["method"]
            self._log_params(self.sent.clients[client], {"client": client, "method": method, "joined": line["round"]})
            self.spool.save_state(self.sent)

    def _was_sent(self, line: Mapping[str, Any]) -> bool:
        """Return whether the same line was sent: a resumed run trains some rounds again, with the same outcome."""
        sent = self.lines.get(line["round"])
        return sent is not None and is_same_round(sent, line)

    def _save_views(self, metrics: set[str]) -> None:
        """Save views with charts of these metrics; a view that a user has changed stays as it is."""
        assert self.sent.experiment is not None
        existing = self.client.get_experiment(self.sent.experiment).tags
        for key, value in make_view_tags(make_views(sorted(metrics)), time.time_ns() // 1_000_000).items():
            if key not in existing or has_fewer_charts(existing[key], value):
                with log_if_refused(f"saved view {key}"):
                    self.client.set_experiment_tag(self.sent.experiment, key, value)

    # The end -------------------------------------------------------------------------------------------------------

    def _send_end(self, record: SpoolRecord) -> None:
        """Send the results, the files and the models, and end the runs."""
        document, status = record.content["document"], record.content["status"]
        self._set_tags(self._parent, {PAGE: run_page.page_at_end(self.begin, document, status)})
        if document is not None:
            for client, result in document["clients"].items():
                if client in self.sent.clients:
                    tags = {"personal_groups": ", ".join(result.get("personal_groups", ())) or "none"}
                    if result.get("departures"):
                        tags["departures"] = "; ".join(run_page.describe_departures(result))
                    if clusters := result.get("clusters"):
                        tags["clusters"] = ", ".join(f"{block} {cluster}" for block, cluster in clusters.items())
                    self._set_tags(self.sent.clients[client], {**tags, PAGE: run_page.client_page(result)})
        self._send_files(document)
        if record.content["models"] and self.sent.clients:
            results = {} if document is None else document["clients"]
            rounds = max(self.lines, default=0)
            register = bool(record.content.get("register"))
            sender = ModelSender(self.client, self.spool, self.sent, self.begin["scenario"], register)
            sender.send(results, rounds, record.time)
        self._for_each_run(lambda run: self.client.set_terminated(run, STATUS[status], record.time))
        self.sent.done = status in ENDED

    def _send_files(self, document: Mapping[str, Any] | None) -> None:
        """Send the files of the run's folder, and tables: of examples, and of the clients if they have no runs."""
        folder = self.spool.folder.parent
        for name in FILES:
            self._send_file(folder / name)
        for name in FOLDERS:
            if any(path.is_symlink() for path in (folder / name, *(folder / name).rglob("*"))):
                log_left_out(f"{folder / name}", ValueError("there are links in it, which are not followed"))
                continue
            files = [path for path in (folder / name).rglob("*") if path.is_file()]
            if files and sum(path.stat().st_size for path in files) <= MAX_FOLDER_BYTES:
                with log_if_refused(f"{folder / name}"):
                    self.client.log_artifacts(self._parent, str(folder / name), name)
        tables = run_page.make_tables(folder, self.begin, document if not self.sent.clients else None)
        for name, table in tables.items():
            with log_if_refused(name):  # mlflow's log_table would append to what was sent before
                self.client.log_text(self._parent, json.dumps(table), name)
        if tables:
            tag = json.dumps([{"path": name, "type": "table"} for name in tables])
            self._set_tags(self._parent, {"mlflow.loggedArtifacts": tag})

    def _send_file(self, path: Path) -> None:
        if path.is_symlink():
            log_left_out(str(path), ValueError("it is a link, which is not followed"))
        elif path.is_file():
            with log_if_refused(str(path)):
                self.client.log_artifact(self._parent, str(path))

    # All runs ------------------------------------------------------------------------------------------------------

    def _for_each_run(self, do: Callable[[str], Any]) -> None:
        """Call `do` with the id of the federation's run and of each client's."""
        for run in [self._parent, *self.sent.clients.values()]:
            with log_if_refused(f"run {run}"):
                do(run)

    def _set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        with log_if_refused(f"tags of run {run}"):
            self.client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])


def _colour_index(method: str) -> int:
    """Return the number of a method's colour; a user's own method always has the same one too."""
    names = list(METHODS)
    return names.index(method) if method in METHODS else len(names) + zlib.crc32(method.encode()) % len(names)


def _make_metrics(values: Mapping[str, float], timestamp: int, step: int) -> list[Metric]:
    return [Metric(name, value, timestamp, step) for name, value in values.items()]


@contextmanager
def _one_at_a_time(store: Store) -> Iterator[None]:
    """Let one run at a time create the tables of a new database."""
    if store.file is None:
        yield
        return
    store.file.parent.mkdir(parents=True, exist_ok=True)
    with store.file.with_name(f".{store.file.name}.lock").open("w") as file, hold_lock(file.fileno(), LOCK_PATIENCE):
        yield
