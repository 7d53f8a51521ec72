"""Runs with planted structure, one line of results each."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import grpo_fed
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario

FOLDER = Path(__file__).parent / "structures"


@dataclass(frozen=True)
class Case:
    """A scenario in `benchmarks/structures`, and what is planted in it."""

    name: str
    """The scenario's file, without `.toml`."""
    planted: Mapping[str, str]
    """For entries of the scenario whose clients should leave something, the block; `*` where any would do."""
    since: int = 1
    """The round from which the clients differ."""
    fast: str | None = None
    """The entry whose client learns at ten times the rate."""
    other_half: str | None = None
    """The entry whose clients might as well leave instead of those that are planted."""


CASES = (
    Case("cart-alike", {}),
    Case("cart-swapped", {"swapped": "actor"}),
    Case("cart-permuted", {"permuted": "torso.0"}),
    Case("cart-both", {"swapped": "actor", "permuted": "torso.0"}),
    Case("cart-halves", {"swapped": "actor"}, other_half="cart"),
    Case("cart-fast", {}, fast="fast"),
    Case("cart-noisy", {}),
    Case("cart-poles", {}),
    Case("cart-late", {"late": "*"}, since=15),
    Case("pendulum-turned", {"turned": "*"}),
    Case("acrobot-swapped", {"swapped": "*"}),
    Case("points-contrary", {"west": "*"}),
)
CASE_OF = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Cell:
    """A case with a learner."""

    case: str
    rate: float
    schedule: str
    epochs: int
    step: str = "adam"
    rounds: int = 0
    """Rounds; 0 for those of the scenario."""

    def overrides(self) -> Iterator[str]:
        """Yield what is changed in the scenario, as after `--set`."""
        yield f"objective.learning_rate={self.rate}"
        yield f'objective.schedule="{self.schedule}"'
        if self.step == "adam":
            yield f"objective.epochs={self.epochs}"
        else:
            yield 'objective.preset="npg"'
        if self.rounds:
            yield f"rounds={self.rounds}"
        case = CASE_OF[self.case]
        if case.fast is not None:
            entries = [client.name for client in Scenario.load(FOLDER / f"{self.case}.toml").clients]
            yield f"clients.{entries.index(case.fast)}.learning_rate={10 * self.rate}"


@dataclass(frozen=True)
class Trial:
    """A run to make."""

    cell: Cell
    method: str
    """`grpo`; `evidence`, which is grpo without playing; `huber`, which is grpo as it was before, with a threshold by
    chance; or another method."""
    seed: int

    def load(self) -> Scenario:
        """Load the scenario."""
        changes = [*self.cell.overrides(), f"seed={self.seed}", 'device="cpu"', "evaluate.every=0"]
        path = FOLDER / f"{self.cell.case}.toml"
        match self.method:
            case "evidence":
                changes += ["merge.confirm=evidence", "merge.rejoin=0"]
            case "huber":
                scenario = Scenario.load(path, changes)
                changes += ["merge.rule=huber", f"merge.threshold={chance_threshold(scenario)}"]
            case method:
                changes.append(f"method={method}")
        return Scenario.load(path, changes)


