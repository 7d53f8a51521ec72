"""Time a whole federation on our local engine beside the same work on Flower's Ray simulation with stable-baselines3.

Every client has 8 copies of its task, 128 steps between updates, 4 epochs of 4 minibatches, a policy and a critic of
64x64 tanh units; a round is `--steps` environment steps for each and the average of all that they learned. The peer
(benchmarks/ray_peer) is Flower's own FedAvg with one Ray actor for each core. An actor keeps the environments and the
optimiser of every client that it has trained, uses one thread and no render mode, and no SuperLink has to be started. A
third contestant is our own clients, trained one after another in one process.

With `--part idle` the clients do nothing and the messages have 100 KB, which shows what a round itself costs.

    python -m benchmarks.federation --part work --tasks CartPole-v1 --clients 64 --repetitions 5
    python -m benchmarks.federation --part idle --clients 10,100,1000,10000

Contestants take turns, each in a process of its own, so that other work on the machine slows down all of them alike.
Every measurement appends a JSON line to benchmarks/results/federation.jsonl and is not repeated; a table is printed at
the end. The first two rounds, in which processes start and environments are made, are not timed; "the whole" is the
process from its start to its end.
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

from benchmarks.learning import describe_machine

FOLDER = Path(__file__).parent
FILE = FOLDER / "results" / "federation.jsonl"
WARM_UP_ROUNDS = 2
"""Number of rounds at the beginning that are not timed."""
TASKS = {"CartPole-v1": (8, 20), "LunarLander-v3": (3, 6), "HalfCheetah-v5": (2, 4)}
"""For each task, the ratio to the peer that must be reached, and the one that is wanted."""
IN_TURN_TARGETS, IDLE_TARGETS = (4, 6), (40, 100)
"""The same two ratios against our clients trained in turn, and for rounds of 1,000 idle clients."""
NO_TASK = "nothing"
"""The task of idle clients."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
PEER, OURS, IN_TURN, IDLE = "peer", "ours", "in-turn", "idle"
PACKAGES = ("grpo-fed", "flwr", "ray", "stable-baselines3", "torch", "gymnasium", "numpy")


@dataclass(frozen=True)
class Work:
    """The work that a contestant has to do."""

    task: str
    """A gymnasium id, or `NO_TASK`."""
    clients: int
    rounds: int
    """Number of rounds, with those that are not timed."""
    steps: int
    """Environment steps of a client in a round."""


@dataclass(frozen=True)
class Measurement:
    """One measurement: a line of the results file."""

    contestant: str
    work: Work
    repetition: int
    round_seconds: Sequence[float]
    """Seconds of every round; the first ones are not used."""
    whole_seconds: float
    """Seconds of the process from its start to its end."""
    peak_mb: float
    """Peak memory of the process that runs the server, without other processes."""
    machine: str
    versions: Mapping[str, str]

    @property
    def key(self) -> tuple[str, Work, int]:
        return self.contestant, self.work, self.repetition

    @property
    def round(self) -> float:
        """The median seconds of a timed round."""
        return median(self.round_seconds[WARM_UP_ROUNDS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("work", "idle"), action="append", help="may be repeated; default: both")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated; default: all three")
    parser.add_argument("--clients", help="numbers, comma-separated; default: 64, and 10,100,1000,10000 idle ones")
    parser.add_argument("--rounds", type=int, default=5, help=f"rounds; the first {WARM_UP_ROUNDS} are not timed")
    parser.add_argument("--steps", type=int, default=2048, help="environment steps of a client in a round")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--contestants", default=f"{OURS},{PEER},{IN_TURN}", help="default: all three")
    parser.add_argument("--most", type=int, default=1000, help="largest number of idle clients for the peer")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    if arguments.rounds <= WARM_UP_ROUNDS:
        raise ValueError(f"--rounds {arguments.rounds}: the first {WARM_UP_ROUNDS} are not timed; give more")
    chosen = arguments.contestants.split(",")
    done = {measured.key for measured in read_measurements(arguments.results)}
    for contestant, work, repetition in plan_measurements(arguments):
        name = contestant if contestant != IDLE else OURS
        if name in chosen and (contestant, work, repetition) not in done:
            measured = measure(contestant, work, repetition)
            append_measurement(measured, arguments.results)
            print(
                f"{contestant} {work.task} x {work.clients}, repetition {repetition}: {measured.round:.3f} s a round,"
                f" {measured.whole_seconds:.1f} s the whole, {measured.peak_mb:.0f} MB",
                flush=True,
            )
    print("\n".join(format_tables(read_measurements(arguments.results))))


def plan_measurements(arguments: argparse.Namespace) -> Iterator[tuple[str, Work, int]]:
    """List what to measure: repetition by repetition, with the contestants next to each other."""
    parts = arguments.part or ("work", "idle")
    if unknown := set(arguments.tasks.split(",")) - set(TASKS):
        raise ValueError(f"--tasks: no {sorted(unknown)}; there are {sorted(TASKS)}")
    for repetition in range(arguments.repetitions):
        if "work" in parts:
            for task in arguments.tasks.split(","):
                for clients in parse_numbers(arguments.clients or "64"):
                    work = Work(task, clients, arguments.rounds, arguments.steps)
                    for contestant in (OURS, PEER, IN_TURN):
                        yield contestant, work, repetition
        if "idle" in parts:
            for clients in parse_numbers(arguments.clients or "10,100,1000,10000"):
                work = Work(NO_TASK, clients, arguments.rounds, arguments.steps)
                yield IDLE, work, repetition
                if clients <= arguments.most:
                    yield PEER, work, repetition


def parse_numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def measure(contestant: str, work: Work, repetition: int) -> Measurement:
    """Run one contestant in a process of its own, and time it."""
    instructions = json.dumps(asdict(work))
    command = ["sb3_peer"] if contestant == PEER else ["benchmarks.contestants", contestant]
    paths = [str(FOLDER / "ray_peer"), str(FOLDER.parent)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command, instructions], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{contestant}, {work}: {done.stderr[-3000:]}")
    output = json.loads(done.stdout.strip().splitlines()[-1])
    return Measurement(
        contestant,
        work,
        repetition,
        [round(each, 6) for each in output["round_seconds"]],
        round(seconds, 3),
        round(output["peak_mb"], 1),
        describe_machine(),
        {name: version(name) for name in PACKAGES},
    )


def append_measurement(measured: Measurement, results: Path) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(asdict(measured)) + "\n")


