"""Faults on the local engine: what environments do, kills and signals, damaged files, full disks, clocks, MLflow away.

Each function makes some faults and yields what became of them. Runs are compared with runs without the fault: those
that went on after a stop with an uninterrupted one, and those in which clients failed with one in which the same
clients raised an exception in the same rounds.
"""

from __future__ import annotations

import http.server
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.fault_envs import FAULTS
from benchmarks.fault_process import start_command
from benchmarks.trusted_deployment import FORK_SERVER, read_descendants
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.engines.workers.fork_server import Worker
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario

CLIENTS, ROUNDS = 8, 10
DEADLINE = 45.0
"""Seconds of a round after which a client that hangs counts as late."""
PATIENCE = 600.0
"""Seconds for which a command is waited for."""
SCENARIO = """
name = "faults"
method = "fedavg"
rounds = {rounds}
steps = 32
seed = {seed}
device = "cpu"
policy = {{ hidden = [8] }}
rollout = {{ num_envs = 2, horizon = 16 }}
objective = {{ epochs = 1, minibatches = 1 }}
evaluate = {{ episodes = 1, every = 5 }}
checkpoint = {{ keep = 3 }}
round = {{ deadline = {deadline}, quorum = 0.1 }}
"""
CLIENT = """
[[clients]]
name = "cart-{number}"
env = "{env}"
kwargs = {kwargs}
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault."""

    kind: str
    survived: bool
    """Whether the run ended as it should: with the same bits, or with what was lost named."""
    rounds_lost: int = 0
    """Rounds that a client missed, or that were trained again."""
    data_lost: int = 0
    """What is missing at the end and was named: files, checkpoints, records."""
    seconds: float | None = None
    """From the fault, or from the command that goes on, to the next finished round."""
    problem: str = ""
    """Why it did not survive."""


def make_scenario(seed: int, folder: Path | None = None, rounds: int = ROUNDS, clients: int = CLIENTS) -> Scenario:
    """Make the scenario; with a folder its environments misbehave as files there say."""
    text = SCENARIO.format(rounds=rounds, seed=seed, deadline=DEADLINE)
    for number in range(clients):
        name = f"cart-{number}"
        faulty = folder is not None
        kwargs = (
            f'{{ folder = "{folder}", client = "{name}" }}' if faulty else f"{{ length = {0.4 + 0.1 * number:.1f} }}"
        )
        env = "benchmarks.fault_envs:Faulty-v0" if faulty else "grpo_fed/CartPole-v1"
        text += CLIENT.format(number=number, env=env, kwargs=kwargs)
    return Scenario.loads(text)


# Clients and environments --------------------------------------------------------------------------------------------

ENGINE_FAULTS = ("the fork server is killed", "an idle worker is killed")
HARMLESS = {"prints 2 MB", "starts a process", "leaks 20 MB", "leaks 100 handles", "seeds the global generators"}
HARMLESS |= {"changes the folder", "clears sys.path", "warns", "sleeps a little", "takes two threads"}
HARMLESS |= set(ENGINE_FAULTS)


def misbehave(folder: Path, seed: int, count: int) -> Iterator[Outcome]:
    """Run a federation in which so many faults happen to clients, at most one to each client and round."""
    rng = random.Random(seed)
    # A round in which a client hangs lasts until its deadline, and a fork server takes seconds to import everything.
    rare = [kind for kind in ("hangs", *ENGINE_FAULTS) if rng.random() < 0.3]
    kinds = [*(kind for kind in FAULTS if kind != "hangs"), *rare]
    # The last round is free of faults, so that all clients are there in the end.
    places = [(f"cart-{number}", round) for number in range(CLIENTS) for round in range(1, ROUNDS)]
    plan = {place: rng.choice(kinds) for place in sorted(rng.sample(places, count))}
    steps = {place: rng.randrange(12) for place in plan}
    faulty, expected = folder / "faulty", folder / "expected"
    result, seconds, waiting = _run_plan(faulty, seed, plan, steps)
    missing = {(name, round): reason for name, entries in result.missing.items() for round, _, reason in entries}
    again, _, _ = _run_plan(expected, seed, dict.fromkeys(missing, "raises RuntimeError"), steps)
    same = result.status == again.status == "finished" and _policies(faulty / "run") == _policies(expected / "run")
    for place, kind in plan.items():
        if place in waiting:
            continue  # it was not asked for a step
        problem = "" if same else "the run has other bits than one in which the same clients raise"
        if kind in HARMLESS - {"an idle worker is killed"} and place in missing:
            problem = f"its round was lost: {missing[place]}"
        yield Outcome(kind, not problem, int(place in missing), 0, seconds.get(place[1]), problem)
    # A worker that is killed while it is idle may take the work that it is just sent with it, whoever's that is.
    of_engine = {round for (_, round), kind in plan.items() if kind in ENGINE_FAULTS}
    for place in sorted(place for place in missing.keys() - plan.keys() if place[1] not in of_engine):
        yield Outcome("none", False, 1, 0, None, f"{place[0]} failed in round {place[1]}: {missing[place]}")


