"""Which clients of the local engine are trained together, and in which order."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias, final

from grpo_fed.engines.workers.pool import Job
from grpo_fed.rl.stacked_learner import CHUNK

Names: TypeAlias = tuple[str, ...]
"""Names of clients."""


def make_chunks(groups: Iterable[Sequence[str]], workers: int, max_size: int = CHUNK) -> list[Names]:
    """Cut clients into chunks that keep all workers busy to the end: as few as that takes, and of nearly equal sizes.

    groups: the names of clients whose policies have the same shapes; a chunk never spans two groups.
    max_size: the most clients in a chunk.
    """
    # In the order in which the server's messages come, so that few answers wait for others.
    groups = [sorted(names) for names in groups]
    clients, workers = sum(map(len, groups)), max(1, workers)
    chunks_per_worker = -(-clients // (max_size * workers))
    size = -(-clients // (chunks_per_worker * workers))
    chunks: list[Names] = []
    for names in groups:
        count = -(-len(names) // size)
        ends = [len(names) * part // count for part in range(count + 1)]
        chunks += [tuple(names[begin:end]) for begin, end in pairwise(ends)]
    return chunks


@final
class ChunkSchedule:
    """Asks the clients of a chunk together, and sets aside those that failed until they have answered again.

    A client that raises or whose process dies is set aside alone. If several clients were asked together and hang, it
    is not known which of them hangs: they are set aside in two halves, and each half is halved again if it hangs too.
    """

    def __init__(self, chunks: Sequence[Names], workers: int = 0, set_aside: Iterable[Sequence[str]] = ()) -> None:
        """Make a schedule.

        workers: the number of worker processes that the chunks were cut for; 0 if there are none.
        set_aside: the clients that were set aside when an earlier schedule was saved.
        """
        self.chunks = tuple(chunks)
        self.workers = workers
        self.set_aside: list[Names] = [tuple(names) for names in set_aside]
        """Clients that are asked apart from their chunks, those of an entry together. Always the same list object."""
        self._chunk_of = {name: chunk for chunk in chunks for name in chunk}

    @property
    def state(self) -> Mapping[str, Any]:
        """The JSON with which a resumed run asks the same clients together; it follows later changes of `set_aside`."""
        return {"workers": self.workers, "set_aside": self.set_aside}

    def jobs(self, names: Collection[str]) -> deque[Job]:
        """Put clients into jobs: by chunk, in the order of `names`, then those that are set aside."""
        set_aside = {name for entry in self.set_aside for name in entry}
        by_chunk: dict[Names, list[str]] = {}
        for name in names:
            if name not in set_aside:
                by_chunk.setdefault(self._chunk_of[name], []).append(name)
        jobs = [Job(chunk, tuple(together)) for chunk, together in by_chunk.items()]
        for entry in self.set_aside:
            together = tuple(name for name in entry if name in names)
            if together:
                jobs.append(Job(self._chunk_of[together[0]], together, last=True))
        return deque(jobs)

    def one_by_one(self, job: Job) -> Iterator[Job]:
        """Split a failed job into one for each client, to find out which client fails."""
        return (Job(job.chunk, (name,), last=True) for name in job.names)

    def answered(self, job: Job) -> None:
        """Let the clients of a job rejoin their chunks."""
        rest = (tuple(name for name in names if name not in job.names) for names in self.set_aside)
        self.set_aside[:] = [names for names in rest if names]

    def failed(self, job: Job) -> None:
        """Set the clients of a job aside, in two halves if there are several."""
        self.answered(job)
        half = -(-len(job.names) // 2)
        self.set_aside += [part for part in (job.names[:half], job.names[half:]) if part]
