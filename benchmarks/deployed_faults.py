"""Faults on a deployment with TLS and keys: processes are killed or frozen, the network is cut, keys are wrong.

A run goes on while faults happen to it, one after another, each when the one before is over: when two further rounds
have ended. Where a fault ends the run, it is resumed. The shared blocks after every round, up to the first one that
lacked a client, have to have the bits of a run on the local engine without any fault.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from benchmarks.local_faults import Outcome
from benchmarks.trusted_deployment import (
    CONNECTION,
    FORK_SERVER,
    NODE,
    SERVER_APP,
    SUPEREXEC,
    SUPERLINK,
    TrustedDeployment,
    read_descendants,
)
from grpo_fed.engines.deploy import commands
from grpo_fed.engines.flower.control import ControlError
from grpo_fed.engines.flower.engine import FlowerEngine, FlowerRunError
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.runs.folder import read_scenario
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario

CLIENTS, ROUNDS, FAULTS_PER_RUN = ("ant", "bee", "cat"), 60, 6
PAUSE = 0.06
"""Seconds that a step takes, so that faults come in the middle of rounds."""
STRANGER = "eve"
"""A client with a key of another deployment."""
RECOVERED = 2
"""Rounds that have to end after a fault."""
PATIENCE = 240.0
"""Seconds in which they have to."""
SCENARIO = """
name = "deployed"
method = "fedavg"
rounds = {rounds}
steps = 32
seed = {seed}
device = "cpu"
policy = {{ hidden = [8] }}
rollout = {{ num_envs = 2, horizon = 16 }}
objective = {{ epochs = 1, minibatches = 1 }}
evaluate = {{ episodes = 1, every = 10 }}
checkpoint = {{ keep = {rounds} }}
round = {{ deadline = 120, quorum = 0.3 }}
"""
CLIENT = """
[[clients]]
name = "{name}"
env = "benchmarks.fault_envs:Faulty-v0"
kwargs = {{ pause = {pause} }}
"""


def make_deployed_faults(folder: Path, seed: int, count: int) -> Iterator[Outcome]:
    """Let so many faults happen to runs on a deployment, at least."""
    rng, done, number = random.Random(seed), 0, 0
    with TrustedDeployment(folder / "deployment", CLIENTS) as deployment:
        faults = DeployedFaults(deployment, rng)
        while done < count:
            outcomes = FaultyRun(faults, folder / f"run-{number}", seed + number).play()
            yield from outcomes
            done, number = done + len(outcomes), number + 1


class DeployedFaults:
    """What may happen to a deployment."""

    def __init__(self, deployment: TrustedDeployment, rng: random.Random) -> None:
        self.deployment, self._rng = deployment, rng
        self.kinds: Mapping[str, Callable[[], object]] = {
            "the SuperLink is killed": lambda: self._signal("server", SUPERLINK, signal.SIGKILL),
            "the SuperLink is asked to stop": lambda: self._signal("server", SUPERLINK, signal.SIGTERM),
            "a process that starts apps is killed": lambda: self._signal("server", SUPEREXEC, signal.SIGKILL),
            "a node is killed": lambda: self._signal(self._client(), NODE, signal.SIGKILL),
            "a worker or its fork server is killed": lambda: self._signal(self._client(), FORK_SERVER, signal.SIGKILL),
            "a client is killed and started again": lambda: self._restart(signal.SIGKILL),
            "a client is stopped and started again": lambda: self._restart(signal.SIGTERM),
            "the network is cut": self._cut,
            "a node is frozen, and answers late": self._freeze,
            "a client runs twice with one key": self._run_twice,
            "a stranger poses as a client": self._pose,
            "the run's process is killed": lambda: self._signal("server", SERVER_APP, signal.SIGKILL),
            "the server's command is killed": self._kill_server,
        }
        self.ends_run = {"the run's process is killed", "the server's command is killed"}
        self.costs_no_round = {
            "the SuperLink is killed",
            "the SuperLink is asked to stop",
            "a process that starts apps is killed",
            "a stranger poses as a client",
        }

    def _client(self) -> str:
        return self._rng.choice(CLIENTS)

    def _signal(self, command: str, words: str, number: signal.Signals) -> None:
        """Send a signal to one of the processes of a command whose own commands contain some words."""
        root = self.deployment.processes[command].pid
        found = sorted(pid for pid, text in read_descendants([root]).items() if words in text.partition("--")[0])
        if not found:
            raise RuntimeError(f"{command} has no process {words}")
        os.kill(self._rng.choice(found), number)

    def _restart(self, number: signal.Signals) -> None:
        name = self._client()
        self.deployment.processes[name].send_signal(number)
        self.deployment.processes[name].wait(30)
        time.sleep(self._rng.uniform(0, 3))
        self.deployment.start_client(name)

    def _cut(self) -> None:
        self.deployment.network.cut()
        time.sleep(self._rng.uniform(0.5, 8))
        self.deployment.network.heal()

    def _freeze(self) -> None:
        root = self.deployment.processes[self._client()].pid
        frozen = [pid for pid, text in read_descendants([root]).items() if NODE in text or FORK_SERVER in text]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in frozen:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(self._rng.uniform(1, 8) if number == signal.SIGSTOP else 0)

    def _run_twice(self) -> None:
        name = self._client()
        first = self.deployment.processes[name]
        self.deployment.start_client(name)
        second = self.deployment.processes[name]
        time.sleep(self._rng.uniform(5, 15))
        second.terminate()
        second.wait(30)
        self.deployment.processes[name] = first

    def _pose(self) -> None:
        folder, name = self.deployment.folder, CLIENTS[0]
        other = folder / "other"
        if not other.exists():
            commands.init(other, [], [name])
            (other / "clients" / name / "ca.pem").write_bytes((folder / "clients" / name / "ca.pem").read_bytes())
        before = self.deployment.count_lines(STRANGER, "does not accept it")
        self.deployment.start_client(name, keys=other / "clients" / name, log=STRANGER)
        try:
            self.deployment.wait_until(
                lambda: self.deployment.count_lines(STRANGER, "does not accept it") > before, "the stranger is refused"
            )
        finally:
            self.deployment.stop(STRANGER)
            del self.deployment.processes[STRANGER]

    def _kill_server(self) -> None:
        self.deployment.processes["server"].kill()
        self.deployment.processes["server"].wait()
        self.deployment.start_server()


class FaultyRun:
    """A run on a deployment to which faults happen."""

    def __init__(self, faults: DeployedFaults, folder: Path, seed: int) -> None:
        self._faults, self._folder, self._seed = faults, folder, seed
        self._rng = random.Random(seed)
        self._rounds, self._over = 0, threading.Event()
        self._happened: list[tuple[str, int, float, str]] = []
        """Kinds, with the round before, the seconds until all was well, and what went wrong."""

    def play(self) -> list[Outcome]:
        """Run to the end, and judge all faults that have happened."""
        thread = threading.Thread(target=self._make_faults, daemon=True)
        thread.start()
        result, problem = self._run()
        self._over.set()
        thread.join()
        missing = {} if result is None else result.missing
        lost = {round for entries in missing.values() for round, _, _ in entries}
        problem = problem or self._compare(min(lost, default=ROUNDS + 1) - 1)
        outcomes, ends = [], [before for _, before, _, _ in self._happened[1:]] + [ROUNDS]
        for (kind, before, seconds, wrong), end in zip(self._happened, ends, strict=True):
            rounds = sum(before < round <= end for entries in missing.values() for round, _, _ in entries)
            if kind in self._faults.costs_no_round and rounds:
                wrong = wrong or f"it cost {rounds} rounds of clients: {missing}"
            outcomes.append(Outcome(kind, not (wrong or problem), rounds, 0, seconds, wrong or problem))
        return outcomes

    def _scenario(self, pause: float) -> Scenario:
        text = SCENARIO.format(rounds=ROUNDS, seed=self._seed)
        return Scenario.loads(text + "".join(CLIENT.format(name=name, pause=pause) for name in CLIENTS))

    def _run(self) -> tuple[Result | None, str]:
        """Run, and resume as often as a fault ends the run."""
        out, tries = self._folder / "run", 0
        while True:
            try:
                if (out / "scenario.toml").exists():
                    read_scenario(out)
                    engine = FlowerEngine.resumed(out, "flower", CONNECTION)
                else:
                    engine = FlowerEngine(self._scenario(PAUSE), out, "flower", CONNECTION)
                with engine:
                    result = engine.run(lambda record: setattr(self, "_rounds", record.round))
                if result.status == "finished":
                    return result, ""
                return result, f"the run ended as {result.status}"
            except (FlowerRunError, ControlError, RuntimeError) as error:
                tries += 1
                kind = self._happened[-1][0] if self._happened else "nothing"
                if tries > FAULTS_PER_RUN or self._current not in self._faults.ends_run:
                    self._over.set()
                    return None, f"the run ended after {kind}: {str(error)[:200]}"
                time.sleep(1)

    _current = ""

    def _make_faults(self) -> None:
        for _ in range(FAULTS_PER_RUN):
            if not self._wait_for_rounds(1) or self._rounds > ROUNDS - 8:
                return
            time.sleep(self._rng.uniform(0, 1))
            kind = self._rng.choice([*self._faults.kinds])
            self._current, before, began, wrong = kind, self._rounds, time.monotonic(), ""
            try:
                self._faults.kinds[kind]()
            except RuntimeError as error:
                wrong = str(error)
            if not self._wait_for_rounds(RECOVERED) and not self._over.is_set():
                wrong = wrong or f"no {RECOVERED} rounds ended within {PATIENCE:.0f} seconds"
            self._happened.append((kind, before, time.monotonic() - began, wrong))

    def _wait_for_rounds(self, count: int) -> bool:
        """Wait until so many further rounds have ended; return False if the run ends before, or it takes long."""
        goal, until = self._rounds + count, time.monotonic() + PATIENCE
        while self._rounds < goal:
            if self._over.is_set() or time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def _compare(self, last: int) -> str:
        """Compare the shared blocks after each round up to the last with those of a run without faults."""
        with LocalEngine(self._scenario(0.0), self._folder / "expected", workers=0, alone=True) as engine:
            engine.run()
        for number in range(1, min(last, ROUNDS) + 1):
            path = Path("checkpoints") / f"round-{number:04d}" / "shared.safetensors"
            if (self._folder / "run" / path).read_bytes() != (self._folder / "expected" / path).read_bytes():
                return f"the shared blocks after round {number} have other bits than without a fault"
        lines = (self._folder / "run" / "rounds.jsonl").read_text().splitlines()
        return "" if len(lines) == ROUNDS else f"{len(lines)} of {ROUNDS} rounds have a line"