def _run_plan(
    folder: Path, seed: int, plan: Mapping[tuple[str, int], str], steps: Mapping[tuple[str, int], int]
) -> tuple[Result, dict[int, float], set[tuple[str, int]]]:
    """Run a federation, and let clients misbehave; return the seconds of each round, and what did not happen, too."""
    orders = folder / "orders"
    orders.mkdir(parents=True)
    seconds: dict[int, float] = {}
    waiting: set[tuple[str, int]] = set()

    def watch(record: RoundRecord) -> None:
        seconds[record.round] = record.seconds
        for file in orders.iterdir():
            waiting.add((file.name, record.round))
            file.unlink()
        for (client, round), kind in plan.items():
            if round != record.round + 1:
                continue
            if kind in ENGINE_FAULTS:
                _kill_of_engine(kind)
            else:
                (orders / client).write_text(f"{kind} {steps.get((client, round), 0)}")

    Worker().close()  # the first round does not wait for imports
    with LocalEngine(make_scenario(seed, orders), folder / "run", workers=2, alone=True) as engine:
        return engine.run(watch), seconds, waiting


def _kill_of_engine(kind: str) -> None:
    """Kill the fork server, or one of its workers, which all are idle between two rounds."""
    own = {pid: command for pid, command in read_descendants([os.getpid()]).items() if FORK_SERVER in command}
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in own}
    servers = [pid for pid, parent in parents.items() if parent == os.getpid()]
    victims = servers if kind == ENGINE_FAULTS[0] else [pid for pid, parent in parents.items() if parent in servers]
    for pid in victims[:1]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# Stops at any moment -------------------------------------------------------------------------------------------------


