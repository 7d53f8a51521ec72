"""The correction of drift is SCAFFOLD: against its Algorithm 1, written out with control variates that are sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grpo_fed.federation.clients import Clients
from grpo_fed.federation.drift import OWN_STEP, STEPS, own_step, step_correction
from grpo_fed.federation.messages import Start, Train
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import resolve_tasks
from tests.support.small_federation import TINY

CURVATURES = np.array([[1.0, 4.0], [3.0, 0.5], [0.2, 2.0]])
GOALS = np.array([[1.0, -2.0], [4.0, 0.0], [-3.0, 5.0]])
RATE, STEPS_OF_A_ROUND = 0.1, 10
OPTIMUM = (CURVATURES * GOALS).sum(0) / CURVATURES.sum(0)
"""Where the mean of the clients' losses 1/2 sum h (x - g)^2 is least."""


def gradient(client: int, x: np.ndarray) -> np.ndarray:
    return CURVATURES[client] * (x - GOALS[client])


def scaffold(rounds: int) -> list[np.ndarray]:
    """Karimireddy et al. 2020, Algorithm 1 with option II, all clients, global step size 1."""
    x, c, own = np.zeros(2), np.zeros(2), np.zeros((3, 2))
    history = []
    for _ in range(rounds):
        ends, new = [], []
        for client in range(3):
            y = x.copy()
            for _ in range(STEPS_OF_A_ROUND):
                y = y - RATE * (gradient(client, y) - own[client] + c)
            new.append(own[client] - c + (x - y) / (STEPS_OF_A_ROUND * RATE))
            ends.append(y)
        x, c = np.mean(ends, 0), c + np.mean(np.array(new) - own, 0)
        own = np.array(new)
        history.append(x)
    return history


def ours(rounds: int, corrects: bool = True) -> list[np.ndarray]:
    """The same with `drift`: no control variate is sent."""
    x = last = np.zeros(2)
    states: list[dict[str, np.ndarray]] = [{}, {}, {}]
    history = []
    for _ in range(rounds):
        ends = []
        for client in range(3):
            correction = step_correction(x, last, states[client]) if corrects else np.zeros(2)
            y = x.copy()
            for _ in range(STEPS_OF_A_ROUND):
                y = y - RATE * gradient(client, y) + correction
            states[client] = own_step(x, y, correction, STEPS_OF_A_ROUND)
            ends.append(y)
        last, x = x, np.mean(ends, 0)
        history.append(x)
    return history


def test_it_is_scaffold_step_by_step():
    np.testing.assert_allclose(ours(20), scaffold(20), rtol=1e-10, atol=1e-12)


def test_it_ends_at_the_optimum_where_averaging_alone_does_not():
    np.testing.assert_allclose(ours(200)[-1], OPTIMUM, atol=1e-6)
    assert np.abs(ours(200, corrects=False)[-1] - OPTIMUM).max() > 0.1


def test_clients_add_the_correction_to_each_of_their_steps(tmp_path: Path):
    """Clients learn with a rate of nearly 0, so that all that moves them in round 2 is the correction.

    In round 1 nothing is added, and their own step is nearly 0. The shared blocks then move by 0.32 in each parameter,
    in 8 steps (2 updates of 2 epochs and 2 minibatches): in round 2 each step adds 0.04, and 8 steps 0.32.
    """
    overrides = ["method=scaffold", "objective.learning_rate=1e-12", "merge.rule=mean", "proximity.mode=off"]
    scenario = Scenario.loads(TINY, overrides=[*overrides, "steps=128"])
    shared_blocks, store = resolve_shared_blocks(scenario), StateStore(tmp_path, durable=False)
    clients = Clients(scenario, shared_blocks, resolve_tasks(scenario), store)
    shared = shared_blocks.initial.numpy()
    first = clients.answer(dict.fromkeys(clients.names, Train(Start("run", 1, shared), 0.0, 0.5)))
    np.testing.assert_allclose(first["bee"].point, shared, atol=1e-6)
    moved = shared + np.float32(0.32)
    second = clients.answer(dict.fromkeys(clients.names, Train(Start("run", 2, moved), 0.5, 1.0)))
    np.testing.assert_allclose(second["bee"].point, moved + 0.32, atol=1e-5)
    stored = store.load("run", "bee", before=3)
    assert stored is not None
    assert stored.arrays[STEPS] == 8
    np.testing.assert_allclose(stored.arrays[OWN_STEP], 0.0, atol=1e-6)
    clients.close()


def test_a_client_that_missed_a_round_begins_without_a_correction():
    assert not step_correction(np.ones(2), np.zeros(2), {}).any()
    assert not step_correction(np.ones(2), np.zeros(2), own_step(np.zeros(2), np.ones(2), np.zeros(2), 0)).any()


def test_scaffold_needs_what_it_assumes():
    with pytest.raises(ValueError, match=r'needs proximity\.mode = "off"'):
        Scenario.loads(TINY, overrides=["method=scaffold", "proximity.mode=measured"])
