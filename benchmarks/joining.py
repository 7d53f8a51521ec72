"""Measure what becomes of newcomers that join a run that has ended: what they share, and how they do.

Six carts with half-poles of 0.3 to 0.7 m train for 20 rounds of 2,048 steps, as in `scenarios/quickstart.toml` without
its backwards carts. Then three newcomers join for 30 more rounds: a cart with a half-pole of 0.9 m, one with swapped
actions, and one with its sensors in another order. Beside them are the same three as they learn alone for 30 rounds.

    python -m benchmarks.joining --jobs 2

Every finished seed appends a JSON line to benchmarks/results/joining.jsonl and is not repeated. The seeds, 1100 to
1109, were fixed beforehand; the way in which newcomers are asked was chosen on seed 0.
"""

from __future__ import annotations

from benchmarks.trials import RESULTS  # isort: skip  # before torch, for which it sets the number of threads

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import grpo_fed
from grpo_fed.engines.local.engine import LocalEngine
from grpo_fed.federation.joining import prepare_joining
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.scenario.shipped import find_scenario

FILE = RESULTS / "joining.jsonl"
SEEDS = range(1100, 1110)
ROUNDS, MORE_ROUNDS = 20, 30
ENV = 'env = "grpo_fed/CartPole-v1"'
VETERANS = f"clients=[{{ name = 'cart', count = 6, {ENV}, spread = {{ length = [0.3, 0.7] }} }}]"
NEWCOMERS = {
    "long": f'{{ name = "long", {ENV}, kwargs = {{ length = 0.9 }} }}',
    "swapped": f'{{ name = "swapped", {ENV}, kwargs = {{ swap_actions = true }} }}',
    "permuted": f'{{ name = "permuted", {ENV}, kwargs = {{ permute = [2, 3, 0, 1] }} }}',
}
PLANTED = {"long": "nothing", "swapped": "actor", "permuted": "torso.0"}
"""The block that a newcomer cannot share, as its task is made."""


@dataclass(frozen=True)
class JoiningRun:
    """One finished seed: a line of the results file."""

    seed: int
    settings: str
    """Digest of everything but the code that determines the result."""
    left: Mapping[str, Mapping[str, Sequence[int]]]
    """By client, the rounds in which it left each block."""
    out: Mapping[str, Sequence[str]]
    """By client, the blocks that it does not share at the end."""
    after: Mapping[str, float | None]
    """Final returns, of all."""
    alone: Mapping[str, float | None]
    """Those of the newcomers that learned alone."""
    veterans_before: Mapping[str, float | None]
    """The veterans' returns when the newcomers joined."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=FILE)
    arguments = parser.parse_args()
    done = {run.settings for run in read_runs(arguments.results)}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(make_run, seed) for seed in SEEDS if digest(seed) not in done]
        for future in as_completed(futures):
            run = future.result()
            with arguments.results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            print(f"seed {run.seed}: {run.seconds} s, out {dict(run.out)}", flush=True)
    print("\n".join(format_table(select_runs(read_runs(arguments.results)))))


def digest(seed: int) -> str:
    """Digest what determines a run."""
    given = [find_scenario("quickstart").read_text(), VETERANS, NEWCOMERS, ROUNDS, MORE_ROUNDS, seed]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]


def make_run(seed: int) -> JoiningRun:
    """Train the veterans, let the newcomers join, and train these alone."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    common = (f"seed={seed}", 'device="cpu"')
    left: dict[str, dict[str, list[int]]] = {}

    def watch(record: RoundRecord) -> None:
        for client in record.clients:
            for block in client.left:
                left.setdefault(client.client, {}).setdefault(block, []).append(record.round)

    with tempfile.TemporaryDirectory() as folder:
        run, more = Path(folder) / "run", Path(folder) / "more"
        scenario = Scenario.load(find_scenario("quickstart"), (VETERANS, f"rounds={ROUNDS}", *common))
        before = grpo_fed.run(scenario, run, workers=0)
        prepare_joining(run, list(NEWCOMERS.values()), [f"rounds={ROUNDS + MORE_ROUNDS}"], more)
        with LocalEngine.resumed(more) as engine:
            result = engine.run(watch)
    entries = f"clients=[{', '.join(NEWCOMERS.values())}]"
    alone = grpo_fed.train(Scenario.load(find_scenario("quickstart"), (entries, f"rounds={MORE_ROUNDS}", *common)))
    return JoiningRun(
        seed,
        digest(seed),
        left,
        {name: client.personal_groups for name, client in result.clients.items()},
        {name: client.after for name, client in result.clients.items()},
        {name: client.after for name, client in alone.clients.items()},
        {name: client.after for name, client in before.clients.items()},
        round(time.perf_counter() - began, 2),
    )


def read_runs(path: Path = FILE) -> list[JoiningRun]:
    """Read all runs of a results file."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [JoiningRun(**line) for line in lines]


def select_runs(runs: Sequence[JoiningRun]) -> list[JoiningRun]:
    """Select the runs with the present settings."""
    wanted = {digest(seed) for seed in SEEDS}
    return [run for run in runs if run.settings in wanted]


def format_table(runs: Sequence[JoiningRun]) -> Iterator[str]:
    """Write a row for each newcomer, and one of the veterans."""
    if not runs:
        return
    yield "| client | cannot share | that alone out | that out | shares all | return, lowest | alone, lowest |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name, planted in PLANTED.items():
        expected = () if planted == "nothing" else (planted,)
        exact = sum(tuple(run.out[name]) == expected for run in runs)
        without = sum(planted in run.out[name] for run in runs) if expected else exact
        shares = sum(not run.out[name] for run in runs)
        cells = [f"{exact} of {len(runs)}", f"{without} of {len(runs)}", f"{shares} of {len(runs)}"]
        returns = [_returns(runs, name), _returns(runs, name, alone=True)]
        yield f"| {name} | {planted} | {' | '.join([*cells, *returns])} |"
    names = [name for name in runs[0].after if name not in PLANTED]
    out = sum(bool(run.left.get(name)) for run in runs for name in names)
    after = [score for run in runs for name in names if (score := run.after[name]) is not None]
    before = [score for run in runs for name in names if (score := run.veterans_before[name]) is not None]
    total = len(runs) * len(names)
    yield (
        f"| veterans | nothing | {total - out} of {total} | | | {sum(after) / len(after):.0f}, {min(after):.0f} |"
        f" before: {sum(before) / len(before):.0f}, {min(before):.0f} |"
    )


def _returns(runs: Sequence[JoiningRun], name: str, alone: bool = False) -> str:
    scores = [score for run in runs if (score := (run.alone if alone else run.after)[name]) is not None]
    return f"{sum(scores) / len(scores):.0f}, {min(scores):.0f}"


if __name__ == "__main__":
    main()
