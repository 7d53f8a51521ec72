"""One answer of several that a client gave one after another, so that each client has one say in a merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from grpo_fed.federation.messages import Trained


def combine_answers(answers: Sequence[Trained], weights: Sequence[float]) -> Trained:
    """Combine the answers of a client, all of them as if they had begun with the same shared blocks.

    Points and Fisher diagonals are averaged by their weights; steps, episodes and gains are added. All else is that of
    the latest answer that has it. A single answer stays as it is, to the bit.
    """
    *earlier, last = answers
    if not earlier:
        return last
    combined = replace(
        last,
        point=_average([answer.point for answer in answers], weights),
        steps=sum(answer.steps for answer in answers),
        episodes=sum(answer.episodes for answer in answers),
        gain=math.fsum(answer.gain for answer in answers),
        since=min((answer.since for answer in answers if answer.since is not None), default=None),
    )
    fishers = [answer.fisher for answer in answers if answer.fisher is not None]
    if len(fishers) == len(answers):
        combined = replace(combined, fisher=_average(fishers, weights))
    for answer in reversed(earlier):
        combined = replace(
            combined,
            kl=answer.kl if combined.kl is None else combined.kl,
            evaluation=answer.evaluation if combined.evaluation is None else combined.evaluation,
            comparison=answer.comparison if combined.comparison is None else combined.comparison,
        )
    return combined


def _average(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Average vectors [S] by weights, in float64."""
    terms = (weight * vector.astype(np.float64) for vector, weight in zip(vectors, weights, strict=True))
    return (reduce(np.add, terms) / math.fsum(weights)).astype(np.float32)
