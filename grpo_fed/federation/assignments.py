"""Work that clients were given and have not answered yet, where the server does not wait for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from grpo_fed.federation.messages import EvaluationPlan, Start, Train
from grpo_fed.runs.checkpoint import Checkpoint

WORK = "work:"
"""In a checkpoint, the prefix of the shared blocks that a client began with."""


@dataclass(frozen=True)
class Assignment:
    """A client's work: a round of its own training, which begins with the shared blocks after a merge."""

    version: int
    """How many merges there had been."""
    number: int
    """Counts the client's work from 1; its files and random streams go by it."""
    due: int
    """Microseconds of virtual time at which it ends."""
    departed: tuple[int, ...]
    """The parameter groups that the client had left."""
    compare: tuple[int, ...]
    """The parameter groups in which it plays to compare."""
    measures: bool
    """Whether it measures the KL of the latest merge's step first."""
    evaluates: int | None
    """The number of the evaluation that it plays first."""
    rate: float = 1.0
    """What it multiplies its learning rate by."""


@dataclass
class BufferState:
    """Holds what a server that does not wait remembers between two merges; a checkpoint has it."""

    clock: int = 0
    """Microseconds of virtual time."""
    numbers: dict[str, int] = field(default_factory=dict)
    """The number of each client's latest work."""
    began: dict[str, int] = field(default_factory=dict)
    """The version that each client's latest work began with."""
    work: dict[str, Assignment] = field(default_factory=dict)
    """By client, the work that is not answered yet."""
    recent: list[dict[str, float]] = field(default_factory=list)
    """By client, what the answers in the latest merges weighed by their ages, the last merge last."""
    steps: list[float] = field(default_factory=list)
    """The joint KL of the latest merges' steps, the last one last."""
    like: dict[str, str] = field(default_factory=dict)
    """By client with work, one that began with the same shared blocks, under whose name the checkpoint has them."""


@dataclass(eq=False)
class WorkInProgress:
    """The assignments with the shared blocks [S] that each began with."""

    state: BufferState = field(default_factory=BufferState)
    starts: dict[str, np.ndarray] = field(default_factory=dict)
    """By client with work, the shared blocks; equal ones are the same array."""

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, size: int) -> WorkInProgress:
        """Read it from a checkpoint; ValueError if it is damaged. size: S."""
        state, arrays = checkpoint.part("buffer", BufferState), checkpoint.shared or {}
        starts: dict[str, np.ndarray] = {}
        for name in state.work:
            like = state.like.get(name, name)
            array = arrays.get(f"{WORK}{like}")
            if array is None or array.dtype != np.float32 or array.size != size or not np.isfinite(array).all():
                raise ValueError(
                    f"{checkpoint.folder}: it has no shared blocks that {name} began with, or damaged ones"
                )
            starts[name] = starts.get(like, array.reshape(-1))
        return cls(state, starts)

    def arrays(self) -> dict[str, np.ndarray]:
        """Name the arrays for a checkpoint, each of them once, and note in the state who has which."""
        owners: dict[bytes, str] = {}
        self.state.like = {name: owners.setdefault(start.tobytes(), name) for name, start in self.starts.items()}
        return {f"{WORK}{name}": self.starts[name] for name in owners.values()}

    def add(self, client: str, assignment: Assignment, start: np.ndarray) -> None:
        """Give a client work."""
        self.state.numbers[client], self.state.began[client] = assignment.number, assignment.version
        self.starts[client] = start
        self.state.work[client] = assignment

    def pop(self, client: str) -> tuple[Assignment, np.ndarray]:
        """Take a client's work away; return it with the shared blocks that it began with."""
        return self.state.work.pop(client), self.starts.pop(client)

    def instruction(self, client: str, run: str, rounds: int) -> Train:
        """Make the instruction of a client's work. rounds: of the run, whose progress goes with its merges."""
        work = self.state.work[client]
        return Train(
            Start(run, work.number, self.starts[client], work.departed),
            work.version / rounds,
            (work.version + 1) / rounds,
            work.measures,
            None if work.evaluates is None else EvaluationPlan(work.evaluates),
            work.compare,
            rate=work.rate,
        )

    def instructions(self, run: str, rounds: int) -> Mapping[str, Train]:
        """Make the instructions of all work."""
        return {name: self.instruction(name, run, rounds) for name in self.state.work}
