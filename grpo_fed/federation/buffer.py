"""AnswerBuffer: gives clients work, and collects answers until there are enough for a merge.

A client trains on fresh experience from the blocks that it was given. What ages is not that experience but the
difference that it has learned, and that is put onto the blocks there are when it comes. So all merge rules, departures
and KL budgets stay as they are: they see clients that began with the present shared blocks.

With `round.again = "at-once"` a client that has answered does not wait for the merge. What it answers until then is
combined into one answer, since each client has one say in a merge.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import numpy as np

from grpo_fed.aggregation.buffering import rebase, weigh_by_age, weigh_by_kl, weigh_fairly
from grpo_fed.aggregation.proximity import AcceptedStep
from grpo_fed.federation.arrivals import Arrivals
from grpo_fed.federation.assignments import Assignment, WorkInProgress
from grpo_fed.federation.combined_answer import combine_answers
from grpo_fed.federation.messages import EvaluationSummary, Trained
from grpo_fed.federation.pace import Paces
from grpo_fed.federation.participation import ceil_fraction
from grpo_fed.federation.server_state import ServerState
from grpo_fed.federation.state_store import MOST_ANSWERS
from grpo_fed.policy.shared import SharedBlocks
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.merge_order import MergeOrder, append_order, cut_orders, digest_shared
from grpo_fed.runs.records import Failure
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True, eq=False)
class Arrival:
    """A client's answer for a merge, as if it had begun with the present shared blocks."""

    client: str
    number: int
    """The number of the client's latest work in it."""
    age: int
    """Merges since the client began, with several answers with the first of them."""
    answer: Trained
    weight: float
    """What it weighs, beside the weight of its steps: by its age and by how rarely its client answers."""


@dataclass(frozen=True, eq=False)
class BufferedAnswers:
    """What came for a merge."""

    arrivals: Sequence[Arrival]
    """In the order of the clients' names."""
    failures: Mapping[str, Failure] = field(default_factory=dict)
    length: float = 1.0
    """The part of the way to the merge that the shared blocks may go."""
    first_evaluations: Mapping[str, EvaluationSummary] = field(default_factory=dict)
    """By client, the evaluations before the first round of those whose first work is not in the first merge."""
    came: Sequence[tuple[str, int, int]] = ()
    """As `MergeOrder` has it."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """As `MergeOrder` has it: `failures` has answers that were refused for their age, too."""

    @property
    def ages(self) -> dict[str, int]:
        """By client, the merges since it began."""
        return {each.client: each.age for each in self.arrivals}


@dataclass(frozen=True, eq=False)
class _Came:
    """An answer that came to a client's work."""

    assignment: Assignment
    start: np.ndarray
    """[S]: the shared blocks that it began with."""
    answer: Trained


