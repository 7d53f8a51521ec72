"""What workers print, as far as a limit allows: an environment that prints for ever does not fill a disk.

A worker writes to a pipe, and a thread of the process that uses it copies that to stderr. So the last words of a worker
that is killed are not lost. This module imports the standard library alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import final

MOST_BYTES = 1 << 16
"""Bytes that a worker may print at once."""
BYTES_PER_SECOND = 256.0
"""Bytes that it may print in a second on the average after that: 22 MB in a day."""
BLOCK = 1 << 16
"""Bytes that are read at a time."""
LAST_WORDS_SECONDS = 0.5
"""Seconds for which the output of a worker that has ended is waited for."""
NOTE = (
    f"\n[output of a client is left out from here on: it has printed {MOST_BYTES >> 10} KiB at once; later it may print"
    f" {BYTES_PER_SECOND:.0f} bytes a second]\n"
)


@final
class PrintLimit:
    """Decides how much of what is printed is kept: a bucket of bytes that fills again with time."""

    def __init__(self, now: float) -> None:
        self._left, self._last, self._has_told = float(MOST_BYTES), now, False

    def cut(self, data: bytes, now: float) -> bytes:
        """Return the part of the data that is kept; the first time that some is not, with a note about it."""
        self._left = min(MOST_BYTES, self._left + BYTES_PER_SECOND * (now - self._last))
        self._last = now
        kept = data[: int(self._left)]
        self._left -= len(kept)
        if len(kept) == len(data) or self._has_told:
            return kept
        self._has_told = True
        return kept + NOTE.encode()


@final
class WorkerOutput:
    """Copies what a worker prints to stderr."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._copy, name="output of a worker", daemon=True)

    @contextmanager
    def end(self) -> Iterator[int]:
        """Give the end that the worker writes to, which is closed here after that."""
        try:
            yield self._writer
        finally:
            os.close(self._writer)
            self._thread.start()

    def wait(self) -> None:
        """Wait a while until all that a worker has printed that has ended is copied."""
        self._thread.join(LAST_WORDS_SECONDS)

    def _copy(self) -> None:
        limit = PrintLimit(time.monotonic())
        with os.fdopen(self._reader, "rb", buffering=0) as reader:
            while data := reader.read(BLOCK):
                kept = limit.cut(data, time.monotonic())
                with suppress(OSError):  # stderr is closed or its disk full: the worker must not wait for that
                    while kept:
                        kept = kept[os.write(2, kept) :]
