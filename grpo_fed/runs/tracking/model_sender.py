"""Sends the clients' policies to MLflow: models by the names of scenario and client, or folders of adapters."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from grpo_fed.policy.shared_names import POLICIES
from grpo_fed.runs.tracking.refusals import log_if_refused, log_left_out
from grpo_fed.runs.tracking.spool import SendState, Spool

ADAPTERS = "adapters"
"""The folder of a client's adapters, among the files of its run."""
SCORES = {"return": "model/return", "return_before": "model/return_before"}
"""A model's metrics, by the keys of a client's part of `results.json`."""
TAKEN = "RESOURCE_ALREADY_EXISTS"
"""MLflow's code for a name that is registered."""


@final
@dataclass(frozen=True)
class ModelSender:
    """Sends the models of a run that has ended."""

    client: MlflowClient
    spool: Spool
    sent: SendState
    scenario: str
    """The scenario's name."""
    register: bool
    """Whether each model becomes a version of the registered model of its name."""

    def send(self, results: Mapping[str, Any], step: int, time: int) -> None:
        """Send every client's policy that was not sent before.

        results: the part of each client in `results.json`. step: the number of rounds. time: when the run ended.
        """
        for client, run in self.sent.clients.items():
            if client in self.sent.models:
                continue
            adapters = self.spool.folder.parent / POLICIES / client
            if adapters.is_dir():
                with log_if_refused(str(adapters)):
                    self.client.log_artifacts(run, str(adapters), ADAPTERS)
                    self.sent.models[client] = ADAPTERS
            else:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, "model")
                    if _save(self.spool.folder.parent, client, path):
                        self.sent.models[client] = self._send_model(path, client, run, step)
                        self._log_scores(run, self.sent.models[client], results.get(client, {}), step, time)
            self.spool.save_state(self.sent)
        if self.register:
            for client, model in self.sent.models.items():
                if model != ADAPTERS:
                    self._register(model_name(self.scenario, client), model, self.sent.clients[client])

    def _send_model(self, path: Path, client: str, run: str, step: int) -> str:
        """Send a model from its folder to the store, and return its id."""
        assert self.sent.experiment is not None
        name = model_name(self.scenario, client)
        model = self.client.create_logged_model(
            self.sent.experiment, name, run, params={"client": client}, model_type="policy"
        )
        description = Model.load(str(path))
        description.run_id, description.model_uuid, description.model_id = run, model.model_id, model.model_id
        description.artifact_path = model.artifact_location
        description.save(str(path / "MLmodel"))
        self.client.log_model_artifacts(model.model_id, str(path))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self.client.log_outputs(run, [LoggedModelOutput(model.model_id, step)])
        return str(model.model_id)

    def _log_scores(self, run: str, model: str, result: Mapping[str, Any], step: int, time: int) -> None:
        """Log what a client has reached as metrics of its model."""
        metrics = [
            Metric(name, float(result[key]), time, step, model_id=model, run_id=run)
            for key, name in SCORES.items()
            if result.get(key) is not None
        ]
        if metrics:
            with log_if_refused(f"metrics of model {model}"):
                self.client.log_batch(run, metrics=metrics)

    def _register(self, name: str, model: str, run: str) -> None:
        """Make a model a version of the registered model of this name, once."""
        with log_if_refused(f"registered model {name}"):
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != TAKEN:
                    raise
            versions = self.client.search_model_versions(f"name = '{name}' and run_id = '{run}'")
            if not versions:
                self.client.create_model_version(name, f"models:/{model}", run, model_id=model)


def model_name(scenario: str, client: str) -> str:
    """Name a client's model, in letters that MLflow accepts."""
    return re.sub(r"[^\w -]", "-", f"{scenario}-{client}")


def _save(folder: Path, client: str, path: Path) -> bool:
    """Save a client's policy in PyTorch's exported form.

    Returns False for a policy that cannot be exported, as a user's own module may be; the log has the reason.
    """
    from grpo_fed.runs.tracking.model import save_model

    try:
        save_model(folder, client, path)
    except Exception as error:  # noqa: BLE001, a user's module may fail in any way
        log_left_out(f"model of {client}", error)
        return False
    return True
