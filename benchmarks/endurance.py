"""Whether memory, handles, disk and seconds a round stay flat over thousands of rounds.

    python -m benchmarks.endurance                          2,000 rounds of 64 clients on the local engine
    python -m benchmarks.endurance deployment --hours 2     runs on a deployment with TLS and keys, one after another

Every few seconds the resident memory and the open handles of all processes are added up, and the bytes in the folders.
The slope of a quantity is fitted by least squares to the means of 20 equal parts of the time, without the first tenth,
in which processes start and caches fill; its interval is Student's, at 95 %. A slope is flat if its interval holds 0,
or if its upper end, over a whole day, stays below a tenth of the mean. A finished measurement replaces the line of its
engine in benchmarks/results/endurance.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.learning import describe_machine
from benchmarks.trusted_deployment import CONNECTION, TrustedDeployment, read_descendants
from grpo_fed.engines.flower.engine import FlowerEngine
from grpo_fed.engines.start import run
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario

FILE = Path(__file__).parent / "results" / "endurance.jsonl"
WARM_UP = 0.1
"""The part of the time that is left out at the beginning."""
PARTS = 20
"""Parts of the time whose means are fitted, since neighbouring samples are not independent."""
DAY = 86400.0
SCENARIO = """
name = "endurance"
method = "fedavg"
rounds = {rounds}
steps = 64
seed = {seed}
device = "cpu"
policy = {{ hidden = [16] }}
rollout = {{ num_envs = 2, horizon = 32 }}
objective = {{ epochs = 1, minibatches = 1 }}
evaluate = {{ episodes = 1, every = 50 }}
checkpoint = {{ every = 10, keep = 2 }}
[[clients]]
name = "cart"
env = "grpo_fed/CartPole-v1"
count = {clients}
"""
DEPLOYED_CLIENTS, DEPLOYED_ROUNDS = 4, 200
"""Clients of the deployment, and rounds of each of its runs."""
QUANTITIES = {
    "memory_mb": "memory, MB",
    "handles": "open handles",
    "disk_mb": "disk without the rounds' lines, MB",
    "lines_mb": "the rounds' lines, MB",
    "round_seconds": "seconds a round",
}


@dataclass
class Samples:
    """What was measured, with the second at which it was."""

    seconds: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    handles: list[float] = field(default_factory=list)
    disk_mb: list[float] = field(default_factory=list)
    lines_mb: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Slope:
    """How a quantity changes: its mean, and its change in an hour with a 95 % interval."""

    mean: float
    per_hour: float
    low: float
    high: float

    @property
    def is_flat(self) -> bool:
        """Whether the interval holds 0, or whether a day adds less than a tenth."""
        return self.low <= 0 <= self.high or self.high * DAY / 3600 < 0.1 * self.mean


def fit_slope(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """Fit a line to the means of parts of the time; ValueError with fewer than two samples for each part."""
    if len(values) < 2 * PARTS:
        raise ValueError(f"{len(values)} samples are too few for a slope: let it run longer")
    times, given = np.asarray(seconds, float), np.asarray(values, float)
    late = times >= times[0] + WARM_UP * (times[-1] - times[0])
    times, given = times[late], given[late]
    if len(given) >= 2 * PARTS:
        times, given = (np.array([part.mean() for part in np.array_split(each, PARTS)]) for each in (times, given))
    fit = stats.linregress(times / 3600, given)
    reach = stats.t.ppf(0.975, len(times) - 2) * fit.stderr
    return Slope(float(given.mean()), float(fit.slope), float(fit.slope - reach), float(fit.slope + reach))


class Sampler:
    """Takes samples of the processes that descend from some, in a thread of its own."""

    def __init__(self, roots: Sequence[int], folders: Sequence[Path], pause: float) -> None:
        self.samples, self._roots, self._folders, self._pause = Samples(), roots, folders, pause
        self._began, self._stopping = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(self._pause):
            memory = handles = 0.0
            for pid in read_descendants(self._roots):
                with suppress(OSError):  # it has ended meanwhile
                    memory += read_proportional_mb(pid)
                    handles += len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208, faster than a path for each
            lines, disk = measure_disk(self._folders)
            samples = self.samples
            samples.seconds.append(time.monotonic() - self._began)
            samples.memory_mb.append(memory)
            samples.handles.append(handles)
            samples.disk_mb.append(disk / 1e6)
            samples.lines_mb.append(lines / 1e6)


def read_proportional_mb(pid: int) -> float:
    """Read the memory of a process in MB; a page that several processes share counts for each in part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def measure_disk(folders: Sequence[Path]) -> tuple[int, int]:
    """Add up the bytes of the rounds' lines, and those of all other files; a file with several names counts once."""
    lines, rest, seen = 0, 0, set()
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):
                    status = os.stat(f"{parent}/{name}")  # noqa: PTH116, a path for each of them takes long
                    if status.st_ino in seen:
                        continue
                    seen.add(status.st_ino)
                    if name == "rounds.jsonl":
                        lines += status.st_size
                    else:
                        rest += status.st_blocks * 512
    return lines, rest


