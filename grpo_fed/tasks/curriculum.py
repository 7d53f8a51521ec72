"""Levels of a client's task, and how a curriculum chooses those that the client trains on.

A level gives values to P arguments of the client's environment, so that it may differ from episode to episode; with
`replay` it also gives the seed that an episode begins with. All that a curriculum remembers is its state, an array of
floats, and all that happens to it are pure functions:

    draw_levels(curriculum, state, progress, ...)    the levels of the episodes that begin in a round
    gather_evidence(curriculum, state, ...)          the returns of the episodes that ended in it, by slot
    advance(curriculum, state, evidence)             the state after the round

What a slot is depends on the kind: all episodes for `return`, an edge of the box for `expanding`, a level for
`learnability`. Evidence of several clients adds up, so a server that steers them needs nothing else of them. `replay`
(level_replay.py) has no slots: what moves it are advantages, which stay with the client.

N copies of a client's environment, E episodes that ended, S slots, M levels of `learnability`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from grpo_fed.scenario.settings import CurriculumSettings
from grpo_fed.tasks.level_replay import draw_seeds, no_seeds, values_of_seeds

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)
"""Bases of the digits that spread levels in the second and further arguments, of which a scenario allows ten."""
EPISODE_SEED = "episode seed"
"""What the seed of an episode is called in a level; no argument has a space in its name."""
PER_SLOT = 3
"""Numbers of a state for each slot."""
DIGITS = 12
"""Decimal digits of a fraction of the way: ten steps of 0.1 are 1."""


@final
@dataclass(frozen=True)
class Curriculum:
    """How the levels of a client are chosen."""

    settings: CurriculumSettings

    @property
    def names(self) -> tuple[str, ...]:
        """[P]: the arguments that a level gives values to."""
        return tuple(self.settings.ranges)

    @property
    def level_names(self) -> tuple[str, ...]:
        """[Q]: what a level of training has values for: the arguments, and with `replay` the seed before them."""
        return (EPISODE_SEED, *self.names) if self.settings.kind == "replay" else self.names

    @property
    def limits(self) -> np.ndarray:
        """[2, P]: the lowest and the highest values."""
        return np.array(list(self.settings.ranges.values()), np.float64).reshape(-1, 2).T

    @property
    def first_box(self) -> np.ndarray:
        """[2, P]: the box that training begins with."""
        ranges = {**self.settings.ranges, **self.settings.start}
        return np.array([ranges[name] for name in self.names], np.float64).T

    @property
    def slots(self) -> int:
        """S: how many means of returns move it; 0 where returns do not."""
        return {"return": 1, "expanding": 2 * len(self.names), "learnability": self.settings.levels}.get(
            self.settings.kind, 0
        )


def uniform_curriculum(curriculum: Curriculum) -> Curriculum:
    """Make the curriculum of the same ranges that draws from all of them alike."""
    return Curriculum(curriculum.settings.model_copy(update={"kind": "uniform"}))


# The state -----------------------------------------------------------------------------------------------------------


def first_state(curriculum: Curriculum) -> np.ndarray:
    """Make the state before the first round, [X] float64.

    With a box that returns move: a fraction of the way to the limits for each slot, the number of episodes that wait to
    be judged there, and the sum of their returns. With `learnability`: faded successes and failures of each level, and
    the number of all its episodes. With `replay`: as level_replay.py has it.
    """
    if curriculum.settings.kind == "replay":
        return no_seeds(curriculum.settings)
    return np.zeros(PER_SLOT * curriculum.slots)


def box_edges(curriculum: Curriculum, state: np.ndarray, progress: float) -> np.ndarray:
    """Compute the lowest and the highest values of the levels of a round, [2, P].

    progress: of the run, 0 to 1, where the round begins.
    """
    match curriculum.settings.kind:
        case "schedule":
            return _on_the_way(curriculum, np.array(min(1.0, progress / curriculum.settings.until)))
        case "return":
            return _on_the_way(curriculum, state[0])
        case "expanding":
            return _on_the_way(curriculum, state[: curriculum.slots].reshape(2, -1))
        case _:
            return curriculum.limits


def _on_the_way(curriculum: Curriculum, fractions: np.ndarray) -> np.ndarray:
    """Go these fractions of the way from the first box to the limits, [2, P]; at 1 to the limits exactly."""
    first, limits = curriculum.first_box, curriculum.limits
    return np.where(fractions >= 1, limits, first + fractions * (limits - first))


# Levels --------------------------------------------------------------------------------------------------------------


def spread_levels(curriculum: Curriculum, count: int) -> np.ndarray:
    """Spread levels evenly over all ranges, [count, P]: Hammersley's points (1960), each in the middle of its part.

    The first argument takes `count` equally distant values in order; the others those of the radical inverse.
    """
    numbers = np.arange(count)
    shares = [(numbers + 0.5) / count]
    shares += [radical_inverse(numbers + 1, base) for base in PRIMES[: len(curriculum.names) - 1]]
    low, high = curriculum.limits
    levels: np.ndarray = low + np.stack(shares, axis=1) * (high - low)
    return levels


def radical_inverse(numbers: np.ndarray, base: int) -> np.ndarray:
    """Mirror the digits of numbers at the point, so that 6 in base 2, 110, gives 0.011 = 3/8."""
    result, part, rest = np.zeros(len(numbers)), 1.0, numbers
    while rest.any():
        part /= base
        result += part * (rest % base)
        rest = rest // base
    return result


def draw_levels(
    curriculum: Curriculum, state: np.ndarray, progress: float, generator: np.random.Generator, count: int
) -> np.ndarray:
    """Draw the levels of the episodes that `count` copies begin in a round, [N, Q].

    progress: of the run, 0 to 1, where the round begins.
    """
    if curriculum.settings.kind == "learnability":
        chances = level_chances(curriculum, state)
        return spread_levels(curriculum, len(chances))[generator.choice(len(chances), count, p=chances)]
    low, high = edges = box_edges(curriculum, state, progress)
    if curriculum.settings.kind == "replay":
        seeds = draw_seeds(curriculum.settings, state, generator, count)
        return np.column_stack([seeds, values_of_seeds(seeds, low, high)])
    levels: np.ndarray = low + generator.random((count, len(low))) * (high - low)
    if curriculum.settings.kind == "expanding":
        moving = np.flatnonzero(_moves(curriculum, state))
        if moving.size:
            copies = np.arange(round(curriculum.settings.edges * count))
            slots = moving[(generator.integers(moving.size) + copies) % moving.size]
            sides, arguments = np.divmod(slots, len(low))
            levels[copies, arguments] = edges[sides, arguments]
    return levels


def _moves(curriculum: Curriculum, state: np.ndarray) -> np.ndarray:
    """Decide which edges of the box can still move, [S] bool: one at its limit cannot, unless it may come back."""
    away = (curriculum.first_box != curriculum.limits).reshape(-1)
    return np.asarray(away & ((state[: curriculum.slots] < 1) | (curriculum.settings.floor is not None)))


def success_rates(curriculum: Curriculum, state: np.ndarray) -> np.ndarray:
    """Estimate how often each level succeeds, [M]: the mean of a beta distribution that began uniform."""
    successes, failures, _ = state.reshape(PER_SLOT, -1)
    return np.asarray((successes + 1) / (successes + failures + 2))


def level_chances(curriculum: Curriculum, state: np.ndarray) -> np.ndarray:
    """Compute the probabilities of the levels, [M]: in proportion to p (1 - p), and a part of it equal for all."""
    rates, explore = success_rates(curriculum, state), curriculum.settings.explore
    learnability = rates * (1 - rates)
    return np.asarray((1 - explore) * learnability / learnability.sum() + explore / len(rates))


# Evidence ------------------------------------------------------------------------------------------------------------


def gather_evidence(
    curriculum: Curriculum, state: np.ndarray, progress: float, levels: np.ndarray, returns: np.ndarray
) -> np.ndarray:
    """Count the episodes of each slot and add up their returns, or with `learnability` their successes, [2, S].

    levels: [E, P], what the episodes were played at. An episode that was played at an edge before this moved is of no
    slot. returns: [E].
    """
    settings = curriculum.settings
    if settings.kind == "return":
        return np.array([[len(returns)], [returns.sum()]], np.float64)
    if settings.kind == "expanding":
        at_edge = (levels[:, None] == box_edges(curriculum, state, progress)).reshape(-1, curriculum.slots)
        return np.stack([at_edge.sum(0), returns @ at_edge])
    counts, successes = np.zeros(curriculum.slots), np.zeros(curriculum.slots)
    if settings.kind == "learnability":
        known = {tuple(level): slot for slot, level in enumerate(spread_levels(curriculum, settings.levels).tolist())}
        slots = np.array([known.get(tuple(level), -1) for level in levels.tolist()], np.int64)
        solved = returns >= settings.target if settings.target is not None else np.zeros(len(returns), bool)
        counts += np.bincount(slots[slots >= 0], minlength=curriculum.slots)
        successes += np.bincount(slots[(slots >= 0) & solved], minlength=curriculum.slots)
    return np.stack([counts, successes])


def advance(curriculum: Curriculum, state: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Compute the state after a round from the evidence of its episodes, [2, S]."""
    settings = curriculum.settings
    if settings.kind == "learnability":
        (episodes, solved), (successes, failures, played) = evidence, state.reshape(PER_SLOT, -1)
        faded = settings.fade * successes + solved, settings.fade * failures + episodes - solved
        return np.concatenate([*faded, played + episodes])
    if not curriculum.slots:
        return state
    fractions, counts, sums = state.reshape(PER_SLOT, -1)
    counts, sums = counts + evidence[0], sums + evidence[1]
    is_due = counts >= settings.episodes
    means = sums / np.maximum(counts, 1)
    assert settings.target is not None, "the scenario has been checked"
    grows = is_due & (means >= settings.target)
    shrinks = is_due & (means < settings.floor) if settings.floor is not None else np.zeros_like(grows)
    fractions = (fractions + settings.step * grows - settings.step * shrinks).clip(0, 1).round(DIGITS)
    return np.concatenate([fractions, np.where(is_due, 0, counts), np.where(is_due, 0, sums)])


def describe_state(curriculum: Curriculum, state: np.ndarray, progress: float) -> Mapping[str, float]:
    """Make the metrics of a curriculum: the box of each argument, how large it is, and how many levels are learned.

    The size is the mean over the arguments of the part of the range that is in the box.
    """
    edges, limits = box_edges(curriculum, state, progress), curriculum.limits
    metrics = dict[str, float]()
    if curriculum.names:
        metrics["curriculum/size"] = float(((edges[1] - edges[0]) / (limits[1] - limits[0])).mean())
    for name, low, high in zip(curriculum.names, *edges.tolist(), strict=True):
        metrics |= {f"curriculum_low/{name}": low, f"curriculum_high/{name}": high}
    if curriculum.settings.kind == "learnability":
        metrics["curriculum/solved"] = float((success_rates(curriculum, state) > 0.5).mean())
        metrics["curriculum/visited"] = float((state[2 * curriculum.slots :] > 0).mean())
    if curriculum.settings.kind == "replay":
        seeds, scores, _ = state.reshape(PER_SLOT, -1)
        metrics |= {"curriculum/score": float(scores[seeds > 0].mean())} if seeds.any() else {}
    return metrics