@dataclass(frozen=True, eq=False)
class _Work:
    """What the work until a merge is like."""

    merge: int
    state: ServerState
    measures: bool
    evaluates: bool
    rate: float


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
        self._is_at_once = scenario.round.again == "at-once"
        self._work: _Work | None = None
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
        held, run = self.work, state.name
        if not self._is_handed_over:
            self._arrivals.begin(held.instructions(run, self._scenario.rounds))
            self._is_handed_over = True
        idle = [name for name in sorted({*self._clients}.intersection(reachable)) if name not in held.state.work]
        self._told = tuple(self._arrivals.choose(merge, idle))
        self._work = _Work(merge, state, measures, evaluates, rate)
        for name in self._told:
            self._give(name, self._work)
        self._arrivals.begin({name: held.instruction(name, run, self._scenario.rounds) for name in self._told})

    def _give(self, name: str, given: _Work, answered: int = 0) -> None:
        """Give a client work. answered: the number of its latest work, if its answer waits for the merge."""
        held, state, version = self.work, given.state, given.merge - 1
        number = held.state.numbers.get(name, 0) + 1
        began = held.state.began.get(name)
        # Its last work began before the latest merge and it has answered it, so what it measures is that merge's step.
        has_answered = number - 1 in (state.trained.get(name), answered)
        asked = {} if state.evidence is None or began == version else state.evidence.asked
        assignment = Assignment(
            version,
            number,
            held.state.clock + self.paces.duration(name, number),
            departed=state.departed.get(name, ()),
            compare=asked.get(name, ()),
            measures=given.measures and began == version - 1 and has_answered,
            evaluates=version if given.evaluates and began != version else None,
            rate=given.rate,
        )
        held.add(name, assignment, state.start(name, number).shared)

    def gather(self, merge: int, state: ServerState) -> BufferedAnswers:
        """Wait for the answers of a merge: until there are enough, no client has work, or the deadline has passed."""
        settings, held = self._scenario.round, self.work
        until = time.monotonic() + (math.inf if settings.deadline is None else settings.deadline)
        came: dict[str, list[_Came]] = {}
        failures, refused = dict[str, Failure](), dict[str, Failure]()
        order: list[tuple[str, int, int]] = []
        while len(came) < self.size and held.state.work:
            instructions = held.instructions(state.name, self._scenario.rounds)
            count = 1 if self._is_at_once else self.size - len(came)
            answered = False
            for name, answer in self._arrivals.wait(merge, held.state.work, instructions, count, until):
                answered = True
                assignment, start = held.pop(name)
                held.state.clock = max(held.state.clock, assignment.due)
                if isinstance(answer, Failure):
                    failures[name] = answer
                    continue
                assert isinstance(answer, Trained)
                order.append((name, assignment.version, assignment.number))
                if refusal := self._refuse_age(merge, assignment):
                    refused[name] = refusal
                else:
                    came.setdefault(name, []).append(_Came(assignment, start, answer))
                if self._is_at_once and len(came) < self.size:
                    self._give_again(name, assignment.number, order)
            if not answered:
                break
        batch = self._weigh(merge, state, dict(sorted(came.items())))
        failed = {name: failure.kind for name, failure in failures.items()}
        return replace(batch, failures={**refused, **failures}, came=order, failed=failed)

    def _give_again(self, name: str, number: int, order: Sequence[tuple[str, int, int]]) -> None:
        """Give a client work at once that has answered, unless it has done so too often before the merge."""
        if sum(client == name for client, *_ in order) < MOST_ANSWERS:
            assert self._work is not None, "work was given before any was answered"
            self._give(name, self._work, number)
            instruction = self.work.instruction(name, self._work.state.name, self._scenario.rounds)
            self._arrivals.begin({name: instruction})

    def finish(self, merge: int, batch: BufferedAnswers, step: AcceptedStep | None, shared: np.ndarray) -> None:
        """Remember a merge: its clients, its step, and the order of events. shared: [S] after it."""
        state, most = self.work.state, self._scenario.round.max_staleness
        limit = self._scenario.proximity.kl_joint
        unknown = math.inf if limit is None else limit
        kl = 0.0 if step is None else unknown if step.joint is None else step.joint
        state.steps = [*state.steps, kl][-most:]
        if self._folder is not None:
            order = MergeOrder(merge, self._told, tuple(batch.came), batch.failed, digest_shared(shared))
            append_order(self._folder, order)

    def _refuse_age(self, merge: int, assignment: Assignment) -> Failure | None:
        """Refuse an answer to work that began too long ago."""
        age, most = merge - 1 - assignment.version, self._scenario.round.max_staleness
        if age <= most:
            return None
        return Failure("late", f"it began {age} merges ago, and round.max_staleness is {most}")

    def _weigh(self, merge: int, state: ServerState, came: Mapping[str, Sequence[_Came]]) -> BufferedAnswers:
        """Put the answers onto the present shared blocks, combine each client's, and weigh them."""
        ages = {name: [merge - 1 - each.assignment.version for each in answers] for name, answers in came.items()}
        single = {name: [self._staleness(age) for age in each] for name, each in ages.items()}
        weights = {name: math.fsum(each) / len(each) for name, each in single.items()}
        recent, settings = self.work.state.recent, self._scenario.round
        recent[:] = [*recent, weights][-(settings.max_staleness + 1) :]
        if not came:
            return BufferedAnswers(())
        length = math.fsum(weights.values()) / len(weights)
        if settings.rate_fair:
            known = {name for of_merge in recent for name in of_merge}
            weights, length = weigh_fairly(recent, len(self.busy - known), len(self._clients))
        arrivals, first_evaluations = [], dict[str, EvaluationSummary]()
        for name, answers in came.items():
            rebased = []
            for each, age in zip(answers, ages[name], strict=True):
                evaluation = each.answer.evaluation
                if evaluation is not None and each.assignment.evaluates == 0 and age:
                    first_evaluations[name], evaluation = evaluation, None
                kl = None if age else each.answer.kl  # of a step that is not the latest
                point = self._rebase(each, state.start(name, each.assignment.number).shared)
                rebased.append(replace(each.answer, point=point, kl=kl, evaluation=evaluation, difference=None))
            answer, number = combine_answers(rebased, single[name]), answers[-1].assignment.number
            arrivals.append(Arrival(name, number, ages[name][0], answer, weights[name]))
        return BufferedAnswers(arrivals, length=length, first_evaluations=first_evaluations)

    def _rebase(self, came: _Came, shared: np.ndarray) -> np.ndarray:
        """Put a point onto the present shared blocks."""
        point = came.answer.point
        return rebase(point, came.start, shared) if point.size else point

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
