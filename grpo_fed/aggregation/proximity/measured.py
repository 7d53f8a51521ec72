"""Searches for the longest step within all KL budgets. What is accepted was measured.

A step is only accepted if the same clients measured it at the same time, with all its blocks together and with each
block alone. Estimates only decide what is measured next. As clients measure KL on states that stay with them, the
search is a dialogue:

    search = BudgetSearch(budgets, weights)
    while steps := search.next_query():
        search = search.with_answers(...)  # the KL of each step, by client
    step = search.accepted()

1. The first query measures the whole step, and each block alone at several fractions of its step.
2. From these `fraction_at_budget` estimates at which fraction each block alone just meets its budget, and
   `joint_multiples` by how much these fractions have to shrink for all blocks together. The second query measures steps
   around this estimate; it is nearly always the last.
3. For long steps and hidden layers the estimates may be wrong. Then the third query measures the steps of
   `backtracking_steps`, from fractions that were measured to be within each block's budget.

A mean over the clients, and the worst of them, are in the hand of one that lies, or whose policy gives NaN. So a client
is set aside whose KL cannot be true beside the others': `set_aside` says which and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from grpo_fed.aggregation.outliers import medians_of_others, weighted_median
from grpo_fed.aggregation.proximity.quadratic import fraction_within
from grpo_fed.aggregation.proximity.records import AcceptedBlock, AcceptedStep, Budgets, StepFractions

MAX_QUERIES = 3
"""Queries at most; one without any answer counts too."""
BLOCK_FRACTIONS = (1.0, 1 / 4, 1 / 16)
"""Fractions of its step at which a block alone is measured first: few, as each costs a pass over a client's states."""
JOINT_MULTIPLES = (1.25, 1.0, 0.9, 0.8, 0.65, 0.5, 0.3)
"""Multiples of the estimate at which all blocks together are measured next."""
BACKTRACKING = tuple(0.5**halvings for halvings in range(8))
"""Multiples of each block's largest fraction within budget that are measured last."""
SAFETY = 0.98
"""Multiple of an estimated fraction that is measured, so that most estimates turn out to be within budget."""
MOST_APART = 1000.0
"""How many times the others' median, and the largest budget, the KL of a whole step may be in a mean."""
STUCK, SHRUNK = 0.5, 1 / 16
"""Parts of the KL of the whole step that a client still has at a step at which the others have less than the second, so
that no step is short enough for it: the KL of a policy falls as the square of a short step."""


def fraction_at_budget(kl: Sequence[float], budget: float) -> float:
    """Estimate the fraction of a block's step at which the KL of the block alone is just within its budget.

    Between two measured fractions KL is taken to be a power of the fraction; below the smallest one, its square.

    kl: at each of BLOCK_FRACTIONS, infinite where it is unknown.

    Example: 0.32, 0.02 and 0.00125 at 1, 1/4 and 1/16 grow as the square of the fraction, so a budget of 0.08 is met at
    1/2; the estimate is SAFETY times that, 0.49.
    """
    within = next((i for i, value in enumerate(kl) if value <= budget and budget > 0), None)
    if within is None:
        return SAFETY * BLOCK_FRACTIONS[-1] * fraction_within(kl[-1], budget)
    fraction = BLOCK_FRACTIONS[within]
    if within == 0 or kl[within] <= 0 or kl[within - 1] == math.inf:
        return fraction
    power = math.log(budget / kl[within]) / math.log(kl[within - 1] / kl[within])
    return max(fraction, SAFETY * fraction * math.pow(BLOCK_FRACTIONS[within - 1] / fraction, power))


