"""What a client remembers between rounds, as records of Flower's `Context.state`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor
from torch.optim import Optimizer

from grpo_fed.adapters.learner import LearnerReport, TorchLearner
from grpo_fed.flower.measurement import to_arrays, to_record

OPTIMISER, MEMORY, OBSERVATIONS = "grpo_fed.optimiser", "grpo_fed.memory", "grpo_fed.observations"
"""The records of a client's state."""


def recall(learner: TorchLearner, state: RecordDict) -> None:
    """Give a learner what the client remembers of the rounds before."""
    if learner.optimiser is not None and OPTIMISER in state:
        load_optimiser(learner.optimiser, _arrays(state, OPTIMISER))
    if learner.memory is not None and MEMORY in state:
        learner.memory.load(_arrays(state, MEMORY))


def remember(learner: TorchLearner, report: LearnerReport, state: RecordDict, most: int, seed: int) -> None:
    """Keep what the next rounds need. most: observations that are kept, sampled without replacement."""
    if learner.optimiser is not None:
        state[OPTIMISER] = to_record(optimiser_arrays(learner.optimiser))
    if learner.memory is not None:
        state[MEMORY] = to_record(learner.memory.save())
    if report.observations is not None:
        given = report.observations.detach().cpu()
        order = np.random.default_rng(seed).permutation(len(given))[:most]
        state[OBSERVATIONS] = to_record({OBSERVATIONS: given[np.sort(order)].numpy()})


def recall_observations(state: RecordDict) -> Tensor:
    """Return the observations that KL is measured on, [n, ...]; ValueError if there are none."""
    if OBSERVATIONS not in state:
        raise ValueError("the client has seen no observations yet; give LearnerReport those of the last training")
    return torch.from_numpy(_arrays(state, OBSERVATIONS)[OBSERVATIONS].copy())


def optimiser_arrays(optimiser: Optimizer) -> dict[str, np.ndarray]:
    """Copy an optimiser's state: `0.exp_avg` is that of its first parameter."""
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().numpy().copy()
        for index, values in optimiser.state_dict()["state"].items()
        for key, value in values.items()
        if value is not None
    }


def load_optimiser(optimiser: Optimizer, arrays: Mapping[str, np.ndarray]) -> None:
    """Put back what `optimiser_arrays` copied; learning rates and other settings stay the optimiser's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = torch.from_numpy(np.array(array))
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def _arrays(state: RecordDict, name: str) -> dict[str, np.ndarray]:
    record = state[name]
    assert isinstance(record, ArrayRecord), "as it was kept"
    return to_arrays(record)
