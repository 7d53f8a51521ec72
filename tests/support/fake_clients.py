"""Clients that learn nothing and fail on request: what the local engine is tested with.

Every new worker process imports this module, so it imports nothing that a worker does not have already.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_fed.federation.messages import (
    Answer,
    Evaluate,
    Evaluated,
    EvaluationSummary,
    Instruction,
    Measure,
    Measured,
    Train,
    Trained,
)


class FakeClients:
    """Answers with numbers made from the clients' names.

    settings: `log`, a file that gets a line for each call: the round, the process id, how many different arrays the
    shared blocks of the call were, and the names of the clients. `faults`: by client and round, how the client fails.
    `seconds`: how long a call takes.
    """

    def __init__(self, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.names = names
        self.log = Path(settings["log"])
        self.faults: Mapping[str, Mapping[str, str]] = settings.get("faults", {})
        self.seconds: float = settings.get("seconds", 0.0)

    def answer(self, instructions: Mapping[str, Instruction]) -> dict[str, Answer]:
        """Log the call, fail if a client has a fault in this round, else answer."""
        round = next(iter(instructions.values())).start.round
        arrays = len({id(instruction.start.shared) for instruction in instructions.values()})
        with self.log.open("a") as file:
            file.write(json.dumps([round, os.getpid(), arrays, *instructions]) + "\n")
        time.sleep(self.seconds)
        for name in instructions:
            fail(self.faults.get(name, {}).get(str(round)), name)
        return {name: answer_of(name, instruction) for name, instruction in instructions.items()}

    def close(self) -> None:
        """There is nothing to close."""


def fail(how: str | None, name: str) -> None:
    """Fail in one of several ways, or not at all."""
    match how:
        case "raise":
            raise RuntimeError(f"{name} fails on request")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3600)
        case "print":
            print(f"{name} prints")
        case "flood":
            for _ in range(2000):
                print(name * 100)
        case "start":
            print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
        case "start and die":
            print(subprocess.Popen(["sh", "-c", "sleep 600 & wait"], start_new_session=True).pid)
            os.kill(os.getpid(), signal.SIGKILL)


def answer_of(name: str, instruction: Instruction) -> Answer:
    """Make an answer that no other client would give."""
    match instruction:
        case Train(start=start):
            return Trained(start.shared + np.float32(step_of(name)), 1, 1, 0.5, 0.25, {"losses/entropy": 0.125})
        case Measure(fractions=fractions):
            return Measured(tuple(sum(of_blocks) * step_of(name) for of_blocks in fractions))
        case Evaluate():
            return Evaluated(EvaluationSummary(step_of(name), 0.0, step_of(name), step_of(name), 1, 1.0))


def step_of(name: str) -> float:
    """Make a small number from a client's name: how far the client moves all its parameters."""
    return sum(name.encode()) / 1024
