"""Prioritised replay of levels that are named by seeds (2010.03934): those where the critic errs most come again.

A seed names all that is random in the beginning of an episode, and the values of the arguments that a level has. The
state is an array of three rows, with a column for each of B places: the seed plus 1, or 0 for an empty place; the
level's score, which is the mean |advantage| of its steps when it was last played; and the round in which that was, by
the rounds that this state has been through.
"""

from __future__ import annotations

import numpy as np

from grpo_fed.scenario.settings import CurriculumSettings

SEEDS = 2**31
"""The seeds that environments take are below this number."""
ROWS = 3


def no_seeds(settings: CurriculumSettings) -> np.ndarray:
    """Make the state before the first round, [3 B] float64."""
    return np.zeros(ROWS * settings.levels)


def replay_chances(settings: CurriculumSettings, state: np.ndarray) -> np.ndarray:
    """Compute the probabilities of the places, [B]; an empty one has 0, and so have all if there is no other.

    (1 - rho) P_S + rho P_C with rho = `staleness`: P_S in proportion to (1 / rank)^(1 / `temperature`), the highest
    score having rank 1, and P_C to the rounds since the level was played; where these are all 0, to 1.
    """
    seeds, scores, last = state.reshape(ROWS, -1)
    filled = np.flatnonzero(seeds)
    chances = np.zeros(settings.levels)
    if filled.size:
        ranks = np.empty(filled.size)
        ranks[np.argsort(-scores[filled], kind="stable")] = np.arange(1, filled.size + 1)
        by_score = ranks ** (-1 / settings.temperature)
        age = last.max() - last[filled]
        by_age = age if age.any() else np.ones(filled.size)
        chances[filled] = (1 - settings.staleness) * by_score / by_score.sum()
        chances[filled] += settings.staleness * by_age / by_age.sum()
    return chances


def draw_seeds(
    settings: CurriculumSettings, state: np.ndarray, generator: np.random.Generator, count: int
) -> np.ndarray:
    """Draw the seeds of the levels that `count` copies play in a round, [count]: a part `explore` of them is new."""
    new = generator.integers(SEEDS, size=count).astype(np.float64)
    chances = replay_chances(settings, state)
    if not chances.any():
        return new
    places = generator.choice(len(chances), count, p=chances / chances.sum())
    replayed = state.reshape(ROWS, -1)[0, places] - 1
    return np.where(np.arange(count) < round(settings.explore * count), new, replayed)


def values_of_seeds(seeds: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Draw the values of P arguments that each of N seeds stands for, uniformly from low [P] to high [P], [N, P]."""
    shares = np.array([np.random.default_rng([SEEDS, int(seed)]).random(len(low)) for seed in seeds])
    values: np.ndarray = low + shares.reshape(len(seeds), len(low)) * (high - low)
    return values


def remember_scores(
    settings: CurriculumSettings, state: np.ndarray, seeds: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """Compute the state after a round in which these levels [J] were played and got these scores [J].

    A level that is known gets its new score. Of all levels, known and new, the B with the highest scores stay; of equal
    ones those that were known first.
    """
    known, old, last = state.reshape(ROWS, -1)
    now = last.max() + 1
    table = {int(seed): (score, round) for seed, score, round in zip(known, old, last, strict=True) if seed}
    table |= {int(seed) + 1: (float(score), now) for seed, score in zip(seeds, scores, strict=True)}
    kept = sorted(table, key=lambda seed: -table[seed][0])[: settings.levels]
    after = np.zeros((ROWS, settings.levels))
    for place, seed in enumerate(seed for seed in table if seed in set(kept)):
        after[:, place] = seed, *table[seed]
    return after.reshape(-1)
