"""The runs that MLflow has of ours, one for the federation, one for each client; nothing else imports mlflow."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature
from mlflow.store.db import utils as database

from grpo_fed.runs.colours import client_colour
from grpo_fed.runs.tracking import run_page as telling
from grpo_fed.runs.tracking.selection import (
    MOST_CLIENTS,
    client_metrics,
    names_in,
    same_round,
    spread_of,
    tracked_metrics,
)
from grpo_fed.runs.tracking.spool import SendState, Spool, SpoolRecord, exclusively
from grpo_fed.runs.tracking.store import Store, resolve_store
from grpo_fed.runs.tracking.views import CLIENT, FEDERATION, ROLE, has_fewer_charts, tags_of, views_for
from grpo_fed.scenario.methods import METHODS

RUN = "grpo_fed.run"
NOTE = "mlflow.note.content"
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
FILES = ("scenario.toml", "results.json", "rounds.jsonl", "summary.md")
FOLDERS = ("figures", "episodes", "checkpoints")
LARGEST = 200_000_000
"""Bytes of a folder that is still kept with the run: checkpoints of large policies are not."""
MODEL = "policy"
"""A client's model, `runs:/<client's run>/policy`."""
REFUSED = {400, 404, 413, 422}
"""What a server answers to something wrong; all else may go better another time."""
BATCH, PARAMS = 1000, 100
"""What one request may hold."""
database.MAX_RETRY_COUNT = 0
"""Its own retries take minutes in which nothing else can be done, and the spool tries again anyway."""
LOCK = 60.0
"""Seconds that another run may take to make a new database."""


@final
class MlflowRuns:
    """Sends records; a second time they change nothing."""

    def __init__(self, spool: Spool, shown: str) -> None:
        """`shown` as in `Store.uri`; the environment has what else is needed."""
        store = resolve_store(None)
        assert store is not None
        self.store, self.spool = store, spool
        with _alone(store):
            mlflow.set_tracking_uri(store.environment["MLFLOW_TRACKING_URI"])
            self.client = MlflowClient()
            self.client.search_experiments(max_results=1)  # makes a new database's tables, or finds nobody there
        first = next(spool.read(), None)
        self.begin: Mapping[str, Any] = {} if first is None else first.content
        self.sent = spool.load_state(shown)
        if self.sent.run not in (None, self.begin.get("run", self.sent.run)):
            self.sent = SendState(shown)
        self.lines: dict[int, Mapping[str, Any]] = {}
        """What was sent, by round."""
        self.latest: Mapping[str, Any] | None = None
        self.ended = False
        """Whether the last record said how the run ended."""
        for record in spool.read(most=self.sent.position):
            if record.end <= self.sent.position:
                self._remember(record)

    @property
    def _parent(self) -> str:
        assert self.sent.parent is not None
        return self.sent.parent

    def send(self, records: Sequence[SpoolRecord]) -> None:
        """One record, or several rounds."""
        match records[0].kind:
            case "begin":
                self._begin(records[0])
            case "resume":
                self._each(lambda run: self.client.update_run(run, status="RUNNING"))
            case "round":
                self._rounds(records)
            case "end":
                self._end(records[0])
        for record in records:
            self._remember(record)

    def close(self) -> None:
        """There is no more to come: a run that did not say how it ended was killed."""
        if self.sent.parent is not None and not self.ended and not self.sent.done:
            self._tag(self._parent, {NOTE: telling.page_if_killed(self.begin, self.latest)})
            self._each(lambda run: self.client.set_terminated(run, "KILLED"))
        if self.sent.done and self.spool.path.is_file():
            self.sent = replace(self.sent, position=0)
            self.spool.save_state(self.sent)
            self.spool.path.unlink()

    def _remember(self, record: SpoolRecord) -> None:
        self.ended = record.kind == "end"
        if record.kind == "round":
            self.latest = record.content["line"]
            self.lines[record.content["line"]["round"]] = record.content["line"]

    # The beginning -----------------------------------------------------------------------------------------------

    def _begin(self, record: SpoolRecord) -> None:
        begin = self.begin = record.content
        self.sent.run, self.sent.done = begin["run"], False
        self.sent.experiment = self._experiment(begin)
        known = self._known(begin["run"])
        params = begin["params"]
        is_new = self.sent.parent is None
        if self.sent.parent is None:
            name = f"{params['method']} seed {params['seed']}"
            shade = client_colour(_place(params["method"]))  # where runs are compared, they are by method
            self.sent.parent = known.get("") or self._create(record.time, name, FEDERATION, "", shade)
        self.spool.save_state(self.sent)
        self._describe(self._parent, {**params, "folder": begin["folder"]})
        self._tag(self._parent, {NOTE: telling.page_while_running(begin, None)})
        if len(begin["clients"]) <= MOST_CLIENTS:
            for number, (client, about) in enumerate(begin["clients"].items()):
                if client not in self.sent.clients:
                    run = known.get(client) or self._create(record.time, client, CLIENT, client, client_colour(number))
                    self.sent.clients[client] = run
                self._describe(self.sent.clients[client], {"client": client, "method": params["method"], **about})
            self.spool.save_state(self.sent)
        if not is_new:
            self._each(lambda run: self.client.update_run(run, status="RUNNING"))
        self._file(self.spool.folder.parent / "scenario.toml")

    def _experiment(self, begin: Mapping[str, Any]) -> str:
        """That of the scenario, by its name."""
        found = self.client.get_experiment_by_name(begin["scenario"])
        if found is not None:
            if found.lifecycle_stage != "active":
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        artifacts = self.store.artifacts
        location = None if artifacts is None else (artifacts / begin["scenario"]).as_uri()
        tags = {"mlflow.experimentKind": "custom_model_development", NOTE: begin["description"]}
        return str(self.client.create_experiment(begin["scenario"], location, tags))

    def _known(self, run: str) -> dict[str, str]:
        """By client, "" for the federation: run ids that were made but not written down before a kill."""
        assert self.sent.experiment is not None
        found: dict[str, str] = {}
        token = None
        while True:
            page = self.client.search_runs([self.sent.experiment], f"tags.`{RUN}` = '{run}'", page_token=token)
            found |= {one.data.tags.get("grpo_fed.client", ""): one.info.run_id for one in page}
            if not (token := page.token):
                return found

    def _create(self, at: int, name: str, role: str, client: str, colour: str) -> str:
        tags = {RUN: self.begin["run"], ROLE: role, "mlflow.runColor": colour}
        if role == CLIENT:
            tags |= {"grpo_fed.client": client, "mlflow.parentRunId": self._parent}
        assert self.sent.experiment is not None
        return str(self.client.create_run(self.sent.experiment, at, tags, name).info.run_id)

    def _describe(self, run: str, params: Mapping[str, Any]) -> None:
        every = [Param(name, str(value)) for name, value in params.items()]
        for start in range(0, len(every), PARAMS):
            with _forgiving(f"parameters of run {run}"):
                self.client.log_batch(run, params=every[start : start + PARAMS])

    # Rounds --------------------------------------------------------------------------------------------------------

    def _rounds(self, records: Sequence[SpoolRecord]) -> None:
        """Many rounds in a few requests: one for each run."""
        fresh = [one for one in records if not self._is_known(one.content["line"])]
        metrics: dict[str, list[Metric]] = {}
        for record in fresh:
            line = record.content["line"]
            whole = tracked_metrics(line) | (spread_of(line) if not self.sent.clients else {})
            metrics.setdefault(self._parent, []).extend(_metrics(whole, record.time, line["round"]))
            for client, own in client_metrics(line):
                if client in self.sent.clients:
                    run = self.sent.clients[client]
                    metrics.setdefault(run, []).extend(_metrics(own, record.time, line["round"]))
        for run, every in metrics.items():
            for start in range(0, len(every), BATCH):
                with _forgiving(f"metrics of run {run}"):
                    self.client.log_batch(run, metrics=every[start : start + BATCH])
        if fresh:
            line = fresh[-1].content["line"]
            self._tag(self._parent, {NOTE: telling.page_while_running(self.begin, line)})
            if line["round"] > 0 and (self.latest is None or self.latest["round"] == 0):
                self._views(names_in(one.content["line"] for one in fresh))

    def _is_known(self, line: Mapping[str, Any]) -> bool:
        """A run that was resumed does rounds again, and comes to the same."""
        before = self.lines.get(line["round"])
        return before is not None and same_round(before, line)

    def _views(self, metrics: set[str]) -> None:
        """For these metrics; a view that a user has made their own stays as it is."""
        assert self.sent.experiment is not None
        there = self.client.get_experiment(self.sent.experiment).tags
        for key, value in tags_of(views_for(sorted(metrics)), time.time_ns() // 1_000_000).items():
            if key not in there or has_fewer_charts(there[key], value):
                with _forgiving(f"saved view {key}"):
                    self.client.set_experiment_tag(self.sent.experiment, key, value)

    # The end -------------------------------------------------------------------------------------------------------

    def _end(self, record: SpoolRecord) -> None:
        document, status = record.content["document"], record.content["status"]
        self._tag(self._parent, {NOTE: telling.page_at_end(self.begin, document, status)})
        if document is not None:
            for client, one in document["clients"].items():
                if client in self.sent.clients:
                    tags = {"personal_groups": ", ".join(one.get("personal_groups", ())) or "none"}
                    if clusters := one.get("clusters"):
                        tags["clusters"] = ", ".join(f"{block} {number}" for block, number in clusters.items())
                    self._tag(self.sent.clients[client], {**tags, NOTE: telling.client_text(one)})
        self._files(document)
        if record.content["models"] and self.sent.clients:
            self._models(len(self.lines))
        self._each(lambda run: self.client.set_terminated(run, STATUS[status], record.time))
        self.sent.done = status == "finished"

    def _files(self, document: Mapping[str, Any] | None) -> None:
        folder = self.spool.folder.parent
        for name in FILES:
            self._file(folder / name)
        for name in FOLDERS:
            files = [path for path in (folder / name).rglob("*") if path.is_file()]
            if files and sum(path.stat().st_size for path in files) <= LARGEST:
                with _forgiving(f"{folder / name}"):
                    self.client.log_artifacts(self._parent, str(folder / name), name)
        if document is not None and not self.sent.clients:
            with _forgiving("clients.json"):
                self.client.log_text(self._parent, json.dumps(telling.clients_table(document)), "clients.json")
                tag = json.dumps([{"path": "clients.json", "type": "table"}])
                self.client.set_tag(self._parent, "mlflow.loggedArtifacts", tag)

    def _file(self, path: Path) -> None:
        if path.is_file():
            with _forgiving(str(path)):
                self.client.log_artifact(self._parent, str(path))

    def _models(self, step: int) -> None:
        """Every client's policy."""
        for client, run in self.sent.clients.items():
            if client not in self.sent.models:
                with tempfile.TemporaryDirectory() as folder:
                    if _export(self.spool.folder.parent, client, Path(folder, "model")):
                        self.sent.models[client] = self._model(Path(folder, "model"), client, run, step)
                self.spool.save_state(self.sent)

    def _model(self, path: Path, client: str, run: str, step: int) -> str:
        """Give the store a model that was written down; its id."""
        assert self.sent.experiment is not None
        made = self.client.create_logged_model(
            self.sent.experiment, MODEL, run, params={"client": client}, model_type="policy"
        )
        about = Model.load(str(path))
        about.run_id, about.model_uuid, about.model_id = run, made.model_id, made.model_id
        about.artifact_path = made.artifact_location
        about.save(str(path / "MLmodel"))
        self.client.log_model_artifacts(made.model_id, str(path))
        self.client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
        self.client.log_outputs(run, [LoggedModelOutput(made.model_id, step)])
        return str(made.model_id)

    # All runs ------------------------------------------------------------------------------------------------------

    def _each(self, do: Callable[[str], Any]) -> None:
        """The federation's and the clients'."""
        for run in [self._parent, *self.sent.clients.values()]:
            with _forgiving(f"run {run}"):
                do(run)

    def _tag(self, run: str, tags: Mapping[str, str]) -> None:
        with _forgiving(f"tags of run {run}"):
            self.client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])


def _place(method: str) -> int:
    """Of a method's colour; a user's own has always the same one too."""
    names = list(METHODS)
    return names.index(method) if method in METHODS else len(names) + zlib.crc32(method.encode()) % len(names)


def _metrics(values: Mapping[str, float], at: int, step: int) -> list[Metric]:
    return [Metric(name, value, at, step) for name, value in values.items()]


def _export(folder: Path, client: str, to: Path) -> bool:
    """Write a client's policy in PyTorch's exported form, which holds no pickle and needs none of our code.

    False for one that cannot be written so, as a user's own module may be; the log says why.
    """
    import mlflow.pytorch
    import torch

    from grpo_fed.runs.policies import load_policy
    from grpo_fed.runs.tracking.model import Predictor

    try:
        saved = load_policy(folder, client)
        policy = Predictor(saved).eval()
        example = torch.zeros(2, saved.task.observation_size)  # of one alone the export would take the 1 for granted
        with torch.no_grad():
            signature = infer_signature(example.numpy(), policy(example).numpy())
        mlflow.pytorch.save_model(
            policy,
            str(to),
            input_example=example.numpy(),
            signature=signature,
            serialization_format="pt2",
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
        )
    except Exception as error:  # noqa: BLE001, a user's module may fail in any way
        _left_out(f"model of {client}", error)
        return False
    return True


@contextmanager
def _forgiving(what: str) -> Iterator[None]:
    """What will be refused however often it is sent is told in the log; all else is raised, to be tried again."""
    try:
        yield
    except MlflowException as error:
        code: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
        if code not in REFUSED:
            raise
        _left_out(what, error)


def _left_out(what: str, error: Exception) -> None:
    print(f"left out: {what}: {type(error).__name__}: {error}", file=sys.stderr)


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Two runs that begin at once must not both make a new database's tables."""
    if store.file is None:
        yield
        return
    store.file.parent.mkdir(parents=True, exist_ok=True)
    with store.file.with_name(f".{store.file.name}.lock").open("w") as file, exclusively(file.fileno(), LOCK):
        yield