def read_measurements(results: Path) -> list[Measurement]:
    """Read all measurements of a results file."""
    if not results.exists():
        return []
    by_contestant = [json.loads(line) for line in results.read_text().splitlines()]
    return [Measurement(**{**measurement, "work": Work(**measurement["work"])}) for measurement in by_contestant]


# Tables --------------------------------------------------------------------------------------------------------------


def format_tables(measured: Sequence[Measurement]) -> Iterator[str]:
    """Write both tables, as far as there are measurements for them."""
    by_work: dict[Work, dict[str, list[Measurement]]] = {}
    for measurement in measured:
        by_work.setdefault(measurement.work, {}).setdefault(measurement.contestant, []).append(measurement)
    with_task = {work: by_contestant for work, by_contestant in by_work.items() if work.task != NO_TASK}
    idle = {work: by_contestant for work, by_contestant in by_work.items() if work.task == NO_TASK}
    if with_task:
        yield from format_work_table(with_task)
    if with_task and idle:
        yield ""
    if idle:
        yield from format_idle_table(idle)


def format_work_table(by_work: Mapping[Work, Mapping[str, Sequence[Measurement]]]) -> Iterator[str]:
    """Write the medians of the seconds of a round and of the whole, and how many times as long the others take."""
    yield (
        "| task | clients x steps | ours, s a round | peer | ratio | at least | wanted | in turn | ratio"
        " | the whole, ours | peer | ratio | repetitions |"
    )
    yield "| --- " * 13 + "|"
    for work, by_contestant in sorted(
        by_work.items(), key=lambda item: (list(TASKS).index(item[0].task), item[0].clients)
    ):
        ours, peer, in_turn = (median_round(by_contestant.get(name, ())) for name in (OURS, PEER, IN_TURN))
        whole, peers_whole = (median_whole(by_contestant.get(name, ())) for name in (OURS, PEER))
        least, wanted = TASKS[work.task]
        cells = [
            work.task,
            f"{work.clients} x {work.steps:,}",
            *(format_cell(ours, ".2f"), format_cell(peer, ".2f"), format_ratio(peer, ours), f"{least}", f"{wanted}"),
            *(format_cell(in_turn, ".2f"), format_ratio(in_turn, ours)),
            *(format_cell(whole, ".1f"), format_cell(peers_whole, ".1f"), format_ratio(peers_whole, whole)),
            f"{min(len(measurements) for measurements in by_contestant.values())}",
        ]
        yield f"| {' | '.join(cells)} |"


def format_idle_table(by_work: Mapping[Work, Mapping[str, Sequence[Measurement]]]) -> Iterator[str]:
    """Write what a round costs in which clients do nothing."""
    yield "| idle clients | ours, ms a round | ms a client | peak MB | peer, ms a round | ratio | repetitions |"
    yield "| --- " * 7 + "|"
    for work, by_contestant in sorted(by_work.items(), key=lambda item: item[0].clients):
        ours, peer = (median_round(by_contestant.get(name, ())) for name in (IDLE, PEER))
        each = None if ours is None else 1e3 * ours / work.clients
        memory = median(measurement.peak_mb for measurement in by_contestant[IDLE]) if IDLE in by_contestant else None
        cells = [
            f"{work.clients:,}",
            *(
                format_cell(None if ours is None else 1e3 * ours, ".1f"),
                format_cell(each, ".3f"),
                format_cell(memory, ".0f"),
            ),
            *(format_cell(None if peer is None else 1e3 * peer, ",.0f"), format_ratio(peer, ours)),
            f"{min(len(measurements) for measurements in by_contestant.values())}",
        ]
        yield f"| {' | '.join(cells)} |"


def median_round(measured: Sequence[Measurement]) -> float | None:
    """Compute the median seconds of a round over all repetitions."""
    return median(measurement.round for measurement in measured) if measured else None


def median_whole(measured: Sequence[Measurement]) -> float | None:
    return median(measurement.whole_seconds for measurement in measured) if measured else None


def format_ratio(peer: float | None, ours: float | None) -> str:
    return "" if peer is None or ours is None else f"{peer / ours:.1f}"


def format_cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    main()
