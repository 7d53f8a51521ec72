"""What a run sends to MLflow. The run appends to a spool file; another process sends what the file holds.

    tracker.py      Tracker: the run's side, a line in a file for each round; replay: send what was left
    spool.py        Spool: the file, and how much of it has been sent
    writer.py       the process that reads the spool and sends it
    origin.py       RunOrigin: a run's name and tags: command, commit, engine, host, versions
    probe.py        whether a server takes records, asked before a run begins
    machine.py      how busy the machine is
    mlflow_runs.py  MlflowRuns: a run's records as runs of MLflow, one for the federation and one for each client
    nested_runs.py  NestedRuns: runs of MLflow for a server that is not ours, sent by itself
    groups.py       RunGroup: the parent run of a sweep or a comparison, and the view of its runs
    selection.py    which numbers of a round become metrics
    run_page.py     the text on a run's page
    views.py        charts that an experiment offers
    model_sender.py  ModelSender: the clients' models, with their names, metrics and versions
    model.py        a client's policy as a model of MLflow
    inputs.py       tasks as datasets of MLflow
    refusals.py     what a store will never take
    store.py        Store: where tracked runs go, and how to name it without its password
    ui.py           shows MLflow's pages
    guard.py        ends the server of these pages with the process that started it

The run does not wait for the tracking server: what the server does not take stays in the run's folder, and `replay`
sends it later. Only the writer's process imports mlflow, and
`nested_runs.py`, which has no folder. Begin with tracker.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.runs.tracking.store import Store, default_store, resolve_store
    from grpo_fed.runs.tracking.tracker import Tracker, replay

__all__ = ["Store", "Tracker", "default_store", "replay", "resolve_store"]

MODULES = {
    "Store": "grpo_fed.runs.tracking.store",
    "Tracker": "grpo_fed.runs.tracking.tracker",
    "default_store": "grpo_fed.runs.tracking.store",
    "replay": "grpo_fed.runs.tracking.tracker",
    "resolve_store": "grpo_fed.runs.tracking.store",
}

__getattr__ = lazy_getattr(__name__, MODULES)
