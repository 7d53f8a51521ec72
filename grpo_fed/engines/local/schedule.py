"""Which clients of the local engine are asked together."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import final

from grpo_fed.engines.workers.pool import Job
from grpo_fed.rl.stacked_learner import CHUNK

Names = tuple[str, ...]


def make_chunks(fleets: Iterable[Sequence[str]], workers: int, most: int = CHUNK) -> list[Names]:
    """Clients in chunks of at most `most`, so many and as equal as it takes to keep all workers busy to the end."""
    fleets = [sorted(names) for names in fleets]  # as a server asks them, so that few answers wait for others
    everybody, hands = sum(map(len, fleets)), max(1, workers)
    turns = -(-everybody // (most * hands))
    size = -(-everybody // (turns * hands))
    chunks: list[Names] = []
    for names in fleets:
        count = -(-len(names) // size)
        ends = [len(names) * part // count for part in range(count + 1)]
        chunks += [tuple(names[begin:end]) for begin, end in pairwise(ends)]
    return chunks


@final
class ChunkSchedule:
    """Chunks, but for clients that had no answer the last time: they are asked apart, until they have answered.

    Who raised or died is alone then. Of a group that hung nobody knows who did, so it is asked in two halves, and after
    all others.
    """

    def __init__(self, chunks: Sequence[Names], apart: Iterable[Sequence[str]] = ()) -> None:
        self.chunks = tuple(chunks)
        self.set_aside: list[Names] = [tuple(names) for names in apart]
        """These groups; always the same list, so that a checkpoint has it as it is."""
        self._chunk = {name: chunk for chunk in chunks for name in chunk}

    def jobs(self, asked: Collection[str]) -> deque[Job]:
        """Who is asked with whom; all that are asked, in the order of their names' first."""
        aside = {name for names in self.set_aside for name in names}
        together: dict[Names, list[str]] = {}
        for name in asked:
            if name not in aside:
                together.setdefault(self._chunk[name], []).append(name)
        groups = [Job(chunk, tuple(names)) for chunk, names in together.items()]
        for names in self.set_aside:
            there = tuple(name for name in names if name in asked)
            if there:
                groups.append(Job(self._chunk[there[0]], there, last=True))
        return deque(groups)

    def one_by_one(self, group: Job) -> Iterator[Job]:
        """Its clients each alone, to see who it is that fails."""
        return (Job(group.chunk, (name,), last=True) for name in group.names)

    def answered(self, group: Job) -> None:
        """Its clients are back with the others."""
        left = (tuple(name for name in names if name not in group.names) for names in self.set_aside)
        self.set_aside[:] = [names for names in left if names]

    def failed(self, group: Job) -> None:
        """Its clients go apart; if it was more than one, in two halves."""
        self.answered(group)
        names, half = group.names, -(-len(group.names) // 2)
        self.set_aside += [part for part in (names[:half], names[half:]) if part]