def joint_multiples(alone: Sequence[float], together: float, limits: Sequence[float], joint: float) -> list[float]:
    """Estimate by how much blocks that alone meet their budgets have to shrink together; return multiples around that.

    For a small step KL is d'Fd / 2 with the Fisher matrix F, so B blocks together have at most B times the sum of their
    KL (in rounds of PPO about twice). How many times is taken from their whole steps, and counted as 1 to B.

    alone: [B], KL of each block's whole step alone. together: KL of all whole steps. limits: [B], the blocks' budgets.
    joint: the budget of all together.

    Example: two blocks of KL 0.02 each have 0.08 together, twice their sum. Within limits of 0.01 each, 0.04 is
    expected together. A joint budget of 0.01 is met at half of that step, so the multiples are 1 and 0.625, 0.5, 0.45,
    0.4, 0.325, 0.25 and 0.15.
    """
    coupling = together / (sum(alone) or math.inf)
    coupling = min(max(1.0, coupling), len(alone)) if coupling < math.inf else len(alone)
    expected = coupling * sum(min(kl, limit) for kl, limit in zip(alone, limits, strict=True))
    shrink = fraction_within(expected, joint) if expected < math.inf else 0.5
    return sorted({1.0, *(min(1.0, shrink * multiple) for multiple in JOINT_MULTIPLES)}, reverse=True)


def backtracking_steps(measured: Iterable[tuple[StepFractions, float]], limits: Sequence[float]) -> list[StepFractions]:
    """Return steps that shrink from the largest fraction at which each block alone was measured within its budget.

    measured: steps and their KL. limits: [B], the blocks' budgets.

    Example: two blocks with budgets of 0.02. Alone, the first had a KL of 0.5 at 1 and of 0.01 at 1/4, the second of
    0.001 at 1. The steps are (1/4, 1), (1/8, 1/2), (1/16, 1/4) and so on.
    """
    largest = [0.0] * len(limits)
    for step, kl in measured:
        moving = [block for block, fraction in enumerate(step) if fraction]
        if len(moving) == 1 and kl <= limits[moving[0]]:
            largest[moving[0]] = max(largest[moving[0]], step[moving[0]])
    return [tuple(multiple * fraction for fraction in largest) for multiple in BACKTRACKING]


@dataclass(frozen=True)
class Query:
    """Steps whose KL clients are asked to measure, and what they answered."""

    candidates: tuple[StepFractions, ...] = ()
    """Steps that may be accepted."""
    steps: tuple[StepFractions, ...] = ()
    """[M]: all steps to measure: the candidates, and for each of them its blocks alone."""
    clients: tuple[str, ...] = ()
    """Names of the clients that answered."""
    answers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """[M]: what each of them measured."""
    kl: Mapping[StepFractions, float] = field(default_factory=dict)
    """The KL of each step over these clients, but those that were set aside; infinite where one measured NaN."""

    @staticmethod
    def of(candidates: Iterable[StepFractions]) -> Query:
        """Ask for candidates and for each of their blocks alone, each step once."""
        moving = tuple(step for step in dict.fromkeys(candidates) if any(step))
        alone = (block_alone(step, block) for step in moving for block, fraction in enumerate(step) if fraction)
        return Query(moving, tuple(dict.fromkeys([*moving, *alone])))

    def measured(self, step: StepFractions) -> float | None:
        """Return the KL of a step, None if it was not measured; where no block moves, 0."""
        return self.kl.get(step) if any(step) else 0.0

    def measured_or_infinite(self, step: StepFractions) -> float:
        """Return the KL of a step, more than any budget if it was not measured."""
        kl = self.measured(step)
        return math.inf if kl is None else kl


def block_alone(step: StepFractions, block: int) -> StepFractions:
    """Return the step of one block alone, all others at 0."""
    return tuple(fraction if other == block else 0.0 for other, fraction in enumerate(step))


