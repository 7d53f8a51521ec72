"""Says in which rounds a client could learn nothing, since every group of its completions was rewarded equally.

An advantage compares the completions of a group with each other, and equal rewards have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_fed.runs.metrics import EQUAL_GROUPS

MOST_NAMES = 3
"""Clients that a sentence names."""
MOST_SPANS = 4
"""Spans of rounds that a sentence names for a client."""
CURE = "use a reward that tells completions apart, a larger group.size or a higher language.temperature"


def has_equal_groups_alone(metrics: Mapping[str, float | None]) -> bool:
    """Return whether no group of a client had different rewards. metrics: of its round, by their keys."""
    share = metrics.get(EQUAL_GROUPS)
    return share is not None and share >= 1


def equal_groups_note(clients: Sequence[str]) -> str:
    """Say about a round that these clients could learn nothing; empty if there are none."""
    if not clients:
        return ""
    return f"every group of {_join(clients)} had equal rewards: nothing could be learned from them"


def equal_groups_line(rounds_of: Mapping[str, Sequence[int]]) -> str:
    """Say about a whole run which clients could learn nothing in which rounds, and the cure; empty if there are none.

    rounds_of: the rounds of each such client; those with the most come first.
    """
    worst = sorted(rounds_of.items(), key=lambda item: -len(item[1]))
    names = [f"{client} in {describe_rounds(rounds)}" for client, rounds in worst if rounds]
    if not names:
        return ""
    return f"every group had equal rewards, so that nothing could be learned: {_join(names)}; {CURE}"


def describe_rounds(rounds: Sequence[int]) -> str:
    """Write numbers of rounds, in order, as spans: `round 3`, `rounds 1 to 3, 7`."""
    spans: list[tuple[int, int]] = []
    for number in rounds:
        first = spans.pop()[0] if spans and spans[-1][1] == number - 1 else number
        spans.append((first, number))
    texts = [f"{first}" if first == last else f"{first} to {last}" for first, last in spans]
    more = f" and {len(texts) - MOST_SPANS} more times" if len(texts) > MOST_SPANS else ""
    return f"round{'' if len(rounds) == 1 else 's'} {', '.join(texts[:MOST_SPANS])}{more}"


def _join(names: Sequence[str]) -> str:
    """Write what is said of clients, of many the first ones and how many more there are."""
    rest = len(names) - MOST_NAMES
    if rest > 0:
        return f"{', '.join(names[:MOST_NAMES])} and {rest:,} more {'client' if rest == 1 else 'clients'}"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
