"""A resident node's clients, in real processes of which some are killed in the middle of a round."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_fed.engines.flower.engine import FlowerEngine, FlowerRunError
from grpo_fed.engines.replay_order import replay_order
from grpo_fed.engines.start import run
from grpo_fed.runs.folder import CLIENTS as STATES
from grpo_fed.runs.merge_order import read_orders
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from tests.support.processes import find_descendants, is_running, kill_descendant
from tests.support.small_federation import CLIENTS, TINY, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


class Waiting:
    """A federation whose clients wait after given rounds until the test lets them go on."""

    def __init__(self, folder: Path, rounds: tuple[int, ...], total: int, *overrides: str) -> None:
        self.folder, self.out = folder, folder / "run"
        clients = []
        scenario = Scenario.loads(TINY, overrides=[f"rounds={total}", "checkpoint.keep=9", *overrides])
        for settings in scenario.clients:
            kwargs = {
                "client": settings.name, "state": str(self.out / STATES), "rounds": rounds, "folder": str(folder)
            }  # fmt: skip
            env = "tests.support.failing_envs:Waiting-v0"
            clients.append(settings.model_copy(update={"env": env, "kwargs": kwargs}))
        self.scenario = scenario.model_copy(update={"clients": clients})

    def processes(self, client: str, round: int) -> list[int]:
        """The processes that began a client's training after this round, one after another."""
        path = self.folder / f"{client} waits after {round}"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait(self, round: int, count: int = 1) -> None:
        """Wait until every client has begun its training after this round so many times."""
        until(lambda: all(len(self.processes(client, round)) >= count for client in CLIENTS))

    def release(self, round: int) -> None:
        for client in CLIENTS:
            (self.folder / f"{client} goes after {round}").touch()

    def agrees(self, round: int) -> None:
        """Assert that the shared blocks after a round have the same bits as on the local engine."""
        path = Path("checkpoints") / f"round-{round:04d}" / "shared.safetensors"
        blocks, expected = load_file(self.out / path), load_file(self.folder / "expected" / path)
        assert blocks.keys() == expected.keys()
        for name in blocks:
            np.testing.assert_array_equal(blocks[name], expected[name])


def left_behind() -> list[int]:
    """List the processes of a run that have not ended."""
    words = ("engines.flower", "engines/flower", "engines.resident", "flower-superexec", "flwr")
    return [pid for word in words for pid in find_descendants(os.getpid(), word)]


def test_nothing_is_lost_when_a_superlink_a_node_or_a_worker_is_killed(tmp_path: Path):
    federation = Waiting(tmp_path, (1, 2, 3), 5)
    run(federation.scenario, tmp_path / "expected", workers=len(CLIENTS))  # a client each, as its node has it

    def kill() -> None:
        federation.wait(1)
        kill_descendant(os.getpid(), "grpo_fed.engines.flower.access")
        federation.release(1)
        federation.wait(2)
        kill_descendant(os.getpid(), "grpo_fed.engines.resident.host")
        federation.wait(2, count=2)
        federation.release(2)
        federation.wait(3)
        os.kill(federation.processes("bee", 3)[0], signal.SIGKILL)
        for pid in find_descendants(os.getpid(), "grpo_fed.engines.flower.superexec"):
            os.kill(pid, signal.SIGKILL)  # the run's app goes on, which it has started
        federation.release(3)

    trained: dict[int, set[str]] = {}
    lines: list[str] = []

    def watch(record: RoundRecord) -> None:
        trained[record.round] = {client.client for client in record.clients if client.steps}

    with ThreadPoolExecutor(1) as executor:
        killed = executor.submit(kill)
        result = FlowerEngine(federation.scenario, federation.out).run(watch, lines.append)
        killed.result(1)
    assert (result.status, result.rounds) == ("finished", 5)
    for round in (1, 2, 3):
        federation.agrees(round)
    for client in CLIENTS:
        assert len(federation.processes(client, 1)) == 1, "the SuperLink's end made nobody train twice"
        assert len(federation.processes(client, 2)) == 2
        assert len(federation.processes(client, 3)) == 1
    assert result.missing.keys() == {"bee"}
    ((number, kind, reason),) = result.missing["bee"]
    assert (number, kind) == (4, "died")
    assert "SIGKILL" in reason
    assert trained == {0: set(), 4: {"ant", "cat"}} | {key: {*CLIENTS} for key in (1, 2, 3, 5)}
    assert any("the SuperLink was restarted" in line for line in lines)
    assert not left_behind()


def test_a_run_that_does_not_wait_survives_kills_and_an_interrupted_one_leaves_no_process(
    tmp_path: Path, request: pytest.FixtureRequest
):
    """Kill the SuperLink in everybody's second work and the app in the third, go on, and press Ctrl-C after a merge.

    Two of three clients make a merge, and clients work on until it comes. However far the run came, its order of events
    is repeated to the same bits.
    """
    changes = ('round.mode="buffered"', 'round.again="at-once"', "round.buffer=0.6")
    federation = Waiting(tmp_path, (1, 2, 3), 9, *changes)

    def kill() -> None:
        federation.wait(1)
        kill_descendant(os.getpid(), "grpo_fed.engines.flower.access")
        federation.release(1)
        federation.wait(2)
        kill_descendant(os.getpid(), "flwr-serverapp")

    merges: list[int] = []
    with ThreadPoolExecutor(1) as executor:
        killed = executor.submit(kill)
        with (
            pytest.raises(FlowerRunError, match="ended by SIGKILL"),
            FlowerEngine(federation.scenario, federation.out) as engine,
        ):
            engine.run(lambda record: merges.append(record.round))
        killed.result(1)
    for client in CLIENTS:
        assert len(federation.processes(client, 1)) == 1, "the SuperLink's end made nobody train twice"
    before, ended = len(read_orders(federation.out)), threading.Event()
    assert before >= 2

    def interrupt() -> None:
        try:
            federation.wait(2, count=2)
            federation.release(2)
            until(lambda: max(merges) > before)
        finally:  # else the test would wait for ever
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(60), "it waits for its clients"

    # a shell that starts the tests in the background lets them ignore the signal
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    engine = FlowerEngine.resumed(federation.out)
    with ThreadPoolExecutor(1) as executor:
        interrupted = executor.submit(interrupt)
        with pytest.raises(KeyboardInterrupt), engine:
            engine.run(lambda record: merges.append(record.round))
        ended.set()
        interrupted.result(1)
    assert not left_behind()
    pids = [pid for client in CLIENTS for number in (1, 2, 3) for pid in federation.processes(client, number)]
    assert not [pid for pid in pids if is_running(pid)]
    assert engine.result is not None
    assert (engine.result.status, engine.result.missing) == ("interrupted", {})
    federation.release(3)  # the repeated run has the same environments
    again = replay_order(federation.out, tmp_path / "again", replace=False, watch=lambda record: None)
    assert again.merges > before
    assert again.first_difference is None
