"""Measure a stacked learner on a CUDA device, beside the CPU of the same machine.

It has eight parts, the most important first; each prints a line for every result as soon as it is measured:

- `numbers`: parameters after one, two and three rounds on the device, compared with those of the CPU.
- `speed`: environment steps per second of 64 to 4,096 CartPole clients, the parts of a round's time, and memory.
- `solve`: the time until 2,048 CartPole clients, each with a policy of its own, have an evaluation return of 475.
- `peer`: the same for one client of stable-baselines3 on one core, if that is installed.
- `profile`: the kernels of a minibatch's update and of a rollout step.
- `graphs`: the time that CUDA graphs would save in both.
- `language`: adapters on a frozen language model: numbers beside the CPU's, tokens a second of 1 to 64 clients.
- `cpu`: further numbers of clients on the CPU, and torch with a thread for each core, as far as time allows.

    python -m benchmarks.gpu --out gpu.jsonl --parts numbers,speed

takes at most ten minutes in all (`--limit`); it also runs where the device is a CPU. A part that fails reports its
error, and the next part begins. `EXPECTED` holds the predictions that were written before the first measurement.
`python -m benchmarks.gpu_results gpu.jsonl` adds the results to those of earlier runs.
"""

import os

# Set before torch and numpy are loaded: one thread, as a worker of a run has; `cpu` also measures more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.gpu_kernels import measure_graphs, measure_kernels
from benchmarks.gpu_language import measure_language
from benchmarks.gpu_report import Extent, Report, describe_machine, free_memory
from benchmarks.gpu_solve import UPDATES, measure_peer, measure_solving
from benchmarks.gpu_speed import measure_cpu, measure_numbers, measure_speed
from grpo_fed.rl.device import resolve_device

EXPECTED = {
    "numbers": (
        "without TF32 all actions of three rounds are the CPU's, and parameters differ by 1e-6 to 1e-5; with TF32 by"
        " 1e-3, and actions differ from the second round on"
    ),
    "speed": (
        "an update takes a tenth of the CPU's time or less, so that from 256 clients on nine tenths of a round are"
        " environments and bookkeeping on the CPU: 300 to 600 thousand steps/s on the device, 80 on the CPU; 6 GB at"
        " 4,096 clients"
    ),
    "solve": (
        "half of the clients after 18 thousand steps each, 95 % after 33, 99 % after 50, all after 70; 0.4 s for an"
        " update of all: 120 s in all, 25 of them for evaluation"
    ),
    "peer": "a client of its own takes 5 to 15 s, so 2,048 of them on 16 cores some 20 minutes",
    "profile": (
        "some 80 launches for a minibatch, of which the matrix products take half of the time and tanh with its slope a"
        " third; 5 for a rollout step, shorter than the two transfers around them"
    ),
    "graphs": (
        "a minibatch takes a third of the time at 64 clients, where it waits for launches, and no less than nine tenths"
        " at 2,048; a rollout step half"
    ),
    "language": (
        "logits as the CPU's to 1e-4, one token in a hundred another with a bfloat16 base; 16 clients write at least 10"
        " times as fast as one after another, since a step waits for some 250 launches whatever the number of clients"
    ),
    "cpu": "80 thousand steps/s at any number of clients, and fewer with all cores: the matrices are too small for it",
}
"""The prediction for each part, written before it was measured."""


EXTENTS = {
    "full": Extent(
        compared=8,
        rounds=3,
        on_device=(2048, 64, 256, 1024, 4096),
        on_cpu=(64, 256, 1024),
        later_on_cpu=(2048, 4096),
        threaded=(64,),
        timed=2,
        solving=2048,
        every=14,
        updates=UPDATES,
        cap=150.0,
        seeds=(0, 1, 2, 3, 4),
        profiled=2048,
        graphed=(64, 256, 2048),
        repeats=50,
        writing=(1, 4, 16, 64),
        width=512,
        layers=8,
    ),
    "smallest": Extent(
        compared=4,
        rounds=2,
        on_device=(4,),
        on_cpu=(4,),
        later_on_cpu=(4,),
        threaded=(),  # takes seconds if other processes use the cores
        timed=1,
        solving=4,
        every=1,
        updates=2,
        cap=20.0,
        seeds=(0,),
        profiled=4,
        graphed=(4,),
        repeats=2,
        writing=(2,),
        width=64,
        layers=2,
    ),
}


Part = Callable[[Report, Extent, torch.device], None]


PARTS: Mapping[str, Part] = {
    "numbers": measure_numbers,
    "speed": measure_speed,
    "solve": measure_solving,
    "peer": measure_peer,
    "profile": measure_kernels,
    "graphs": measure_graphs,
    "language": measure_language,
    "cpu": measure_cpu,
}
"""The most important part first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help=f"comma-separated names of parts ({', '.join(PARTS)}); default: all")
    parser.add_argument("--size", choices=list(EXTENTS), default="full")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1 or cpu; default: CUDA where there is one")
    parser.add_argument("--out", type=Path, help="file that JSON lines are appended to")
    parser.add_argument(
        "--limit",
        type=float,
        default=570.0,
        help="seconds after which no further measurement begins; default: %(default)s",
    )
    arguments = parser.parse_args()
    report = Report(arguments.out, arguments.limit)
    failed = run_parts(choose_parts(arguments.parts), report, EXTENTS[arguments.size], resolve_device(arguments.device))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def choose_parts(names: str | None) -> list[str]:
    """Choose the named parts, in the order of their names; ValueError for an unknown name."""
    chosen = list(PARTS) if names is None else names.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise ValueError(f"--parts: no part {sorted(unknown)}; there are {list(PARTS)}")
    return chosen


def run_parts(names: Iterable[str], report: Report, extent: Extent, device: torch.device) -> list[str]:
    """Run parts one after another; returns the names of those that failed."""
    torch.set_num_threads(1)
    torch.zeros(1, device=device)  # makes the device's context outside of what is timed
    machine = describe_machine(device)
    report.add("machine", ", ".join(f"{key} {value}" for key, value in machine.items()), **machine)
    failed = []
    for name in names:
        if not report.has_time(0):
            report.add(name, "left out: there is no time left", left_out=True)
            continue
        report.add(name, f"expected: {EXPECTED[name]}", expected=EXPECTED[name])
        try:
            PARTS[name](report, extent, device)
        except Exception as error:  # noqa: BLE001, a failing part must not stop the parts after it
            failed.append(name)
            last = traceback.format_exc().strip().splitlines()[-8:]
            report.add(name, "\n    ".join(["FAILED", *last]), error=f"{type(error).__name__}: {error}")
        free_memory(device)
    return failed


if __name__ == "__main__":
    main()
