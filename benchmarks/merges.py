"""Time the server's merges: the mean beside copying the same bytes once, huber and persistence beside the mean; and
their memory.

The replies of a thousand clients with 100,000 parameters each are 400 MB in memory, more than a cache holds.

    python -m benchmarks.merges --clients 1000 --rounds 5

prints tables and writes benchmarks/results/merges.json. Contestants take turns; the result of a row is the ratio of
medians. The memory is that of a process which makes replies one after another and merges each as soon as it is made.
"""

import os

# Set before torch and numpy are loaded: one thread, as everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.learning import describe_machine
from benchmarks.memory import peak_mb
from grpo_fed.aggregation.merge import Replies, Reply, StreamingMean, huber
from grpo_fed.aggregation.merge.evidence import Evidence, no_evidence
from grpo_fed.aggregation.merge.persistence import persistence
from grpo_fed.federation.messages import Trained
from grpo_fed.federation.round_merge import RoundMerge
from grpo_fed.policy.shared import SharedBlocks, resolve_shared_blocks
from grpo_fed.scenario.scenario import Scenario

FILE = Path(__file__).parent / "results" / "merges.json"
HIDDEN = [220, 220]
"""Hidden units with which actor and critic have 100,103 parameters."""
THRESHOLD = 0.02
NOISE, DEPARTURE = 0.005, 0.2
"""Distance of a client's parameter from the shared one, and the further distance of a departing client's actor."""
MEMORY = (100, 1000)
"""Numbers of clients of the merges whose memory is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contestant")
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of is not None:
        print(json.dumps(measure_memory(arguments.memory_of)))
        return
    results = {
        "clients": arguments.clients,
        "parameters": resolve_shared_blocks(make_scenario(1)).size,
        "rounds": arguments.rounds,
        "seconds": time_contestants(arguments.clients, arguments.rounds),
        "evidence_mb": evidence_megabytes(arguments.clients),
        "memory": {str(clients): measure_memory_in_subprocess(clients) for clients in MEMORY},
        "machine": describe_machine(),
        "versions": {name: version(name) for name in ("grpo-fed", "torch", "numpy")},
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(format_tables(results)))


def time_contestants(clients: int, rounds: int) -> dict[str, list[float]]:
    """Time every contestant in every round, after a first one that is not counted."""
    shared_blocks = resolve_shared_blocks(make_scenario(1))
    replies = {share: make_replies(shared_blocks, clients, share) for share in (0.0, 0.1)}
    copy = torch.empty(clients, shared_blocks.size)
    contestants: dict[str, Callable[[], object]] = {
        "copy": partial(copy_replies, replies[0.0], copy),
        "mean": partial(merge_by_mean, replies[0.0]),
        "huber, no client departs": partial(merge_by_huber, replies[0.0], shared_blocks),
        "huber, 1 in 10 departs": partial(merge_by_huber, replies[0.1], shared_blocks),
        "persistence, no client departs": partial(
            merge_by_persistence, replies[0.0], shared_blocks, make_evidence(replies[0.0], shared_blocks, 0.0)
        ),
        "persistence, 1 in 10 has departed": partial(
            merge_by_persistence, replies[0.1], shared_blocks, make_evidence(replies[0.1], shared_blocks, 0.1)
        ),
    }
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant()
            if number:
                results[name].append(time.perf_counter() - start)
    return results


def copy_replies(replies: Replies, copy: Tensor) -> None:
    """Copy all bytes once."""
    for row, reply in zip(copy, replies.all, strict=True):
        row.copy_(reply.point)


def merge_by_mean(replies: Replies) -> Tensor | None:
    """Merge replies one after another in the memory of one."""
    stream = StreamingMean()
    for reply in replies.all:
        stream.add(reply.point, reply.weight)
    return stream.result()


def merge_by_huber(replies: Replies, shared_blocks: SharedBlocks) -> Tensor:
    return huber(replies, shared_blocks.initial, shared_blocks.groups, threshold=THRESHOLD).point


def merge_by_persistence(replies: Replies, shared_blocks: SharedBlocks, evidence: Evidence) -> Tensor:
    return persistence(replies, shared_blocks.initial, shared_blocks.groups, evidence)[0].point


def make_evidence(replies: Replies, shared_blocks: SharedBlocks, departed: float) -> Evidence:
    """Make the evidence of eight rounds of noise, in which the first share `departed` of the clients left the actor."""
    generator = torch.Generator().manual_seed(1)
    panels = []
    for panel in no_evidence(replies.clients, shared_blocks.groups).panels:
        count = len(panel.clients)
        gone = panel.departed.clone()
        last = sorted(replies.clients)[round(departed * len(replies.clients)) - 1] if departed else ""
        gone[torch.tensor([client <= last for client in panel.clients]), shared_blocks.groups.names.index("actor")] = (
            True
        )
        sums = torch.randn(panel.sums.shape, generator=generator, dtype=torch.float64)
        products = 8 * torch.eye(count, dtype=torch.float64).repeat(len(shared_blocks.groups.names), 1, 1)
        sums *= (8 / (panel.sums.shape[1] / len(shared_blocks.groups.names))) ** 0.5
        rounds = torch.full_like(panel.common, 8)
        panels.append(replace(panel, sums=sums, products=products, common=rounds, departed=gone))
    return Evidence(tuple(panels))


def evidence_megabytes(clients: int) -> float:
    """Compute the size of the evidence that `persistence` keeps of so many clients."""
    shared_blocks = resolve_shared_blocks(make_scenario(clients))
    arrays = no_evidence(shared_blocks.clients, shared_blocks.groups).arrays().values()
    return sum(array.numel() * array.element_size() for array in arrays) / 1e6


def make_replies(shared_blocks: SharedBlocks, clients: int, departing: float) -> Replies:
    """Make replies near the shared blocks, except for the actors of the first share `departing` of the clients."""
    generator = torch.Generator().manual_seed(0)
    replies = []
    for client in range(clients):
        point = shared_blocks.initial + NOISE * torch.randn(shared_blocks.size, generator=generator)
        if client < departing * clients:
            point[shared_blocks.slices["actor"]] += DEPARTURE
        replies.append(Reply(f"client-{client:05d}", point, 2048.0))
    return Replies.of(replies)


def make_scenario(clients: int, rule: str = "mean") -> Scenario:
    return Scenario.model_validate(
        {
            "name": "merges",
            "policy": {"hidden": HIDDEN, "shared": ["*"]},
            "merge": {"rule": rule},
            "proximity": {"mode": "off"},
            "clients": [{"name": "client", "env": "grpo_fed/CartPole-v1", "count": clients}],
        }
    )


def measure_memory_in_subprocess(clients: int) -> dict[str, float]:
    """Measure the memory in a process of its own, so that the peak is that of the merge."""
    command = [sys.executable, "-m", "benchmarks.merges", "--memory-of", str(clients)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    memory: dict[str, float] = json.loads(process.stdout)
    return memory


def measure_memory(clients: int) -> dict[str, float]:
    """Measure in MB what a process needs with everything loaded, and how much more a merge of so many clients takes."""
    settings = make_scenario(clients)
    shared_blocks = resolve_shared_blocks(settings)
    generator = np.random.default_rng(0)
    merge_streaming(settings, shared_blocks, list(shared_blocks.clients[:2]), generator)
    before = peak_mb()
    merge_streaming(settings, shared_blocks, list(shared_blocks.clients), generator)
    return {"before_mb": before, "more_mb": peak_mb() - before}


def merge_streaming(
    settings: Scenario, shared_blocks: SharedBlocks, names: Sequence[str], generator: np.random.Generator
) -> None:
    """Merge as the round loop does: a reply is discarded as soon as it was added."""
    round_merge, shared = RoundMerge(settings, shared_blocks), shared_blocks.initial.numpy()
    for name in names:
        point = shared + NOISE * generator.standard_normal(shared_blocks.size, np.float32)
        round_merge.add(name, Trained(point, 2048, 0, 0.0, 0.0, {}))
    round_merge.target(shared_blocks.initial)


def format_tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Write the tables."""
    yield f"{results['clients']:,} clients x {results['parameters']:,} parameters, medians of {results['rounds']}:"
    yield ""
    yield "| merge | ms | against | ratio | at most | wanted |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ms = {name: 1e3 * median(seconds) for name, seconds in results["seconds"].items()}
    targets = {"copy": ("", "", ""), "mean": ("copy", "2", "1")}
    targets |= {name: ("mean", "5", "3") for name in ms if name.startswith("persistence")}
    for name, value in ms.items():
        against, most, wanted = targets.get(name, ("mean", "6", "3"))
        ratio = f"{value / ms[against]:.2f}" if against else ""
        yield f"| {name} | {value:.1f} | {against} | {ratio} | {most} | {wanted} |"
    yield ""
    yield f"The evidence of persistence takes {results['evidence_mb']:.0f} MB, beside the replies of the round."
    yield ""
    yield "| streaming mean of clients | MB with everything loaded | MB more at its peak |"
    yield "| --- | --- | --- |"
    for clients, memory in results["memory"].items():
        yield f"| {int(clients):,} | {memory['before_mb']:.0f} | {memory['more_mb']:.1f} |"


if __name__ == "__main__":
    main()