@dataclass(frozen=True)
class StructureRun:
    """A finished run: a line of results."""

    cell: Cell
    method: str
    seed: int
    rounds: int
    groups: int
    """Groups of the shared blocks, each of which is a block here."""
    moves: Sequence[tuple[int, str, str, bool]]
    """Round, client, block, and whether the client left it; otherwise it came back."""
    scores: Mapping[str, float]
    """For each client, the mean return of the evaluation after the last round."""
    training: Mapping[str, float]
    """For each client, the mean return of the training episodes of the last third."""
    played: int
    """Episodes that were played to compare."""
    seconds: float

    @property
    def key(self) -> tuple[Cell, str, int]:
        return self.cell, self.method, self.seed

    @property
    def case(self) -> Case:
        return CASE_OF[self.cell.case]

    @cached_property
    def out(self) -> Mapping[tuple[str, str], Sequence[int]]:
        """For each client and block, the rounds in which the client did not share the block."""
        rounds: dict[tuple[str, str], list[int]] = {}
        for client in self.scores:
            left: set[str] = set()
            for number in range(1, self.rounds + 1):
                for at, who, block, leaves in self.moves:
                    if at == number and who == client:
                        left = left | {block} if leaves else left - {block}
                for block in left:
                    rounds.setdefault((client, block), []).append(number)
        return rounds

    @cached_property
    def planted(self) -> Mapping[str, str]:
        """The clients that should leave something, and the block; of two halves that which has left it more often."""
        planted = {
            name: block for name in self.scores for entry, block in self.case.planted.items() if is_of(name, entry)
        }
        if self.case.other_half is None:
            return planted
        (block,) = set(planted.values())
        other = {name: block for name in self.scores if is_of(name, self.case.other_half)}
        return max((planted, other), key=lambda half: sum(len(self.out.get((name, block), ())) for name in half))

    def found(self) -> Mapping[str, int | None]:
        """For each client that should leave something, after how many rounds it left what it should.

        None if it did not, or has come back by the end.
        """
        found: dict[str, int | None] = {}
        for client, planted in self.planted.items():
            rounds = [
                numbers
                for (who, block), numbers in self.out.items()
                if who == client and planted in (block, "*") and numbers[-1] == self.rounds
            ]
            found[client] = min((numbers[0] - self.case.since + 1 for numbers in rounds), default=None)
        return found

    def wrongly_out(self) -> tuple[int, int]:
        """Count the (client, block, round) that were out and should not have been, and all that should not."""
        count = total = 0
        for client in self.scores:
            planted = self.planted.get(client)
            if planted == "*":
                continue
            total += (self.groups - (planted is not None)) * self.rounds
            count += sum(len(at) for (who, block), at in self.out.items() if who == client and block != planted)
        return count, total

    def honest_out(self) -> bool:
        """Return whether a client that should leave nothing has left something."""
        return any(client not in self.planted for client, _ in self.out)


def is_of(client: str, entry: str) -> bool:
    """Return whether a client belongs to an entry of the scenario."""
    return client == entry or client.rpartition("-")[0] == entry


def chance_threshold(scenario: Scenario) -> float:
    """Compute the distance that two clients move apart by chance, learning rate x sqrt(2 x Adam's steps in a round)."""
    objective, rollout = scenario.objective, scenario.rollout
    updates = -(-scenario.steps // (rollout.num_envs * rollout.horizon))
    rates = [client.learning_rate for client in scenario.clients if client.learning_rate is not None]
    rate = max([objective.learning_rate, *rates])
    return max(0.02, rate * math.sqrt(2 * updates * objective.epochs * objective.minibatches))


def make_run(trial: Trial) -> StructureRun:
    """Make a run, with all clients in this process."""
    scenario = trial.load()
    records: list[RoundRecord] = []
    result = grpo_fed.run(scenario, watch=records.append, workers=0)
    moves: list[tuple[int, str, str, bool]] = []
    left: dict[str, tuple[str, ...]] = {}
    for record in records[1:]:
        for client in record.clients:
            before = left.get(client.client, ())
            moves += [(record.round, client.client, block, True) for block in client.departed if block not in before]
            moves += [(record.round, client.client, block, False) for block in before if block not in client.departed]
            left[client.client] = client.departed
    last = records[-(len(records) // 3) :]
    returns = {name: [each.mean for record in last for each in record.clients if each.client == name] for name in left}
    return StructureRun(
        trial.cell,
        trial.method,
        trial.seed,
        rounds=scenario.rounds,
        groups=len(resolve_shared_blocks(scenario).groups.names),
        moves=moves,
        scores={name: round(score, 2) for name, score in records[-1].scores.items()},
        training={
            name: round(float(np.mean([value for value in values if value is not None])), 2)
            for name, values in returns.items()
        },
        played=result.comparison_episodes,
        seconds=round(result.seconds, 1),
    )


def make_runs(trials: Sequence[Trial], results: Path, jobs: int) -> list[StructureRun]:
    """Make the runs that have no line yet; return all of them in the order of the trials."""
    known = {run.key for run in read_runs(results)}
    pending = [trial for trial in trials if (trial.cell, trial.method, trial.seed) not in known]
    results.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # a worker sets the number of its threads before any thread starts
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        futures = [workers.submit(make_run, trial) for trial in pending]
        for number, future in enumerate(as_completed(futures), 1):
            run = future.result()
            with results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            print(f"{number}/{len(pending)} {run.cell} {run.method} {run.seed}: {run.moves}", flush=True)
    by_key = {run.key: run for run in read_runs(results)}
    keys = [(trial.cell, trial.method, trial.seed) for trial in trials]
    return [by_key[key] for key in keys if key in by_key]


def read_runs(results: Path) -> list[StructureRun]:
    """Read all runs of a results file."""
    if not results.exists():
        return []
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return [
        StructureRun(**{**line, "cell": Cell(**line["cell"]), "moves": [tuple(move) for move in line["moves"]]})
        for line in lines
    ]
