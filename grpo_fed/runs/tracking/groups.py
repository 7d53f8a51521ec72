"""Several runs under a parent of their own in MLflow: those of a sweep or of a comparison.

The group's name is in a file of its folder, so that all processes that share the folder share the parent. Whichever
run is sent first creates the parent in the store. At the end of the sweep a process writes the table on its page, with
a view of the experiment that shows these runs alone; `python -m grpo_fed.runs.tracking.groups` by `finish_group`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from grpo_fed.runs.files import write_atomic
from grpo_fed.runs.serialisation import from_json, read_json
from grpo_fed.runs.tracking.spool import hold_lock
from grpo_fed.runs.tracking.store import Store
from grpo_fed.runs.tracking.tracker import QUIET
from grpo_fed.runs.tracking.views import GROUP, ROLE, make_group_view, make_view_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

GROUP_FILE = "group.json"
"""The file in the group's folder with its name."""
GROUP_ROLE = "group"
"""The role of the parent run."""
PAGE = "mlflow.note.content"
LOCK_PATIENCE = 60.0
"""Seconds that another process may take to create the parent."""
TIMEOUT = 180.0
"""Seconds that the end of a group may take to be sent."""

GroupKind: TypeAlias = Literal["sweep", "compare"]


@dataclass(frozen=True)
class RunGroup:
    """Names the group that a run belongs to."""

    unique: str
    kind: str
    """`sweep` or `compare`."""
    experiment: str
    """The name of the experiment: that of the scenario."""
    folder: str
    """The group's folder, absolute."""
    label: str = ""
    """What tells this run from the others of the group."""

    def with_label(self, label: str) -> RunGroup:
        """Return it for a run of it."""
        return replace(self, label=label)

    @property
    def name(self) -> str:
        """The name of the parent run."""
        return f"{self.kind} {Path(self.folder).name}"


def open_group(folder: Path, kind: GroupKind, experiment: str) -> RunGroup:
    """Read the group of a folder, or make it; all processes that call this at once get the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / GROUP_FILE
    with (folder / f".{GROUP_FILE}.lock").open("w") as file, hold_lock(file.fileno(), LOCK_PATIENCE):
        if path.is_file():
            return replace(from_json(RunGroup, read_json(path)), folder=str(folder.absolute()))
        group = RunGroup(uuid.uuid4().hex, kind, experiment, str(folder.absolute()))
        write_atomic(path, json.dumps(asdict(group), indent=2) + "\n")
        return group


def find_parent(client: MlflowClient, experiment: str, group: RunGroup) -> str:
    """Return the id of a group's parent run in an experiment, which is created once.

    experiment: its id.
    """
    with (Path(group.folder) / ".parent.lock").open("w") as file, hold_lock(file.fileno(), LOCK_PATIENCE):
        query = f"tags.`{GROUP}` = '{group.unique}' and tags.`{ROLE}` = '{GROUP_ROLE}'"
        found = client.search_runs([experiment], query, max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {GROUP: group.unique, ROLE: GROUP_ROLE, "grpo_fed.kind": group.kind}
        run = str(client.create_run(experiment, None, tags, group.name).info.run_id)
        client.set_tag(run, PAGE, f"**Has begun**: {group.name}.")
        return run


def finish_group(group: RunGroup, store: Store, folder: Path, page: str, metrics: Mapping[str, float]) -> str:
    """Send the group's page, metrics and files, and end its parent run; return what went wrong, empty if nothing did.

    folder: has the files to send, `*.json` and `*.md`. The same call sends all of it again.
    """
    content = {"group": asdict(group), "page": page, "metrics": dict(metrics), "folder": str(folder)}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "grpo_fed.runs.tracking.groups"],
            input=json.dumps(content),
            capture_output=True,
            text=True,
            env={**os.environ, **QUIET, **store.environment, "PYTHONPATH": path},
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{store.uri} did not take the page of {group.name} in {TIMEOUT:.0f} s; the same command sends it again"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason is known"])[-1]
        return f"{store.uri} did not take the page of {group.name}: {last}; the same command sends it again"
    return ""


def main(content: Mapping[str, Any]) -> None:
    """Send the end of a group. content: as `finish_group` writes it."""
    import time

    import mlflow
    from mlflow import MlflowClient
    from mlflow.entities import Metric, RunTag

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    client, group = MlflowClient(), RunGroup(**content["group"])
    experiment = client.get_experiment_by_name(group.experiment)
    if experiment is None:
        raise ValueError(f"there is no experiment {group.experiment}: no run of the group was sent")
    parent, now = find_parent(client, experiment.experiment_id, group), time.time_ns() // 1_000_000
    client.log_batch(
        parent,
        metrics=[Metric(key, value, now, 0) for key, value in content["metrics"].items()],
        tags=[RunTag(PAGE, content["page"][:8000])],
    )
    for file in sorted(Path(content["folder"]).glob("*.json")) + sorted(Path(content["folder"]).glob("*.md")):
        if file.name != GROUP_FILE and not file.is_symlink():
            client.log_artifact(parent, str(file))
    runs = client.search_runs([experiment.experiment_id], f"tags.`{GROUP}` = '{group.unique}'", max_results=1000)
    keys = sorted({key for run in runs for key in run.data.metrics})
    view = make_group_view(group.unique, group.name, keys)
    for key, value in make_view_tags([view], now).items():
        client.set_experiment_tag(experiment.experiment_id, key, value)
    client.set_terminated(parent, "FINISHED")


if __name__ == "__main__":
    main(json.loads(sys.stdin.read()))
