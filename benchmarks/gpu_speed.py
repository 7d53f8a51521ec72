"""Compare a learner's numbers on a device with those of the CPU, and measure its environment steps per second."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from functools import wraps
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_report import (
    BATCH,
    Extent,
    Report,
    describe_machine,
    free_memory,
    make_learner,
    synchronize,
    time_call,
)
from grpo_fed.rl import stacked_learner
from grpo_fed.rl.actor import Actor
from grpo_fed.rl.stacked_learner import StackedLearner
from grpo_fed.rl.trajectories import Trajectories


def measure_numbers(report: Report, extent: Extent, device: torch.device) -> None:
    """Compare parameters on the device with the CPU's, and with a CPU's whose first parameters differ by one ulp."""
    was = torch.get_float32_matmul_precision()
    report.add("numbers", f"torch's own default for matrix products is {was!r}; 'high' allows TF32", default=was)
    try:
        torch.set_float32_matmul_precision("highest")
        compare_rounds(report, extent, f"{device} without TF32", make_learner(extent.compared, device))
        shifted = make_learner(extent.compared, torch.device("cpu"))
        shifted.parameters.copy_(torch.nextafter(shifted.parameters, torch.full_like(shifted.parameters, torch.inf)))
        compare_rounds(report, extent, "cpu from an ulp away", shifted)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            compare_rounds(report, extent, f"{device} with TF32", make_learner(extent.compared, device))
    finally:
        torch.set_float32_matmul_precision(was)


def compare_rounds(report: Report, extent: Extent, name: str, learner: StackedLearner) -> None:
    """Train round by round beside a learner on the CPU, and report how much the two differ."""
    reference = make_learner(extent.compared, torch.device("cpu"))
    began = reference.parameters.clone()
    for number in range(1, extent.rounds + 1):
        theirs, mine = train_and_watch(reference), train_and_watch(learner)
        expected, actual = reference.parameters, learner.parameters.cpu()
        gap = (actual - expected).abs()
        same = (theirs.actions == mine.actions).all(-1)
        values = {
            "round": number,
            "max_abs": float(gap.max()),
            "relative": float((gap.norm(dim=1) / expected.norm(dim=1)).max()),
            "of_movement": float((gap.norm(dim=1) / (expected - began).norm(dim=1)).max()),
            "same_actions": float(same.mean()),
            "same_clients": int(same.all((1, 2)).sum()),
        }
        text = (
            f"{name}, after round {number}: parameters differ by {values['max_abs']:.1e} at most; relative to their"
            f" norm {values['relative']:.1e}, to how far they moved {values['of_movement']:.1e} (worst client);"
            f" {100 * values['same_actions']:.3f} % of the round's actions are the same, all of them for"
            f" {values['same_clients']} of {extent.compared} clients"
        )
        report.add("numbers", text, name=name, **values)
    reference.close()
    learner.close()


def train_and_watch(learner: StackedLearner) -> Trajectories:
    """Update each client once; returns the trajectories that it learned from."""
    seen: list[Trajectories] = []
    collect = learner.collector.collect_steps

    @wraps(collect)
    def watched(*arguments: Any) -> Trajectories:
        seen.append(collect(*arguments))
        return seen[-1]

    with patch.object(learner.collector, "collect_steps", watched):
        learner.train(BATCH)
    (trajectories,) = seen
    return trajectories


def measure_speed(report: Report, extent: Extent, device: torch.device) -> None:
    """Measure steps per second by the number of clients, on the device and on one thread of the CPU."""
    for where, numbers in ((device, extent.on_device), (torch.device("cpu"), extent.on_cpu)):
        seconds_per_client = 0.0
        for clients in numbers:
            seconds_per_client = time_rounds(report, extent, clients, where, seconds_per_client)


def measure_cpu(report: Report, extent: Extent, _: torch.device) -> None:
    """Measure steps per second on the CPU with all cores, and with more clients."""
    seconds_per_client, cpu = 1 / 60, torch.device("cpu")
    torch.set_num_threads(int(describe_machine(cpu)["cores"]))
    try:
        for clients in extent.threaded:
            time_rounds(report, extent, clients, cpu, seconds_per_client)
    finally:
        torch.set_num_threads(1)
    for clients in extent.later_on_cpu:
        seconds_per_client = time_rounds(report, extent, clients, cpu, seconds_per_client)


def time_rounds(report: Report, extent: Extent, clients: int, device: torch.device, guess: float) -> float:
    """Measure rounds of so many clients; returns the seconds of a round for each client, which is the next guess.

    guess: that of the measurement before. If less time is left than it predicts, nothing is measured.
    """
    threads = torch.get_num_threads()
    name = f"{clients} clients on {device}" + (f", {threads} threads" if device.type == "cpu" else "")
    if not report.has_time((extent.timed + 2) * guess * clients):  # a first, the timed ones, one with parts
        report.add("speed", f"{name}: left out, there is too little time", clients=clients, left_out=True)
        return guess
    free_memory(device)
    start = time.perf_counter()
    learner = make_learner(clients, device)
    built = time.perf_counter() - start
    first = time_call(lambda: learner.train(BATCH), device)
    rounds = [time_call(lambda: learner.train(BATCH), device) for _ in range(extent.timed)]
    with Stopwatch(learner) as watch:
        whole = time_call(lambda: learner.train(BATCH), device)
    parts = watch.parts(whole)
    memory = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    speed = clients * BATCH / median(rounds)
    spent = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
    text = (
        f"{name}: {speed:,.0f} steps/s; a round takes {median(rounds):.3f} s (the first {first:.3f}, building"
        f" {built:.1f}); of a round of {whole:.3f} s: {spent}"
    )
    if memory is not None:
        text += f"; {memory:,.0f} MB at most"
    report.add(
        "speed",
        text,
        clients=clients,
        device=str(device),
        threads=threads,
        steps_per_second=speed,
        rounds=rounds,
        first=first,
        building=built,
        watched=whole,
        spent=parts,
        memory_mb=memory,
    )
    learner.close()
    return median(rounds) / clients


class Stopwatch:
    """Measures what the seconds of a learner's round are spent on; waits for the device after each part."""

    def __init__(self, learner: StackedLearner) -> None:
        self._learner = learner
        self._seconds: dict[str, float] = defaultdict(float)
        self._stack = ExitStack()

    def __enter__(self) -> Stopwatch:
        self._time(self._learner.collector.envs, "step", "environments")
        self._time(Actor, "__call__", "policy")
        self._time(self._learner.collector, "collect_steps", "rollout")
        self._time(stacked_learner, "make_batch", "batch")
        self._time(stacked_learner, "learning_targets", "batch")
        self._time(stacked_learner, "update_clients", "update")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _time(self, owner: object, name: str, part: str) -> None:
        measured, device = getattr(owner, name), self._learner.device

        @wraps(measured)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = measured(*arguments, **named)
            synchronize(device)
            self._seconds[part] += time.perf_counter() - start
            return result

        self._stack.enter_context(patch.object(owner, name, timed))

    def parts(self, whole: float) -> dict[str, float]:
        """Return the seconds of each part of a round that took `whole` seconds.

        `policy` is the forward pass of the rollout with its transfers, `collection` the rollout's other work on the CPU
        (noise, arrays, episodes), `batch` the transfer of the trajectories, the critic's pass and the advantages,
        `update` the minibatches, and `rest` everything else.
        """
        seconds = self._seconds
        inside = seconds["environments"] + seconds["policy"]
        return {
            "environments": seconds["environments"],
            "policy": seconds["policy"],
            "collection": seconds["rollout"] - inside,
            "batch": seconds["batch"],
            "update": seconds["update"],
            "rest": whole - seconds["rollout"] - seconds["batch"] - seconds["update"],
        }
