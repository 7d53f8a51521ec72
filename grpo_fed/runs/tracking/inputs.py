"""A client's task as what MLflow calls a dataset, so that runs can be found by what they were trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

CONTEXT = "mlflow.data.context"
LONGEST = 500
"""Characters of a dataset's name."""


def task_inputs(tasks: Iterable[Mapping[str, Any]]) -> list[DatasetInput]:
    """Make an input of each task, once. tasks: those of clients, as the spool's first record has them.

    The name is that of the environment, with the arguments that it was made with; the digest depends on both.
    """
    inputs = {}
    for task in tasks:
        source = {key: value for key, value in task.items() if key != "task"}
        arguments = ", ".join(f"{key.partition('.')[2]}={value}" for key, value in source.items() if "." in key)
        name = f"{source['env']}({arguments})" if arguments else str(source["env"])
        text = json.dumps(source, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        dataset = Dataset(name[:LONGEST], digest, "task", text)
        inputs[digest] = DatasetInput(dataset, [InputTag(CONTEXT, "training")])
    return list(inputs.values())
