"""What answers weigh in a merge that does not wait for all clients.

A client trained from older shared blocks than there are now, and fast clients answer more often than slow ones. What an
answer has learned is its difference from the blocks that it began with, and `rebase` puts that onto the present ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def rebase(point: np.ndarray, began: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Move a point [S] as far as the shared blocks have moved since its client began; the same bits if they have not.

    began: the shared blocks that it began with. shared: those there are now.
    """
    return point if began is shared or np.array_equal(began, shared) else shared + (point - began)


def weigh_by_age(merges: int) -> float:
    """Weigh an answer by the merges since its client began, as FedBuff does: (1 + merges)^(-1/2)."""
    return 1.0 / math.sqrt(1.0 + merges)


def weigh_by_kl(distance: float, budget: float) -> float:
    """Weigh an answer by the KL of the steps since its client began: 1 up to the budget, then sqrt(budget / distance).

    The square root, since KL grows with the square of a step.
    """
    return 1.0 if distance <= budget else math.sqrt(budget / distance)


def weigh_fairly(recent: Sequence[Mapping[str, float]], waiting: int, clients: int) -> tuple[dict[str, float], float]:
    """Weigh the clients of a merge so that over many merges all have the same say, however often each of them answers.

    In W recent merges a client with answers of weight a_1, a_2, ... has a weight of W a / (a_1 + a_2 + ...) for one of
    them, 1 if it was in all. Its part of the way is that over the number of all clients, so a merge of all goes the
    whole way. A merge of clients that seldom answer would go further than that. So that it does not, all merges go
    shorter, by the greatest length that one of the recent ones would have: if that one alone were cut, its clients
    would have less say than others.

    recent: the weights of the answers in the latest merges by their ages, the present one being the last. waiting: how
    many clients work that were in none of them; they count as if they all came next. Return the weight of each answer
    of the present merge, and the part of the way to it that the shared blocks may go.
    """
    total: dict[str, float] = {}
    for merge in recent:
        for client, weight in merge.items():
            total[client] = total.get(client, 0.0) + weight

    def weights(merge: Mapping[str, float]) -> dict[str, float]:
        return {client: len(recent) * weight / total[client] for client, weight in merge.items()}

    ways = [math.fsum(weights(merge).values()) / clients for merge in recent]
    longest = max(1.0, waiting * len(recent) / clients, *ways)
    return weights(recent[-1]), ways[-1] / longest
