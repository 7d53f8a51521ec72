"""AnswerBuffer: gives clients work, and collects answers until there are enough for a merge.

A client trains on fresh experience from the blocks that it was given. What ages is not that experience but the
difference that it has learned, and that is put onto the blocks there are when it comes. So all merge rules, departures
and KL budgets stay as they are: they see clients that began with the present shared blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np

from grpo_fed.aggregation.buffering import rebase, weigh_by_age, weigh_by_kl, weigh_fairly
from grpo_fed.aggregation.proximity import AcceptedStep
from grpo_fed.federation.arrivals import Arrivals
from grpo_fed.federation.assignments import Assignment, WorkInProgress
from grpo_fed.federation.messages import Answer, Trained
from grpo_fed.federation.pace import Paces
from grpo_fed.federation.participation import ceil_fraction
from grpo_fed.federation.server_state import ServerState
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.merge_order import MergeOrder, append_order, cut_orders, digest_shared
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True, eq=False)
class Arrival:
    """An answer for a merge, as if its client had begun with the present shared blocks."""

    client: str
    number: int
    """The number of the client's work."""
    age: int
    """Merges since the client began."""
    answer: Trained
    weight: float
    """What it weighs, beside the weight of its steps: by its age and by how rarely its client answers."""


@dataclass(frozen=True, eq=False)
class BufferedAnswers:
    """What came for a merge."""

    arrivals: Sequence[Arrival]
    """In the order of the clients' names."""
    failures: Mapping[str, Failure]
    length: float
    """The part of the way to the merge that the shared blocks may go."""

    @property
    def ages(self) -> dict[str, int]:
        """By client, the merges since it began."""
        return {each.client: each.age for each in self.arrivals}


