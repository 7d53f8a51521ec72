"""Repeat deployed runs whose rounds do not wait, from their recorded order, and compare the bits.

Each run is a deployment of its own on this machine: a SuperLink, the server's app and a node with six clients, the
scenario `contrary` with a buffer of half of them. Who answers first depends on the machine. The local engine then
repeats the order of events, and the shared blocks after each merge are compared by their digests.

    python -m benchmarks.replays --runs 20

Every finished run appends a JSON line to benchmarks/results/replays.jsonl and is not repeated. Run it without
PYTHONPATH, from the checkout, as the deployment's processes load the installed package.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from grpo_fed.engines.flower.engine import FlowerEngine
from grpo_fed.engines.replay_order import replay_order
from grpo_fed.runs.merge_order import read_orders
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

FIRST_SEED = 500
FILE = Path(__file__).parent / "results" / "replays.jsonl"
CHANGES = ('round.mode="buffered"', "round.buffer=0.5", "rounds=20", "steps=1024", "evaluate.every=0", 'device="cpu"')


@dataclass(frozen=True)
class Repetition:
    """A deployed run and its repetition: a line of results."""

    seed: int
    merges: int
    stale: int
    """Answers that were one merge old or more."""
    oldest: int
    """The greatest age of an answer, in merges."""
    first_difference: int | None
    """The first merge after which the bits differed; None if all were the same."""
    seconds: float
    """Of the deployed run, from its start to its end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help=f"seeds from {FIRST_SEED} on; default: 20")
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    done = {each.seed for each in read_results(arguments.results)}
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.runs):
        if seed not in done:
            repetition = repeat_run(seed)
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(repetition)) + "\n")
            print(repetition, flush=True)
    print("\n".join(format_table(read_results(arguments.results))))


def repeat_run(seed: int) -> Repetition:
    """Make a deployed run and repeat it."""
    scenario = Scenario.load(find_scenario("contrary"), (*CHANGES, f"seed={seed}"))
    ages: list[int] = []

    def note_ages(record: RoundRecord) -> None:
        ages.extend(client.age for client in record.clients if client.age is not None)

    with TemporaryDirectory() as folder:
        run, start = Path(folder) / "run", time.monotonic()
        result = FlowerEngine(scenario, run).run(note_ages)
        seconds = time.monotonic() - start
        if result.status != "finished" or len(read_orders(run)) != scenario.rounds:
            raise RuntimeError(f"seed {seed}: the deployed run ended as {result.status}")
        repeated = replay_order(run, Path(folder) / "again", False, lambda record: None)
    stale = sum(age > 0 for age in ages)
    return Repetition(seed, repeated.merges, stale, max(ages), repeated.first_difference, round(seconds, 1))


def read_results(results: Path = FILE) -> list[Repetition]:
    """Read all finished runs."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [Repetition(**json.loads(line)) for line in lines]


def format_table(results: Sequence[Repetition]) -> Iterator[str]:
    """Write the result as a sentence."""
    if not results:
        return
    same = sum(each.first_difference is None for each in results)
    merges, stale = sum(each.merges for each in results), sum(each.stale for each in results)
    yield (
        f"{same} of {len(results)} deployed runs were repeated to the same bits after each of {merges} merges in all. "
        f"{stale} of their answers were one merge old or older, the oldest {max(each.oldest for each in results)}."
    )


if __name__ == "__main__":
    main()
