"""Instructions of one kind, which clients follow together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from grpo_fed.federation.messages import Evaluate, Instruction, Measure, SecureStep, Train

Kind = TypeVar("Kind", Train, Measure, Evaluate, SecureStep)


def all_of_kind(kind: type[Kind], instructions: Mapping[str, Instruction]) -> dict[str, Kind]:
    """Check that all instructions are of a kind, and return them."""
    chosen = {name: each for name, each in instructions.items() if isinstance(each, kind)}
    assert len(chosen) == len(instructions), "all instructions are of the same kind"
    return chosen


def round_of(instruction: Train) -> tuple[str, int, float, float]:
    """Return what clients that are trained together have in common."""
    start = instruction.start
    return start.run, start.round, instruction.begin, instruction.end
