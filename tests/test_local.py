"""The local engine: clients in worker processes, and what becomes of the others when one fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from grpo_fed.commons import Commons, commons_of
from grpo_fed.engines.frames import receive, send
from grpo_fed.engines.instruct import RUN, SERVER, instruction
from grpo_fed.engines.local import LocalGrid
from grpo_fed.engines.mail import GridPost
from grpo_fed.engines.rota import Rota, cut
from grpo_fed.engines.worker import Worker, is_possible
from grpo_fed.engines.workers import Group
from grpo_fed.messages import (
    Answer,
    Evaluate,
    Evaluated,
    Failure,
    Instruction,
    Measure,
    Measured,
    Play,
    Played,
    Start,
    Train,
    Trained,
)
from grpo_fed.scenario import Scenario
from tests.troupe import step_of

ROOT = Path(__file__).parents[1]
TROUPE = "tests.troupe:Troupe"

needs_workers = pytest.mark.skipif(not is_possible(), reason="worker processes need Linux")


def scenario_of(clients: int, **settings: Any) -> Scenario:
    plain: dict[str, Any] = {
        "name": "local",
        "method": "fedavg",
        "rounds": 9,
        "steps": 64,
        "policy": {"hidden": [4]},
        "rollout": {"num_envs": 2, "horizon": 32},
        "evaluate": {"episodes": 2},
        "clients": [{"name": "cart", "env": "grpo_fed/CartPole-v1", "count": clients}],
    }
    return Scenario.model_validate(plain | settings)


class Stage:
    """A grid with clients that do nothing, a post to it, and what they have been asked."""

    def __init__(self, folder: Path, clients: int, workers: int, **given: Any) -> None:
        self.scenario = scenario_of(clients)
        self.commons: Commons = commons_of(self.scenario)
        self.names = self.commons.clients
        self.log = folder / "asked.jsonl"
        self.log.touch()
        told = {"log": str(self.log), **given}
        self.grid = LocalGrid.serving(self.scenario, self.commons, TROUPE, workers, told)
        self.post = GridPost(self.grid, self.commons, self.scenario, self.grid.nodes)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.grid.close()

    def train(self, number: int, deadline: float | None = 60.0) -> dict[str, Answer | Failure]:
        shared = self.commons.first.numpy()
        told = {name: Train(Start("run", number, shared), 0.0, 0.5) for name in self.names}
        return dict(self.post.send(told, deadline))

    def asked(self, number: int) -> list[list[str]]:
        """In a round, who was asked together."""
        return [names for other, _, *names in self.lines() if other == number]

    def pids(self) -> set[int]:
        return {pid for _, pid, *_ in self.lines()}

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def failed(answers: Mapping[str, Answer | Failure]) -> dict[str, str]:
    return {name: answer.kind for name, answer in answers.items() if isinstance(answer, Failure)}


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=needs_workers)])
def test_every_client_answers_for_itself(tmp_path: Path, workers: int) -> None:
    with Stage(tmp_path, 20, workers) as stage:
        answers = stage.train(1)
        assert list(answers) == sorted(stage.names)
        for name, answer in answers.items():
            assert isinstance(answer, Trained)
            np.testing.assert_array_equal(answer.point, stage.commons.first.numpy() + np.float32(step_of(name)))
            assert (answer.steps, answer.gain, answer.metrics) == (1, 0.5, {"losses/entropy": 0.125})
        start = Start("run", 1, stage.commons.first.numpy())
        candidate = start.shared + np.float32(1)
        halves = tuple([0.5] * len(stage.commons.blocks) for _ in range(3))
        trials = tuple(tuple(half) for half in halves)
        measured = dict(stage.post.send({"cart-7": Measure(start, candidate, trials)}, 60))
        assert measured["cart-7"].kl == (sum(trials[0]) * step_of("cart-7"),) * 3  # type: ignore[union-attr]
        played = dict(stage.post.send({"cart-3": Evaluate(start, Play(1))}, 60))
        assert played["cart-3"].played.mean == step_of("cart-3")  # type: ignore[union-attr]


def test_in_one_process_nobody_waits_for_answers_that_nobody_has_asked_for(tmp_path: Path) -> None:
    with Stage(tmp_path, 40, 0) as stage:
        shared = stage.commons.first.numpy()
        told = {name: Train(Start("run", 1, shared), 0.0, 0.5) for name in stage.names}
        answers = stage.post.send(told, None)
        next(answers)
        assert len(stage.lines()) == 1  # of three chunks


def test_what_is_shared_is_read_once(tmp_path: Path) -> None:
    with Stage(tmp_path, 3, 0) as stage:
        seen: list[np.ndarray] = []

        class Looking:
            def answer(self, instructions: Mapping[str, Instruction]) -> dict[str, Answer]:
                seen.extend(one.start.shared for one in instructions.values())
                return {}

            def close(self) -> None:
                pass

        stage.grid._hands.serve.__self__._desk._serve = lambda names: Looking()  # type: ignore[attr-defined]
        assert failed(stage.train(1)) == dict.fromkeys(sorted(stage.names), "raised")  # it gave no answers
        assert len(seen) == 3
        assert len({id(one) for one in seen}) == 1


@needs_workers
def test_chunks_stay_with_their_workers(tmp_path: Path) -> None:
    with Stage(tmp_path, 64, 2, seconds=0.05) as stage:
        for number in (1, 2, 3):
            assert not failed(stage.train(number))
        homes: dict[str, set[int]] = {}
        for _, pid, *names in stage.lines():
            homes.setdefault(names[0], set()).add(pid)
        assert len(homes) == 4
        assert len(stage.pids()) == 2
        assert sum(len(pids) > 1 for pids in homes.values()) <= 1  # one that fell behind may have given one away


@needs_workers
def test_what_a_client_prints_does_not_get_between_what_this_process_prints() -> None:
    code = f"""
import sys, tempfile
from pathlib import Path
from tests.test_local import Stage
with Stage(Path({str(ROOT)!r}) / sys.argv[1], 2, 1, faults={{"cart-0": {{"1": "print"}}}}) as stage:
    stage.train(1)
"""
    with temporary() as folder:
        done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "cart-0 says hello" in done.stderr
