"""Clients that learn nothing, and fail when they are told to: what the local engine is tested with."""

import json
import os
import signal
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


class Troupe:
    """Who is asked with whom goes to a file; `faults` says which round is a client's undoing, and how."""

    def __init__(self, names: Sequence[str], given: Mapping[str, Any]) -> None:
        self.names = names
        self.log = Path(given["log"])
        self.faults: Mapping[str, Mapping[str, str]] = given.get("faults", {})
        self.seconds: float = given.get("seconds", 0.0)

    def answer(self, instructions: Mapping[str, Instruction]) -> dict[str, Answer]:
        number = next(iter(instructions.values())).start.round
        different = len({id(one.start.shared) for one in instructions.values()})
        with self.log.open("a") as file:
            file.write(json.dumps([number, os.getpid(), different, *instructions]) + "\n")
        time.sleep(self.seconds)
        for name in instructions:
            self.fail(self.faults.get(name, {}).get(str(number)), name)
        return {name: one_of(name, instruction) for name, instruction in instructions.items()}

    def fail(self, how: str | None, name: str) -> None:
        match how:
            case "raise":
                raise RuntimeError(f"{name} has had enough")
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
            case "print":
                print(f"{name} says hello")

    def close(self) -> None:
        pass


def one_of(name: str, instruction: Instruction) -> Answer:
    """Of this client and no other."""
    match instruction:
        case Train(start=start):
            return Trained(start.shared + np.float32(step_of(name)), 1, 1, 0.5, 0.25, {"losses/entropy": 0.125})
        case Measure(fractions=trials):
            return Measured(tuple(sum(trial) * step_of(name) for trial in trials))
        case Evaluate():
            return Evaluated(EvaluationSummary(step_of(name), 0.0, step_of(name), step_of(name), 1, 1.0))


def step_of(name: str) -> float:
    return sum(name.encode()) / 1024
