"""A whole federation on our local engine, beside the same work on Flower's Ray simulation with stable-baselines3.

Every client has 8 copies of its task, 128 steps between updates, 4 epochs of 4 minibatches, a policy and a critic of
64x64 tanh units; a round is `--steps` environment steps for each and the average of all that they learned. The peer
(benchmarks/ray_peer) is Flower's own FedAvg with one Ray actor for each core, which keeps the environments and the
optimiser of every client that it has met, one thread, no render mode, and no SuperLink to start. A third contestant is
our own clients, trained one after another in one process.

With `--part idle` the clients do nothing and the messages have 100 KB: what a round costs by itself.

    python -m benchmarks.federation --part work --tasks CartPole-v1 --clients 64 --repetitions 5
    python -m benchmarks.federation --part idle --clients 10,100,1000,10000

Contestants take turns, each in a process of its own, so that what else the machine does hits all. Every measurement
appends a JSON line to benchmarks/results/federation.jsonl and is not made again; a table is printed at the end. Rounds
are timed after the first two, in which processes start and environments are made; the whole is the process from its
start to its end.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks.learning import machine_kind

FOLDER = Path(__file__).parent
FILE = FOLDER / "results" / "federation.jsonl"
WARM = 2
"""Rounds at the beginning that are not timed."""
TASKS = {"CartPole-v1": (8, 20), "LunarLander-v3": (3, 6), "HalfCheetah-v5": (2, 4)}
"""With the ratio to the peer that we hold ourselves to, and the one that we want."""
IN_TURN, IDLE = (4, 6), (40, 100)
"""The same against our clients in turn, and for idle rounds of 1,000 clients."""
NOTHING = "nothing"
"""What idle clients do."""
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
PEER, OURS, ALONE, STILL = "peer", "ours", "in-turn", "idle"
PACKAGES = ("grpo-fed", "flwr", "ray", "stable-baselines3", "torch", "gymnasium", "numpy")


@dataclass(frozen=True)
class Work:
    """What a contestant is to do."""

    task: str
    """A gymnasium id, or `NOTHING`."""
    clients: int
    rounds: int
    """With those that are not timed."""
    steps: int
    """Of a client in a round."""


@dataclass(frozen=True)
class Measurement:
    """A line of the results file."""

    contestant: str
    work: Work
    repetition: int
    round_seconds: Sequence[float]
    """Of all rounds; the first are not used."""
    whole_seconds: float
    """Of the process."""
    peak_mb: float
    """Most memory of the process that has the server, without other processes."""
    machine: str
    versions: Mapping[str, str]

    @property
    def key(self) -> tuple[str, Work, int]:
        return self.contestant, self.work, self.repetition

    @property
    def round(self) -> float:
        """Seconds of a round."""
        return median(self.round_seconds[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("work", "idle"), action="append", help="may be repeated; default: both")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated; default: all three")
    parser.add_argument("--clients", help="how many, comma-separated; default: 64, or idle 10,100,1000,10000")
    parser.add_argument("--rounds", type=int, default=5, help=f"of which the first {WARM} are not timed")
    parser.add_argument("--steps", type=int, default=2048, help="environment steps of a client in a round")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--contestants", default=f"{OURS},{PEER},{ALONE}", help="default: all three")
    parser.add_argument("--most", type=int, default=1000, help="idle clients that the peer is asked for at most")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    if arguments.rounds <= WARM:
        raise ValueError(f"--rounds {arguments.rounds}: the first {WARM} are not timed; give more")
    chosen = arguments.contestants.split(",")
    done = {measured.key for measured in read(arguments.results)}
    for contestant, work, repetition in planned(arguments):
        name = contestant if contestant != STILL else OURS
        if name in chosen and (contestant, work, repetition) not in done:
            measured = measure(contestant, work, repetition)
            append(measured, arguments.results)
            print(
                f"{contestant} {work.task} x {work.clients}, repetition {repetition}: {measured.round:.3f} s a round,"
                f" {measured.whole_seconds:.1f} s the whole, {measured.peak_mb:.0f} MB",
                flush=True,
            )
    print("\n".join(lines(read(arguments.results))))


def planned(arguments: argparse.Namespace) -> Iterator[tuple[str, Work, int]]:
    """Repetition by repetition, the contestants next to each other."""
    parts = arguments.part or ("work", "idle")
    if unknown := set(arguments.tasks.split(",")) - set(TASKS):
        raise ValueError(f"--tasks: no {sorted(unknown)}; there are {sorted(TASKS)}")
    for repetition in range(arguments.repetitions):
        if "work" in parts:
            for task in arguments.tasks.split(","):
                for clients in numbers(arguments.clients or "64"):
                    work = Work(task, clients, arguments.rounds, arguments.steps)
                    for contestant in (OURS, PEER, ALONE):
                        yield contestant, work, repetition
        if "idle" in parts:
            for clients in numbers(arguments.clients or "10,100,1000,10000"):
                work = Work(NOTHING, clients, arguments.rounds, arguments.steps)
                yield STILL, work, repetition
                if clients <= arguments.most:
                    yield PEER, work, repetition


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def measure(contestant: str, work: Work, repetition: int) -> Measurement:
    """One contestant in a process of its own."""
    told = json.dumps(asdict(work))
    command = ["sb3_peer"] if contestant == PEER else ["benchmarks.contestants", contestant]
    paths = [str(FOLDER / "ray_peer"), str(FOLDER.parent)]
    environment = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths)}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command, told], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{contestant}, {work}: {done.stderr[-3000:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return Measurement(
        contestant,
        work,
        repetition,
        [round(each, 6) for each in said["round_seconds"]],
        round(seconds, 3),
        round(said["peak_mb"], 1),
        machine_kind(),
        {name: version(name) for name in PACKAGES},
    )


def append(measured: Measurement, results: Path) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(asdict(measured)) + "\n")


def read(results: Path) -> list[Measurement]:
    """Everything that was measured."""
    if not results.exists():
        return []
    found = [json.loads(line) for line in results.read_text().splitlines()]
    return [Measurement(**{**one, "work": Work(**one["work"])}) for one in found]


# Tables --------------------------------------------------------------------------------------------------------------


def lines(measured: Sequence[Measurement]) -> Iterator[str]:
    """Both tables, as far as there is something for them."""
    by_work: dict[Work, dict[str, list[Measurement]]] = {}
    for one in measured:
        by_work.setdefault(one.work, {}).setdefault(one.contestant, []).append(one)
    busy = {work: found for work, found in by_work.items() if work.task != NOTHING}
    still = {work: found for work, found in by_work.items() if work.task == NOTHING}
    if busy:
        yield from busy_table(busy)
    if busy and still:
        yield ""
    if still:
        yield from still_table(still)


def busy_table(by_work: Mapping[Work, Mapping[str, Sequence[Measurement]]]) -> Iterator[str]:
    """Seconds of a round and of the whole, medians, and how many times as long the others take."""
    yield (
        "| task | clients x steps | ours, s a round | peer | ratio | at least | wanted | in turn | ratio"
        " | the whole, ours | peer | ratio | repetitions |"
    )
    yield "| --- " * 13 + "|"
    for work, found in sorted(by_work.items(), key=lambda item: (list(TASKS).index(item[0].task), item[0].clients)):
        mine, peer, alone = (round_of(found.get(name, ())) for name in (OURS, PEER, ALONE))
        whole, peers_whole = (whole_of(found.get(name, ())) for name in (OURS, PEER))
        least, wanted = TASKS[work.task]
        cells = [
            work.task,
            f"{work.clients} x {work.steps:,}",
            *(cell(mine, ".2f"), cell(peer, ".2f"), ratio(peer, mine), f"{least}", f"{wanted}"),
            *(cell(alone, ".2f"), ratio(alone, mine)),
            *(cell(whole, ".1f"), cell(peers_whole, ".1f"), ratio(peers_whole, whole)),
            f"{min(len(own) for own in found.values())}",
        ]
        yield f"| {' | '.join(cells)} |"


def still_table(by_work: Mapping[Work, Mapping[str, Sequence[Measurement]]]) -> Iterator[str]:
    """What a round costs in which clients do nothing."""
    yield "| idle clients | ours, ms a round | ms a client | peak MB | peer, ms a round | ratio | repetitions |"
    yield "| --- " * 7 + "|"
    for work, found in sorted(by_work.items(), key=lambda item: item[0].clients):
        mine, peer = (round_of(found.get(name, ())) for name in (STILL, PEER))
        each = None if mine is None else 1e3 * mine / work.clients
        memory = median(one.peak_mb for one in found[STILL]) if STILL in found else None
        cells = [
            f"{work.clients:,}",
            *(cell(None if mine is None else 1e3 * mine, ".1f"), cell(each, ".3f"), cell(memory, ".0f")),
            *(cell(None if peer is None else 1e3 * peer, ",.0f"), ratio(peer, mine)),
            f"{min(len(own) for own in found.values())}",
        ]
        yield f"| {' | '.join(cells)} |"


def round_of(measured: Sequence[Measurement]) -> float | None:
    """Seconds of a round, the median of all repetitions."""
    return median(one.round for one in measured) if measured else None


def whole_of(measured: Sequence[Measurement]) -> float | None:
    return median(one.whole_seconds for one in measured) if measured else None


def ratio(theirs: float | None, mine: float | None) -> str:
    return "" if theirs is None or mine is None else f"{theirs / mine:.1f}"


def cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    main()
