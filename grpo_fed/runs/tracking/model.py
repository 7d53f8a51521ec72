"""A client's policy as an MLflow model, in PyTorch's exported form."""

from __future__ import annotations

from pathlib import Path

import torch

from grpo_fed.runs.policies import load_network
from grpo_fed.runs.predictor import Predictor, example_observations


def save_model(folder: Path, client: str, path: Path) -> None:
    """Save a client's policy of a run as an MLflow model, in PyTorch's exported form.

    The form holds no pickle and needs none of our code. Whatever a user's module raises is raised from here.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    saved = load_network(folder, client)
    policy = Predictor(saved).eval()
    example = example_observations(saved.task)
    with torch.no_grad():
        signature = infer_signature(example.numpy(), policy(example).numpy())
    mlflow.pytorch.save_model(
        policy,
        str(path),
        input_example=example.numpy(),
        signature=signature,
        serialization_format="pt2",
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
    )