class StoppedRuns:
    """Runs of the command `grpo-fed run` on one scenario, which are stopped and resumed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        folder.mkdir(parents=True)
        self.scenario = folder / "faults.toml"
        self.scenario.write_text(make_scenario(seed, clients=4).dumps())
        self.whole = folder / "whole"
        _end(self.start(folder / "warm"))
        began = time.monotonic()
        _end(self.start(self.whole))
        self.seconds = time.monotonic() - began
        """What a run takes that is not stopped."""
        self.expected = _outcome(self.whole)

    def start(self, out: Path, *more: str, weather: tuple[object, ...] = ()) -> BaseProcess:
        """Start a run."""
        given = ["run", str(self.scenario), "--out", str(out), "--workers", "0", "--quiet", "--no-figures", *more]
        return start_command([*given, *([] if "--track" in more else ["--track", "off"])], _log(out), weather)

    def resume(self, out: Path, weather: tuple[object, ...] = ()) -> BaseProcess:
        """Go on with a run, or begin it again if it was stopped before it had begun."""
        if not (out / "scenario.toml").exists() or not (out / "rounds.jsonl").exists():
            return self.start(out, weather=weather)
        given = ["run", "--resume", str(out), "--quiet", "--no-figures", "--track", "off"]
        return start_command(given, _log(out), weather)

    def finish(self, out: Path, kind: str) -> Outcome:
        """Go on to the end, and compare with a run that was not stopped."""
        before = _count_rounds(out)
        process, began = self.resume(out), time.monotonic()
        while process.is_alive() and _count_rounds(out) <= before and time.monotonic() < began + PATIENCE:
            time.sleep(0.02)
        seconds = time.monotonic() - began
        code = _end(process)
        problem = self.find_difference(out, code)
        checkpoints = [int(path.name[-4:]) for path in (out / "checkpoints").glob("round-*")] if before else []
        lost = 1 if before or checkpoints else 0  # the round that was under way
        return Outcome(kind, not problem, lost, 0, seconds, problem)

    def find_difference(self, out: Path, code: int | None) -> str:
        """Say what is not as it should be at the end of a run; empty if nothing is."""
        if code != 0 and "has finished" not in _log(out).read_text():
            return f"it ended with {code}: {_last_line(out)}"
        return compare_outcomes(_outcome(out), self.expected)

    def stop_anywhere(self, number: int) -> Iterator[Outcome]:
        """Stop a run at a random moment by a random signal, perhaps again while it goes on, and let it go on."""
        out = self.folder / f"stopped-{number}"
        process = self.start(out)
        while True:
            name = self.rng.choice(["SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"])
            process.join(self.rng.uniform(0.0, 1.05 * self.seconds))
            if not process.is_alive():
                break
            kind = f"{name} of the run"
            assert process.pid is not None
            os.kill(process.pid, signal.Signals[name])
            asked = time.monotonic()
            code = _end(process)
            took = time.monotonic() - asked
            has_begun = out.exists() and code != -signal.SIGTERM  # which it is before the command listens to signals
            if name != "SIGKILL" and has_begun and not (out / "results.json").exists():
                yield Outcome(kind, False, 0, 0, took, f"it ended with {code} and without results")
                return
            if self.rng.random() < 0.3:
                yield Outcome(kind, True, 1, 0, took)  # judged with the next one of this run
                process = self.resume(out)
            else:
                yield self.finish(out, kind)
                shutil.rmtree(out, ignore_errors=True)
                return
        if problem := self.find_difference(out, process.exitcode):
            yield Outcome("none", False, 0, 0, None, problem)

    # Files -----------------------------------------------------------------------------------------------------------

    def damage(self, number: int) -> Outcome:
        """Damage a file of a run that was stopped after its seventh round, and let it go on."""
        stopped = self.folder / "stopped"
        if not stopped.exists():
            process = self.start(stopped)
            while _count_rounds(stopped) < 7:
                time.sleep(0.005)
            process.kill()
            _end(process)
        out = self.folder / f"damaged-{number}"
        shutil.copytree(stopped, out)
        files = sorted(path for path in out.rglob("*") if path.is_file() and "clients" not in path.parts[-4:-3])
        name, damage = self.rng.choice(sorted(DAMAGES.items()))
        file = self.rng.choice(files)
        place = file.relative_to(out)
        where = "a checkpoint" if place.parts[0] == "checkpoints" else "a client's state"
        kind = f"{where if len(place.parts) > 1 else place.name}: {name}"
        damage(file, self.rng)
        began = time.monotonic()
        code = _end(self.resume(out))
        text = _log(out).read_text()
        problem = ""
        if code == 0:
            problem = compare_outcomes(_outcome(out), self.expected)
            if problem and str(place.name) in json.dumps(_outcome(out).get("notes", "")) + text:
                problem = ""  # it is said what was lost
        elif "Traceback" in text or "should not happen" in text or str(out) not in text:
            problem = f"it ended with {code}: {_last_line(out)}"
        shutil.rmtree(out)
        return Outcome(kind, not problem, 0, int(code != 0), time.monotonic() - began, problem)

    # The machine -----------------------------------------------------------------------------------------------------

    def fill_disk(self, number: int) -> Outcome:
        """Let writing fail for a while, or to the end of the run, from a random file on; then there is room again."""
        out = self.folder / f"full-{number}"
        first = self.rng.randrange(1, 150)
        count = self.rng.choice((1, 5, 1_000_000))
        kind = "the disk is full for a file" if count == 1 else "the disk is full for a while"
        kind = "the disk is full" if count > 5 else kind
        code = _end(self.start(out, weather=("full", str(out), first, count)))
        text = _log(out).read_text()
        if code == 0:
            lost = json.loads((out / "results.json").read_text()).get("missing", {})
            problem = "" if lost or "no space" in text.lower() else compare_outcomes(_outcome(out), self.expected)
            return Outcome(kind, not problem, sum(map(len, lost.values())), 0, None, problem)
        if "Traceback" in text or "no space left" not in text.lower():
            return Outcome(kind, False, 0, 0, None, f"it ended with {code}: {_last_line(out)}")
        if not any(out.glob("*")):
            return Outcome(kind, True, 0, 0, None)
        return self.finish(out, kind)

    def shake_clock(self, number: int) -> Outcome:
        """Let the time of day jump whenever it is asked for; the run is stopped once, and goes on so."""
        out = self.folder / f"clock-{number}"
        weather = ("clock", self.rng.randrange(1000))
        process = self.start(out, weather=weather)
        process.join(self.rng.uniform(0.3, 1.0) * self.seconds)
        if process.is_alive():
            process.kill()
        _end(process)
        for file in out.rglob("*"):  # as if written at other times
            when = self.rng.uniform(1e8, 2e9)
            if file.is_file() and self.rng.random() < 0.3:
                os.utime(file, (when, when))
        began = time.monotonic()
        code = 0 if (out / "results.json").exists() else _end(self.resume(out, weather))
        problem = self.find_difference(out, code)
        return Outcome("the clock jumps", not problem, 0, 0, time.monotonic() - began, problem)

    def refuse_tracking(self, number: int) -> Outcome:
        """Track a run to a server that is away or refuses; afterwards all records have to be there to be sent."""
        out = self.folder / f"tracked-{number}"
        name, behave = sorted(SERVERS.items())[number % len(SERVERS)]
        with TrackingServer(behave) as server:
            began = time.monotonic()
            code = _end(self.start(out, "--track", f"http://127.0.0.1:{server.port}"))
        problem = self.find_difference(out, code)
        spool = out / "tracking" / "spool.jsonl"
        records = spool.read_text().splitlines() if spool.exists() else []
        rounds = sum('"kind": "round"' in line for line in records)
        if not problem and rounds < ROUNDS + 1:
            problem = f"{rounds} of {ROUNDS + 1} rounds are left for `grpo-fed replay`"
        return Outcome(f"MLflow {name}", not problem, 0, 0, time.monotonic() - began, problem)


def _flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    _replace(file, bytes(content))


def _zero_page(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    begin = rng.randrange(max(1, len(content)))
    content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))
    _replace(file, bytes(content))


def _cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    _replace(file, content[: rng.randrange(max(1, len(content)))])


def _swap(file: Path, rng: random.Random) -> None:
    others = [path for path in file.parent.iterdir() if path.is_file() and path != file]
    if others:
        _replace(file, rng.choice(sorted(others)).read_bytes())
    else:
        file.unlink()


def _replace(file: Path, content: bytes) -> None:
    file.unlink()  # links to the same bytes keep them
    file.write_bytes(content)


DAMAGES: Mapping[str, Callable[[Path, random.Random], object]] = {
    "a bit is flipped": _flip,
    "a page is zeroed": _zero_page,
    "the end is missing": _cut,
    "another file's content": _swap,
    "removed": lambda file, rng: file.unlink(),
    "empty": lambda file, rng: _replace(file, b""),
    "garbage": lambda file, rng: _replace(file, rng.randbytes(200)),
}


class TrackingServer:
    """A server of one answer, on a port of its own."""

    def __init__(self, behave: Callable[[http.server.BaseHTTPRequestHandler], object] | None) -> None:
        """behave: answers a request; None closes the port."""

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert behave is not None
                with suppress(OSError):
                    behave(self)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        if behave is None:
            self._server.server_close()
        else:
            threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._is_open = behave is not None

    def __enter__(self) -> TrackingServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            self._server.shutdown()
            self._server.server_close()


def _answer(status: int, body: bytes = b"{}") -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def behave(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.end_headers()
        request.wfile.write(body)

    return behave


SERVERS: Mapping[str, Callable[[http.server.BaseHTTPRequestHandler], object] | None] = {
    "is away": None,
    "answers 500": _answer(500),
    "answers 401": _answer(401),
    "answers garbage": _answer(200, b"\0garbage"),
    "cuts connections": lambda request: request.connection.shutdown(socket.SHUT_RDWR),
    "does not answer": lambda request: time.sleep(20),
}


# Comparing -----------------------------------------------------------------------------------------------------------


def compare_outcomes(outcome: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Say in which part two outcomes differ; empty if in none."""
    for key, value in expected.items():
        if outcome.get(key) != value:
            return f"{key} differ from those of a run without the fault"
    return ""


def _outcome(folder: Path) -> dict[str, Any]:
    """Read what a run has left, without its times."""
    try:
        results = json.loads((folder / "results.json").read_text())
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        return {"results": str(error)}
    notes = results.pop("notes", [])
    for line in lines:
        notes = [*notes, *line.pop("notes", [])]
    results, lines = _without_times(results), _without_times(lines)
    return {"results": results, "lines": lines, "policies": _policies(folder)} | ({"notes": notes} if notes else {})


def _without_times(value: Any) -> Any:
    """Leave out what is measured by a clock."""
    if isinstance(value, list):
        return [_without_times(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_times(each) for key, each in value.items() if not key.endswith(("seconds", "SPS", "_s"))}


def _policies(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "policies").glob("*.safetensors"))}


def _count_rounds(folder: Path) -> int:
    rounds = folder / "rounds.jsonl"
    return rounds.read_bytes().count(b"\n") if rounds.is_file() else 0


def _log(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def _last_line(out: Path) -> str:
    return next((line for line in reversed(_log(out).read_text().splitlines()) if line.strip()), "without a word")[:300]


def _end(process: BaseProcess) -> int | None:
    """Wait for the end of a process, and return its exit code."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode
