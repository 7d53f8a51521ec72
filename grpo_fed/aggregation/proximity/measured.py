"""The step as far as clients allow, who measure its KL on states that stay with them: a dialogue over messages.

    search = Search(budgets, weights)
    while trials := search.ask():
        search = search.tell(what each client answered)
    kept = search.kept()

First each block alone is measured at several parts of its step. From that follows where each should just be within its
budget, and how much of that all together may go: as KL is d'Fd / 2 for a small step and the Fisher matrix F, B blocks
together have at most B times the sum of their KL, and in PPO's rounds about twice. Around there whole policies are
measured. Of long steps, and those of hidden layers, none of this need be true. So estimates decide what to ask next and
nothing else: what is accepted was measured, together and each block alone, by the same clients at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from grpo_fed.aggregation.proximity.quadratic import fraction_within
from grpo_fed.aggregation.proximity.records import AcceptedBlock, AcceptedStep, Budgets, StepFractions

MAX_QUERIES = 3
"""Messages at most; the second is nearly always the last."""
BLOCK_FRACTIONS = (1.0, 1 / 4, 1 / 16)
"""Parts of its step at which a block alone is measured first. Each trial is a pass over a client's states: few do."""
JOINT_MULTIPLES = (1.25, 1.0, 0.9, 0.8, 0.65, 0.5, 0.3)
"""Multiples of the estimate at which whole policies are measured next."""
BACKTRACKING = tuple(0.5**rung for rung in range(8))
"""Parts of what was right for each block alone, where the estimate was wrong."""
SAFETY = 0.98
"""How much of an estimate to trust."""


@dataclass(frozen=True)
class Query:
    """A message to the clients, and what came back."""

    steps: tuple[StepFractions, ...] = ()
    """Those of the trials that may be accepted."""
    fractions: tuple[StepFractions, ...] = ()
    """[M]: all that is measured; for each of the steps, its blocks alone too."""
    clients: tuple[str, ...] = ()
    """Who answered."""
    kl: Mapping[StepFractions, float] = field(default_factory=dict)
    """Of each trial, over those clients; what is no number counts as infinite."""


