"""Writes a network as a computation graph: ONNX, TorchScript, or PyTorch's exported form.

The graph takes observations [B, D] float32 as the environment gives them, flattened; the client's normaliser is in it.
It returns the likeliest actions as the environment takes them, and the parameters of their distribution.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from grpo_fed.runs.policies import LoadedPolicy
from grpo_fed.runs.predictor import DistributionPredictor, Predictor, example_observations
from grpo_fed.scenario.extras import write_install_command
from grpo_fed.scenario.importing import describe_exception

OBSERVATION = "observation"
"""The name of a graph's input."""
ONNX_PACKAGES = ("onnx", "onnxscript")


def export_graph(saved: LoadedPolicy, path: Path, form: str) -> None:
    """Write a policy's graph to a file. form: a key of `GRAPHS`.

    ValueError if a package is missing, or the policy, which may be a user's module, cannot be written in this form.
    """
    if form == "onnx" and any(importlib.util.find_spec(package) is None for package in ONNX_PACKAGES):
        raise ValueError(f"--to onnx needs the packages onnx and onnxscript: {write_install_command('onnx')}")
    policy = DistributionPredictor(Predictor(saved).eval()).eval()
    example = example_observations(saved.task)
    # with gradients the activations are torch's own; without, they may write over their arguments by way of numpy
    with torch.enable_grad(), _quiet():
        try:
            GRAPHS[form](policy, example, path)
        except Exception as error:
            others = " or ".join(other for other in (*GRAPHS, "safetensors") if other != form)
            reason = describe_exception(error).splitlines()[0]
            where = f"client {saved.task.client}: its policy cannot be written with --to {form}"
            raise ValueError(f"{where}: {reason}; use --to {others}") from error


def _write_onnx(policy: DistributionPredictor, example: torch.Tensor, path: Path) -> None:
    program = torch.onnx.export(
        policy,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[OBSERVATION],
        output_names=list(policy.outputs),
        verbose=False,
    )
    assert program is not None, "the exporter for graphs of torch.export returns a program"
    program.save(str(path))


def _write_torchscript(policy: DistributionPredictor, example: torch.Tensor, path: Path) -> None:
    torch.jit.save(torch.jit.trace(policy, example, check_trace=False), str(path))


def _write_exported(policy: DistributionPredictor, example: torch.Tensor, path: Path) -> None:
    program = torch.export.export(policy, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, str(path))


GRAPHS: dict[str, Callable[[DistributionPredictor, torch.Tensor, Path], None]] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
    "torch-export": _write_exported,
}
"""What writes a policy's graph, by the name of the form."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporters say about their own code and about packages that have nothing to do with us."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
