"""The process that sends a run's spool to MLflow; `python -m grpo_fed.runs.tracking.writer RUN STORE` by the tracker.

It lives as long as its input is open, then until all is sent. What a store does not take now it gets later; what it
will never take (a run that somebody deleted) is told in the log and left out, so that nothing else waits for it.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, final

from grpo_fed.runs.tracking.spool import Spool, SpoolRecord
from grpo_fed.runs.tracking.store import HIDDEN, secrets_in
from grpo_fed.runs.tracking.tracker import GRACE

if TYPE_CHECKING:
    from grpo_fed.runs.tracking.mlflow_runs import MlflowRuns

SHORTEST, LONGEST = 0.5, 10.0
"""Seconds between two times of sending."""
SHARE = 5
"""Of its time the writer spends at most one part in so many on sending, while the run goes on."""
OTHER = 3 * GRACE
"""Seconds in which an older writer of the same run, whose store does not answer, has ended."""


def main(folder: Path, store: str) -> int:
    """0 if all was sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)  # training comes first
    spool = Spool(folder)
    try:
        with spool.locked(OTHER):
            return Writer(spool, store).run()
    except TimeoutError as error:
        _say(f"{folder}: {error}")
        return 1


@final
class Writer:
    """Reads the spool, sends, remembers how far it has come."""

    def __init__(self, spool: Spool, store: str) -> None:
        self.spool = spool
        self.store = store
        self.runs: MlflowRuns | None = None
        self.open = True
        """Whether the run is still there."""

    def run(self) -> int:
        """Until there is no more to come and nothing waits, or nothing can be sent; 0 if all was."""
        wait, since = SHORTEST, time.monotonic()
        while True:
            began = time.monotonic()
            try:
                rest = self._send()
                since = time.monotonic()
                wait = min(LONGEST, max(SHORTEST, SHARE * (since - began)))
            except Exception as error:  # noqa: BLE001, whatever a store does, the spool keeps what it should have got
                _say(f"{type(error).__name__}: {error}")
                rest = True
                wait = min(LONGEST, 2 * wait)
            now = time.monotonic()
            if self.open:
                self._listen(wait)
                since = time.monotonic()
            elif not rest:
                return 0
            elif now - since > GRACE:
                return 1
            elif now - since > 0.1:
                time.sleep(SHORTEST)

    def _send(self) -> bool:
        """What there is; whether there may be more."""
        runs = self._connected()
        records = list(self.spool.read(runs.sent.position))
        for part in _parts(records):
            runs.send(part)
            runs.sent.position = part[-1].end
            self.spool.save_state(runs.sent)
        if not records and not self.open:
            runs.close()
        return bool(records)

    def _connected(self) -> MlflowRuns:
        """With the import of mlflow, which takes seconds."""
        if self.runs is None:
            from grpo_fed.runs.tracking.mlflow_runs import MlflowRuns

            self.runs = MlflowRuns(self.spool, self.store)
        return self.runs

    def _listen(self, seconds: float) -> None:
        """Wait, at most until the run closes our input or is gone."""
        readable, _, _ = select.select([sys.stdin], [], [], seconds)
        if readable and not os.read(sys.stdin.fileno(), 1):
            self.open = False


def _parts(records: Sequence[SpoolRecord]) -> Iterator[list[SpoolRecord]]:
    """Neighbouring rounds together, everything else alone."""
    part: list[SpoolRecord] = []
    for record in records:
        if part and not (record.kind == part[-1].kind == "round"):
            yield part
            part = []
        part.append(record)
    if part:
        yield part


@final
class RedactedStream(io.TextIOBase):
    """A stream that shows no secrets, whoever writes to it."""

    def __init__(self, stream: TextIO, secrets: Sequence[str]) -> None:
        self.stream, self.secrets = stream, secrets

    def write(self, text: str) -> int:
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        self.stream.write(text)
        self.stream.flush()
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def _say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(text.split()), file=sys.stderr)


if __name__ == "__main__":
    sys.stderr = RedactedStream(sys.stderr, secrets_in(os.environ))
    code = 1
    with contextlib.suppress(BrokenPipeError):
        try:
            code = main(Path(sys.argv[1]), sys.argv[2])
        except Exception:  # noqa: BLE001, so that even this goes through the stream above
            traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # mlflow's own threads are not waited for