def endure_locally(rounds: int, clients: int, seed: int) -> dict[str, Any]:
    """Run a federation on the local engine, and measure it."""
    began, seconds, times = time.monotonic(), list[float](), list[float]()

    def watch(record: RoundRecord) -> None:
        if record.round:
            seconds.append(record.seconds)
            times.append(time.monotonic() - began)

    with tempfile.TemporaryDirectory() as name:
        sampler = Sampler([os.getpid()], [Path(name)], 1.0)
        scenario = Scenario.loads(SCENARIO.format(rounds=rounds, seed=seed, clients=clients))
        result = run(scenario, Path(name) / "run", watch)
        sampler.close()
    return {
        "engine": "local",
        "clients": clients,
        "rounds": result.rounds,
        "runs": 1,
        "failures": sum(map(len, result.missing.values())),
        "hours": (time.monotonic() - began) / 3600,
        **describe_slopes(sampler.samples, times, seconds),
    }


def endure_deployed(hours: float, pause: float, seed: int) -> dict[str, Any]:
    """Run federations on a deployment, one after another, until the time is over, and measure its processes.

    pause: seconds between two runs, which leave the machine to others.
    """
    began, seconds, times, failures, runs = time.monotonic(), list[float](), list[float](), 0, 0

    def watch(record: RoundRecord) -> None:
        if record.round:
            seconds.append(record.seconds)
            times.append(time.monotonic() - began)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clients = [f"cart-{number}" for number in range(DEPLOYED_CLIENTS)]
        with TrustedDeployment(folder, clients) as deployment:
            roots = [process.pid for process in deployment.processes.values()]
            sampler = Sampler(roots, [folder], 5.0)
            while time.monotonic() < began + 3600 * hours:
                given = {"rounds": DEPLOYED_ROUNDS, "seed": seed + runs, "clients": DEPLOYED_CLIENTS}
                engine = FlowerEngine(Scenario.loads(SCENARIO.format(**given)), folder / "run", "flower", CONNECTION)
                engine.replace = runs > 0
                with engine:
                    result = engine.run(watch)
                runs, failures = runs + 1, failures + sum(map(len, result.missing.values()))
                print(f"{runs} runs, {len(seconds)} rounds, {(time.monotonic() - began) / 60:.0f} minutes", flush=True)
                time.sleep(pause)
            sampler.close()
    return {
        "engine": "deployment",
        "clients": DEPLOYED_CLIENTS,
        "rounds": len(seconds),
        "runs": runs,
        "failures": failures,
        "hours": (time.monotonic() - began) / 3600,
        **describe_slopes(sampler.samples, times, seconds),
    }


def describe_slopes(samples: Samples, times: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """Fit the slope of each quantity."""
    slopes = {name: fit_slope(samples.seconds, values) for name, values in vars(samples).items() if name in QUANTITIES}
    return {
        "slopes": {name: asdict(slope) for name, slope in slopes.items()}
        | {"round_seconds": asdict(fit_slope(times, seconds))}
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("local", "deployment"), nargs="?", default="local")
    parser.add_argument("--rounds", type=int, default=2000, help="on the local engine; default: 2000")
    parser.add_argument("--clients", type=int, default=64, help="on the local engine; default: 64")
    parser.add_argument("--hours", type=float, default=2.0, help="of the deployment; default: 2")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between runs on the deployment")
    parser.add_argument("--seed", type=int, default=900)
    parser.add_argument("--results", type=Path, default=FILE)
    options = parser.parse_args()
    if options.engine == "local":
        line = endure_locally(options.rounds, options.clients, options.seed)
    else:
        line = endure_deployed(options.hours, options.pause, options.seed)
    line["machine"] = describe_machine()
    others = [each for each in read_results(options.results) if each["engine"] != line["engine"]]
    options.results.write_text("".join(f"{json.dumps(each)}\n" for each in (*others, line)))
    print("\n".join(format_table([line])))


def read_results(file: Path = FILE) -> list[dict[str, Any]]:
    """Read the measurements."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def format_table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Write a table with a row for each quantity of each measurement."""
    if not results:
        return
    for line in sorted(results, key=lambda line: line["engine"], reverse=True):
        runs = "a run" if line["runs"] == 1 else f"{line['runs']} runs one after another"
        yield (
            f"{line['engine']}: {runs} of {line['clients']} clients, {line['rounds']:,} rounds in"
            f" {line['hours']:.2f} hours, {line['failures']} answers missing.\n"
        )
        yield "| quantity | mean | change in an hour | flat |"
        yield "| --- | --- | --- | --- |"
        for name, words in QUANTITIES.items():
            slope = Slope(**line["slopes"][name])
            numbers = [format_number(each) for each in (slope.per_hour, slope.low, slope.high)]
            flat = "grows by design" if name == "lines_mb" else "yes" if slope.is_flat else "no"
            yield f"| {words} | {format_number(slope.mean)} | {numbers[0]} [{numbers[1]}, {numbers[2]}] | {flat} |"
        yield ""


def format_number(value: float) -> str:
    """Write a number with three significant digits, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


if __name__ == "__main__":
    main()