@final
class AnswerBuffer:
    """The work of all clients, and what it needs to become a merge."""

    def __init__(
        self,
        scenario: Scenario,
        shared_blocks: SharedBlocks,
        arrivals: Arrivals,
        folder: Path | None,
        after: Checkpoint | None,
    ) -> None:
        """Begin without work, or with that of a checkpoint, which is handed over again.

        folder: gets the order of events; None writes nothing. ValueError if the checkpoint is damaged.
        """
        self._scenario, self._clients, self._folder = scenario, shared_blocks.training_clients, folder
        self.size = ceil_fraction(scenario.round.buffer, len(self._clients))
        """How many answers make a merge."""
        self.paces = Paces(scenario)
        self._arrivals = arrivals
        self.work = WorkInProgress() if after is None else WorkInProgress.from_checkpoint(after, shared_blocks.size)
        self._is_handed_over = after is None
        self._told: tuple[str, ...] = ()
        self._after = after

    def open(self) -> None:
        """Remove what the folder has of merges after the checkpoint."""
        if self._folder is not None:
            cut_orders(self._folder, 0 if self._after is None else self._after.round)

    @property
    def busy(self) -> frozenset[str]:
        """The clients with work."""
        return frozenset(self.work.state.work)

    def assign(
        self,
        merge: int,
        state: ServerState,
        reachable: Sequence[str],
        measures: bool,
        evaluates: bool,
        rate: float = 1.0,
    ) -> None:
        """Give work to all clients that have none and can be reached, but not to those that are held out.

        measures: whether clients that were in the latest merge measure its step. evaluates: whether they are evaluated.
        rate: what they multiply their learning rates by.
        """
        held, version, run = self.work, merge - 1, state.name
        if not self._is_handed_over:
            self._arrivals.begin(held.instructions(run, self._scenario.rounds))
            self._is_handed_over = True
        idle = [name for name in sorted({*self._clients}.intersection(reachable)) if name not in held.state.work]
        self._told = tuple(self._arrivals.choose(merge, idle))
        asked = {} if state.evidence is None else state.evidence.asked
        for name in self._told:
            number = held.state.numbers.get(name, 0) + 1
            # Its last work began before the latest merge and is in it, so what it measures is that merge's step.
            began = held.state.began.get(name)
            sees_step = measures and began == version - 1 and state.trained.get(name) == number - 1
            assignment = Assignment(
                version,
                number,
                held.state.clock + self.paces.duration(name, number),
                departed=state.departed.get(name, ()),
                compare=asked.get(name, ()),
                measures=sees_step,
                evaluates=version if evaluates else None,
                rate=rate,
            )
            held.add(name, assignment, state.start(name, number).shared)
        self._arrivals.begin({name: held.instruction(name, run, self._scenario.rounds) for name in self._told})

    def gather(self, merge: int, state: ServerState) -> BufferedAnswers:
        """Wait for the answers of a merge: until there are enough, no client has work, or the deadline has passed."""
        settings, held = self._scenario.round, self.work
        until = time.monotonic() + (math.inf if settings.deadline is None else settings.deadline)
        came: dict[str, tuple[Assignment, np.ndarray, Trained]] = {}
        failures: dict[str, Failure] = {}
        while len(came) < self.size and held.state.work:
            work, instructions = dict(held.state.work), held.instructions(state.name, self._scenario.rounds)
            answered = False
            for name, answer in self._arrivals.wait(merge, work, instructions, self.size - len(came), until):
                answered = True
                assignment, start = held.pop(name)
                held.state.clock = max(held.state.clock, assignment.due)
                checked = self._check_age(merge, assignment, answer)
                if isinstance(checked, Failure):
                    failures[name] = checked
                else:
                    came[name] = assignment, start, checked
            if not answered:
                break
        return self._weigh(merge, state, dict(sorted(came.items())), failures)

    def finish(self, merge: int, batch: BufferedAnswers, step: AcceptedStep | None, shared: np.ndarray) -> None:
        """Remember a merge: its clients, its step, and the order of events. shared: [S] after it."""
        state, most = self.work.state, self._scenario.round.max_staleness
        limit = self._scenario.proximity.kl_joint
        unknown = math.inf if limit is None else limit
        kl = 0.0 if step is None else unknown if step.joint is None else step.joint
        state.steps = [*state.steps, kl][-most:]
        if self._folder is not None:
            came = tuple((each.client, merge - 1 - each.age, each.number) for each in batch.arrivals)
            failed = {name: failure.kind for name, failure in batch.failures.items()}
            append_order(self._folder, MergeOrder(merge, self._told, came, failed, digest_shared(shared)))

    def _check_age(self, merge: int, assignment: Assignment, answer: Answer | Failure) -> Trained | Failure:
        """Refuse an answer to work that began too long ago."""
        age, most = merge - 1 - assignment.version, self._scenario.round.max_staleness
        if isinstance(answer, Failure):
            return answer
        assert isinstance(answer, Trained)
        if age > most:
            return Failure("late", f"it began {age} merges ago, and round.max_staleness is {most}")
        return answer

    def _weigh(
        self,
        merge: int,
        state: ServerState,
        came: Mapping[str, tuple[Assignment, np.ndarray, Trained]],
        failures: Mapping[str, Failure],
    ) -> BufferedAnswers:
        """Put the answers onto the present shared blocks, and weigh them."""
        ages = {name: merge - 1 - assignment.version for name, (assignment, *_) in came.items()}
        weights = {name: self._staleness(age) for name, age in ages.items()}
        recent, settings = self.work.state.recent, self._scenario.round
        recent[:] = [*recent, weights][-(settings.max_staleness + 1) :]
        if not came:
            return BufferedAnswers((), failures, 1.0)
        length = math.fsum(weights.values()) / len(weights)
        if settings.rate_fair:
            known = {name for of_merge in recent for name in of_merge}
            weights, length = weigh_fairly(recent, len(self.busy - known), len(self._clients))
        arrivals = []
        for name, (assignment, start, answer) in came.items():
            shared = state.start(name, assignment.number).shared
            point = rebase(answer.point, start, shared) if answer.point.size else answer.point
            kl = answer.kl if not ages[name] else None  # of a step that is not the latest
            rebased = replace(answer, point=point, kl=kl, difference=None)
            arrivals.append(Arrival(name, assignment.number, ages[name], rebased, weights[name]))
        return BufferedAnswers(arrivals, failures, length)

    def _staleness(self, age: int) -> float:
        """Weigh an answer by its age, as the scenario says."""
        match self._scenario.round.staleness:
            case "age":
                return weigh_by_age(age)
            case "kl":
                budget = self._scenario.proximity.kl_joint
                assert budget is not None, "the scenario has been checked"
                return weigh_by_kl(math.fsum(self.work.state.steps[len(self.work.state.steps) - age :]), budget)
            case _:
                return 1.0
