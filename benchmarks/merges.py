"""What the server's merges cost: the mean beside copying the same bytes once, huber beside the mean, memory.

A thousand clients' replies of 100,000 parameters each lie in memory, 400 MB, more than any cache holds.

    python -m benchmarks.merges --clients 1000 --rounds 5

prints tables and writes benchmarks/results/merges.json. Contestants take turns; a row's result is the ratio of medians.
The memory is that of a process which makes replies, one after another, and merges them as they come.
"""

import os

# Before torch and numpy load: one thread, as everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.learning import machine_kind
from benchmarks.memory import peak_mb
from grpo_fed.aggregation.merge import Replies, Reply, StreamingMean, huber
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.round_merge import RoundMerge
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario

FILE = Path(__file__).parent / "results" / "merges.json"
HIDDEN = [220, 220]
"""Units with which actor and critic have 100,103 parameters."""
THRESHOLD = 0.02
NOISE, AWAY = 0.005, 0.2
"""How far a parameter of an ordinary client lies from the shared one, and how far more the actor of a departing one."""
MEMORY = (100, 1000)
"""Clients of the merges whose memory is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contestant")
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of is not None:
        print(json.dumps(memory_of(arguments.memory_of)))
        return
    found = {
        "clients": arguments.clients,
        "parameters": resolve_shared_blocks(scenario(1)).size,
        "rounds": arguments.rounds,
        "seconds": times(arguments.clients, arguments.rounds),
        "memory": {str(clients): memory_apart(clients) for clients in MEMORY},
        "machine": machine_kind(),
        "versions": {name: version(name) for name in ("grpo-fed", "torch", "numpy")},
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines(found)))


def times(clients: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after one that does not count."""
    commons = resolve_shared_blocks(scenario(1))
    everybody = {share: replies(commons, clients, share) for share in (0.0, 0.1)}
    copy = torch.empty(clients, commons.size)
    contestants: dict[str, Callable[[], object]] = {
        "copy": partial(copied, everybody[0.0], copy),
        "mean": partial(mean, everybody[0.0]),
        "huber, nobody departs": partial(merged, everybody[0.0], commons),
        "huber, 1 in 10 departs": partial(merged, everybody[0.1], commons),
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            contestant()
            if number:
                found[name].append(time.perf_counter() - began)
    return found


def copied(every: Replies, copy: Tensor) -> None:
    """All bytes, once."""
    for row, reply in zip(copy, every.all, strict=True):
        row.copy_(reply.point)


def mean(every: Replies) -> Tensor | None:
    """As they come, in the memory of one."""
    stream = StreamingMean()
    for reply in every.all:
        stream.add(reply.point, reply.weight)
    return stream.result()


def merged(every: Replies, commons: SharedBlocks) -> Tensor:
    return huber(every, commons.initial, commons.groups, threshold=THRESHOLD).point


def replies(commons: SharedBlocks, clients: int, departing: float) -> Replies:
    """Near the shared blocks, but for the actors of the first so many."""
    draws = torch.Generator().manual_seed(0)
    every = []
    for client in range(clients):
        point = commons.initial + NOISE * torch.randn(commons.size, generator=draws)
        if client < departing * clients:
            point[commons.slices["actor"]] += AWAY
        every.append(Reply(f"client-{client:05d}", point, 2048.0))
    return Replies.of(every)


def scenario(clients: int, rule: str = "mean") -> Scenario:
    return Scenario.model_validate(
        {
            "name": "merges",
            "policy": {"hidden": HIDDEN, "shared": ["*"]},
            "merge": {"rule": rule},
            "proximity": {"mode": "off"},
            "clients": [{"name": "client", "env": "grpo_fed/CartPole-v1", "count": clients}],
        }
    )


def memory_apart(clients: int) -> dict[str, float]:
    """In a process of its own, whose peak nothing else has raised."""
    command = [sys.executable, "-m", "benchmarks.merges", "--memory-of", str(clients)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    made: dict[str, float] = json.loads(done.stdout)
    return made


def memory_of(clients: int) -> dict[str, float]:
    """MB: what a process needs with everything loaded, and by how much a merge of so many clients raises that."""
    settings = scenario(clients)
    commons = resolve_shared_blocks(settings)
    draws = np.random.default_rng(0)
    merge(settings, commons, list(commons.clients[:2]), draws)
    before = peak_mb()
    merge(settings, commons, list(commons.clients), draws)
    return {"before_mb": before, "more_mb": peak_mb() - before}


def merge(settings: Scenario, commons: SharedBlocks, names: Sequence[str], draws: np.random.Generator) -> None:
    """As the round loop does it: a reply is gone as soon as it was added."""
    merging, shared = RoundMerge(settings, commons), commons.initial.numpy()
    for name in names:
        point = shared + NOISE * draws.standard_normal(commons.size, np.float32)
        merging.add(name, Trained(point, 2048, 0, 0.0, 0.0, {}))
    merging.target(commons.initial)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables."""
    yield f"{found['clients']:,} clients x {found['parameters']:,} parameters, medians of {found['rounds']}:"
    yield ""
    yield "| merge | ms | against | ratio | at most | wanted |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ms = {name: 1e3 * median(seconds) for name, seconds in found["seconds"].items()}
    targets = {"copy": ("", "", ""), "mean": ("copy", "2", "1")}
    for name, value in ms.items():
        against, most, wanted = targets.get(name, ("mean", "6", "3"))
        ratio = f"{value / ms[against]:.2f}" if against else ""
        yield f"| {name} | {value:.1f} | {against} | {ratio} | {most} | {wanted} |"
    yield ""
    yield "| streaming mean of clients | MB with everything loaded | MB more at its peak |"
    yield "| --- | --- | --- |"
    for clients, memory in found["memory"].items():
        yield f"| {int(clients):,} | {memory['before_mb']:.0f} | {memory['more_mb']:.1f} |"


if __name__ == "__main__":
    main()