@dataclass(frozen=True)
class BudgetSearch:
    """What was asked and answered so far, from which all else follows."""

    budgets: Budgets
    weights: Mapping[str, float]
    """Of the clients that are asked, in the mean."""
    queries: tuple[Query, ...] = ()

    def next_query(self) -> tuple[StepFractions, ...]:
        """[M]: what the clients should measure now; nothing once the step is decided."""
        return self._next.fractions

    def with_answers(self, answers: Mapping[str, Sequence[float]]) -> BudgetSearch:
        """Go on with the answers to `ask`, [M] by client. One of another length, or of a stranger, is none."""
        asked = self._next
        assert asked.fractions, "nothing was asked"
        heard = [
            name for name in sorted(answers) if name in self.weights and len(answers[name]) == len(asked.fractions)
        ]
        columns = zip(*([float(kl) for kl in answers[name]] for name in heard), strict=True)
        kl = dict(zip(asked.fractions, (self._over_clients(heard, column) for column in columns), strict=False))
        return replace(self, queries=(*self.queries, replace(asked, clients=tuple(heard), kl=kl)))

    def accepted(self) -> AcceptedStep:
        """The longest step that was measured to be within all budgets, or none at all."""
        assert not self.next_query(), "not decided yet"
        trip, step = self._accepted or (Query(), (0.0,) * len(self._limits))
        first = self._answered[0] if self._answered else Query()
        blocks = []
        for number, (block, budget) in enumerate(self.budgets.blocks.items()):
            wanted, alpha = self._kl(first, self._alone(number, 1.0)), step[number]
            blocks.append(AcceptedBlock(block, wanted, budget, alpha, self._kl(trip, self._alone(number, alpha))))
        wanted, joint = self._kl(first, (1.0,) * len(step)), self._kl(trip, step)
        return AcceptedStep(tuple(blocks), wanted, self.budgets.joint, joint, trip.clients)

    def _over_clients(self, clients: Sequence[str], kl: Sequence[float]) -> float:
        """One number for what each of the clients measured."""
        numbers = [math.inf if math.isnan(one) else one for one in kl]
        if self.budgets.over == "worst":
            return max(numbers)
        counted = [(self.weights[name], one) for name, one in zip(clients, numbers, strict=True) if self.weights[name]]
        total = sum(weight for weight, _ in counted)
        return sum(weight * one for weight, one in counted) / total if total else math.inf

    @property
    def _next(self) -> Query:
        if self._accepted or len(self.queries) == MAX_QUERIES or not any(self._whole):
            return Query()
        match len(self._answered):
            case 0:
                return self._first_query()
            case 1:
                return self._trip(self._second_query(self._answered[0]))
            case _:
                return self._trip(self._last_query())

    # What to ask

    def _first_query(self) -> Query:
        """The whole step, and each block alone at several parts of it."""
        ladders = [BLOCK_FRACTIONS if 0 < limit < math.inf else (1.0,) for limit in self._limits]
        alone = [self._alone(number, alpha) for number, ladder in enumerate(ladders) for alpha in ladder]
        return Query((self._whole,), tuple(dict.fromkeys([(1.0,) * len(ladders), self._whole, *alone])))

    def _trip(self, steps: Iterable[StepFractions]) -> Query:
        """These steps, each with its blocks alone."""
        steps = tuple(step for step in dict.fromkeys(steps) if any(step))
        alone = (self._alone(number, alpha) for step in steps for number, alpha in enumerate(step) if alpha)
        return Query(steps, tuple(dict.fromkeys([*steps, *alone])))

    def _second_query(self, survey: Query) -> Iterator[StepFractions]:
        """Down from where each block alone should just be within its budget, around where all together should be."""
        tops = [self._top(survey, number) for number in range(len(self._limits))]
        alone = [self._certain(survey, self._alone(number, alpha)) for number, alpha in enumerate(self._whole)]
        coupling = self._certain(survey, self._whole) / (sum(alone) or math.inf)
        coupling = min(max(1.0, coupling), len(alone)) if coupling < math.inf else len(alone)
        expected = coupling * sum(min(kl, limit) for kl, limit in zip(alone, self._limits, strict=True))
        shrink = fraction_within(expected, self.budgets.joint) if expected < math.inf else 0.5
        for multiple in sorted({1.0, *(min(1.0, shrink * multiple) for multiple in JOINT_MULTIPLES)}, reverse=True):
            yield tuple(multiple * top for top in tops)

    def _top(self, survey: Query, number: int) -> float:
        """Where a block alone should just be within its budget: above the highest rung that is, and below the next."""
        limit = self._limits[number]
        kl = [self._certain(survey, self._alone(number, alpha)) for alpha in BLOCK_FRACTIONS]
        low = next((rung for rung, one in enumerate(kl) if one <= limit and limit > 0), None)
        if low is None:
            return SAFETY * BLOCK_FRACTIONS[-1] * fraction_within(kl[-1], limit)
        if low == 0 or kl[low] <= 0 or kl[low - 1] == math.inf:
            return BLOCK_FRACTIONS[low]
        power = math.log(limit / kl[low]) / math.log(kl[low - 1] / kl[low])  # KL is like a power of alpha between them
        return max(
            BLOCK_FRACTIONS[low],
            SAFETY * BLOCK_FRACTIONS[low] * math.pow(BLOCK_FRACTIONS[low - 1] / BLOCK_FRACTIONS[low], power),
        )

    def _last_query(self) -> Iterator[StepFractions]:
        """Down from the most that was measured to be within its budget for each block alone."""
        most = [0.0] * len(self._limits)
        for trip in self._answered:
            for trial in trip.fractions:
                moving = [number for number, alpha in enumerate(trial) if alpha]
                if len(moving) == 1 and self._certain(trip, trial) <= self._limits[moving[0]]:
                    most[moving[0]] = max(most[moving[0]], trial[moving[0]])
        for factor in BACKTRACKING:
            yield tuple(factor * alpha * whole for alpha, whole in zip(most, self._whole, strict=True))

    # What is known

    @property
    def _limits(self) -> tuple[float, ...]:
        """[B]."""
        return tuple(self.budgets.blocks.values())

    @property
    def _whole(self) -> StepFractions:
        """The step as the merge wants it, but for blocks that may not move."""
        return tuple(1.0 if limit > 0 and self.budgets.joint > 0 else 0.0 for limit in self._limits)

    @property
    def _answered(self) -> tuple[Query, ...]:
        return tuple(trip for trip in self.queries if trip.clients)

    @property
    def _accepted(self) -> tuple[Query, StepFractions] | None:
        within = ((trip, step) for trip in self.queries for step in trip.steps if self._is_within(trip, step))
        return max(within, key=lambda pair: sum(pair[1]), default=None)

    def _is_within(self, trip: Query, step: StepFractions) -> bool:
        """Whether this was measured, for the whole policy and for each block alone, except where there is no limit."""
        limits = {self._alone(number, alpha): self._limits[number] for number, alpha in enumerate(step) if alpha}
        checks = [(step, self.budgets.joint), *limits.items()]
        return all(limit == math.inf or self._certain(trip, trial) <= limit for trial, limit in checks)

    def _certain(self, trip: Query, trial: StepFractions) -> float:
        """The KL of a trial, or more than any budget if nobody measured it."""
        kl = self._kl(trip, trial)
        return math.inf if kl is None else kl

    def _kl(self, trip: Query, trial: StepFractions) -> float | None:
        """Of a trial, None if nobody measured it; what does not move needs no measuring."""
        return trip.kl.get(trial) if any(trial) else 0.0

    def _alone(self, number: int, alpha: float) -> StepFractions:
        """One block moved, the others where they were."""
        return tuple(alpha if other == number else 0.0 for other in range(len(self._limits)))