@dataclass(frozen=True)
class BudgetSearch:
    """The queries so far and their answers, from which the next query or the accepted step follows."""

    budgets: Budgets
    weights: Mapping[str, float]
    """The weight of each asked client in a mean."""
    queries: tuple[Query, ...] = ()
    set_aside: Mapping[str, str] = field(default_factory=dict)
    """The clients whose KL does not count, with the reason."""
    estimates_again: bool = False
    """Whether the last query estimates the longest step anew, as a client was set aside after the second."""

    def next_query(self) -> tuple[StepFractions, ...]:
        """Return the steps that clients should measure next, [M]; empty once the search has ended."""
        return self._next.steps

    def with_answers(self, answers: Mapping[str, Sequence[float]]) -> BudgetSearch:
        """Add the answers to `next_query`.

        answers: KL of each step, [M], by client. Those of another length or of unknown clients are left out.
        """
        query = self._next
        assert query.steps, "nothing was asked"
        clients = [name for name in sorted(answers) if name in self.weights and len(answers[name]) == len(query.steps)]
        given = {name: tuple(map(float, answers[name])) for name in clients}
        search = self._with((*self.queries, replace(query, clients=tuple(clients), answers=given)), self.set_aside)
        set_aside = search._stand_apart()
        if set_aside == dict(self.set_aside):
            return search
        return replace(self._with(search.queries, set_aside), estimates_again=len(search._answered) == 2)

    def _with(self, queries: Sequence[Query], set_aside: Mapping[str, str]) -> BudgetSearch:
        """Combine what clients measured, without some of them."""
        combined = []
        for query in queries:
            clients = [name for name in query.clients if name not in set_aside]
            by_step = zip(*(query.answers[name] for name in clients), strict=True)
            kl = (self._over_clients(clients, values) for values in by_step)
            combined.append(replace(query, kl=dict(zip(query.steps, kl, strict=False))))
        return replace(self, queries=tuple(combined), set_aside=set_aside)

    def _stand_apart(self) -> dict[str, str]:
        """Find the clients whose KL cannot be true beside the others', and say why; fewer than half of the clients.

        A median needs none of this.
        """
        aside, limit = dict(self.set_aside), self._largest_limit
        if not self._answered or self.budgets.over == "median" or limit == math.inf:
            return aside
        first, last = self._answered[0], self._answered[-1]
        whole = self.whole_kl
        for name, median in medians_of_others(whole).items():
            if median < math.inf and not whole[name] <= MOST_APART * max(median, limit):
                aside[name] = f"{whole[name]:.3g} for the whole step, and the others' median is {median:.3g}"
        if last is not first and last.candidates and not self._accepted:
            step = min(last.candidates, key=sum)
            at = last.steps.index(step)
            moved = [name for name in last.clients if 0 < whole.get(name, 0.0) < math.inf]
            parts = {name: last.answers[name][at] / whole[name] for name in moved}
            for name, median in medians_of_others(parts).items():
                if median < SHRUNK and parts[name] > STUCK:
                    kept, others = f"{parts[name]:.0%}", f"{median:.2g}"
                    aside.setdefault(name, f"{kept} of it remain at a step at which the others have {others} times it")
        return aside if 2 * len(aside) < len(first.clients) else dict(self.set_aside)

    @property
    def whole_kl(self) -> dict[str, float]:
        """The KL of the whole step as each client measured it, NaN as infinity; empty without answers."""
        if not self._answered:
            return {}
        first = self._answered[0]
        at = first.steps.index(self._whole)
        return {name: math.inf if math.isnan(kl[at]) else kl[at] for name, kl in first.answers.items()}

    @property
    def _largest_limit(self) -> float:
        """The largest budget that is a limit; infinite if there is none."""
        return max((limit for limit in (*self._limits, self.budgets.joint) if limit < math.inf), default=math.inf)

    def accepted(self) -> AcceptedStep:
        """Return the longest step that was measured to be within all budgets; no step if there is none."""
        assert not self.next_query(), "the search has not ended"
        query, step = self._accepted or (Query(), (0.0,) * len(self._limits))
        first = self._answered[0] if self._answered else Query()
        whole = (1.0,) * len(step)
        blocks = tuple(
            AcceptedBlock(
                block,
                wanted=first.measured(block_alone(whole, number)),
                budget=budget,
                alpha=step[number],
                kl=query.measured(block_alone(step, number)),
            )
            for number, (block, budget) in enumerate(self.budgets.blocks.items())
        )
        clients = tuple(name for name in query.clients if name not in self.set_aside)
        return AcceptedStep(blocks, first.measured(whole), self.budgets.joint, query.measured(step), clients)

    def _over_clients(self, clients: Sequence[str], kl: Sequence[float]) -> float:
        """Combine what each client measured for a step, as the budgets are meant: the worst, the median or the mean."""
        values = [math.inf if math.isnan(value) else value for value in kl]
        if self.budgets.over == "worst":
            return max(values)
        if self.budgets.over == "median":
            return weighted_median(values, [self.weights[name] for name in clients])
        terms = [(self.weights[name], value) for name, value in zip(clients, values, strict=True) if self.weights[name]]
        total = sum(weight for weight, _ in terms)
        return sum(weight * value for weight, value in terms) / total if total else math.inf

    @property
    def _next(self) -> Query:
        """The next query, empty once the search has ended. A query without any answer is asked again."""
        if len(self.queries) == MAX_QUERIES or not any(self._whole) or (self._accepted and not self.estimates_again):
            return Query()
        if self.estimates_again:
            return self._second_query(self._answered[0])
        match self._answered:
            case ():
                return self._first_query()
            case (first,):
                return self._second_query(first)
            case _:
                return self._last_query()

    def _first_query(self) -> Query:
        """Ask for the whole step, and for each block alone at several fractions.

        A block whose budget is 0 or infinite needs no estimate, so it is measured at 1 alone.
        """
        count = len(self._limits)
        alone = (
            block_alone((fraction,) * count, block)
            for block, limit in enumerate(self._limits)
            for fraction in (BLOCK_FRACTIONS if 0 < limit < math.inf else (1.0,))
        )
        return Query((self._whole,), tuple(dict.fromkeys([(1.0,) * count, self._whole, *alone])))

    def _second_query(self, first: Query) -> Query:
        """Ask for steps around the estimate of the longest one within all budgets."""
        blocks = range(len(self._limits))
        fractions = [fraction_at_budget(self._block_kl(first, block), self._limits[block]) for block in blocks]
        alone = [first.measured_or_infinite(block_alone(self._whole, block)) for block in blocks]
        together = first.measured_or_infinite(self._whole)
        multiples = joint_multiples(alone, together, self._limits, self.budgets.joint)
        return Query.of(tuple(multiple * fraction for fraction in fractions) for multiple in multiples)

    def _block_kl(self, first: Query, block: int) -> list[float]:
        """Return the KL of a block alone at each of BLOCK_FRACTIONS."""
        steps = ((fraction,) * len(self._limits) for fraction in BLOCK_FRACTIONS)
        return [first.measured_or_infinite(block_alone(step, block)) for step in steps]

    def _last_query(self) -> Query:
        """Ask for steps that shrink from what was measured to be within each block's budget."""
        measured = ((step, query.measured_or_infinite(step)) for query in self._answered for step in query.steps)
        steps = backtracking_steps(measured, self._limits)
        return Query.of(tuple(f * whole for f, whole in zip(step, self._whole, strict=True)) for step in steps)

    @property
    def _limits(self) -> tuple[float, ...]:
        """[B]: the blocks' budgets."""
        return tuple(self.budgets.blocks.values())

    @property
    def _whole(self) -> StepFractions:
        """[B]: the whole step, without blocks that may not move."""
        return tuple(1.0 if limit > 0 and self.budgets.joint > 0 else 0.0 for limit in self._limits)

    @property
    def _answered(self) -> tuple[Query, ...]:
        return tuple(query for query in self.queries if query.clients)

    @property
    def _accepted(self) -> tuple[Query, StepFractions] | None:
        """The longest candidate that is within all budgets, and the query that measured it."""
        within = ((query, step) for query in self.queries for step in query.candidates if self._is_within(query, step))
        return max(within, key=lambda pair: sum(pair[1]), default=None)

    def _is_within(self, query: Query, step: StepFractions) -> bool:
        """Return whether a step was measured within its budgets, together and each block alone.

        Where a budget is infinite, nothing has to be measured.
        """
        limits = {block_alone(step, block): self._limits[block] for block, fraction in enumerate(step) if fraction}
        checks = [(step, self.budgets.joint), *limits.items()]
        return all(limit == math.inf or query.measured_or_infinite(part) <= limit for part, limit in checks)
