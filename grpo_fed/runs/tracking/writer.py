"""The process that sends a run's spool to MLflow; `python -m grpo_fed.runs.tracking.writer RUN STORE [--sample]` by
the tracker.

It runs as long as its standard input is open, then until all records are sent. Records that the store does not take
now are sent again later. Those that it will never take, such as those of a deleted run, are left out with a line in the
log, so that the others can be sent.
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
from typing import TYPE_CHECKING, NoReturn, TextIO, final

from grpo_fed.runs.tracking.machine import MachineSampler
from grpo_fed.runs.tracking.spool import Spool, SpoolRecord
from grpo_fed.runs.tracking.store import HIDDEN, find_secrets
from grpo_fed.runs.tracking.tracker import GRACE, SAMPLE
from grpo_fed.scenario.importing import import_from_working_folder

if TYPE_CHECKING:
    from grpo_fed.runs.tracking.mlflow_runs import MlflowRuns

SHORTEST, LONGEST = 0.5, 10.0
"""Seconds between two attempts to send."""
PAUSE_FACTOR = 5
"""While the run goes on, the writer pauses this many times as long as it took to send."""
LOCK_PATIENCE = 3 * GRACE
"""Seconds after which an older writer of the same run has ended, even if its store does not answer."""


def main(folder: Path, store: str, samples: bool = False) -> int:
    """Send the spool of a run's folder; return the exit code, 0 if all records were sent.

    store: as `Store.uri`. samples: whether to send how busy the machine is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)  # training comes first
    import_from_working_folder()
    spool = Spool(folder)
    try:
        with spool.locked(LOCK_PATIENCE):
            return Writer(spool, store, MachineSampler() if samples else None).run()
    except TimeoutError as error:
        _log(f"{folder}: {error}")
        return 1


@final
class Writer:
    """Reads the spool, sends its records, and stores how far it has come."""

    def __init__(self, spool: Spool, store: str, sampler: MachineSampler | None = None) -> None:
        """Prepare to send; mlflow is imported with the first record. store: as `Store.uri`."""
        self.sampler = sampler
        self.spool = spool
        self.store = store
        self.runs: MlflowRuns | None = None
        self.is_run_alive = True
        """Whether the run still holds our standard input open."""

    def run(self) -> int:
        """Send until the run has ended and all records are sent, or no more can be; return the exit code, 0 for all."""
        pause, failing_since = SHORTEST, time.monotonic()
        while True:
            began = time.monotonic()
            try:
                has_more = self._send()
                failing_since = time.monotonic()
                pause = min(LONGEST, max(SHORTEST, PAUSE_FACTOR * (failing_since - began)))
            except Exception as error:  # noqa: BLE001, whatever a store does, the records stay in the spool
                _log(f"{type(error).__name__}: {error}")
                has_more = True
                pause = min(LONGEST, 2 * pause)
            now = time.monotonic()
            if self.is_run_alive:
                self._wait_for_run(pause)
                failing_since = time.monotonic()
            elif not has_more:
                return 0
            elif now - failing_since > GRACE:
                return 1
            elif now - failing_since > 0.1:
                time.sleep(SHORTEST)

    def _send(self) -> bool:
        """Send the records that are in the spool; return whether there may be more."""
        runs = self._connected()
        records = list(self.spool.read(runs.sent.position))
        for batch in _batches(records):
            runs.send(batch)
            runs.sent.position = batch[-1].end
            self.spool.save_state(runs.sent)
        self._send_samples(runs)
        if not records and not self.is_run_alive:
            runs.close()
        return bool(records)

    def _send_samples(self, runs: MlflowRuns) -> None:
        """Send how busy the machine was, once the run is there; the last sample is taken when the run has ended."""
        if self.sampler is None or runs.sent.parent is None:
            return
        if not self.is_run_alive:
            self.sampler.stop()
        if samples := self.sampler.waiting():
            runs.send_machine(samples)
            self.sampler.drop(samples)

    def _connected(self) -> MlflowRuns:
        """Connect to the store, with the import of mlflow, which takes seconds."""
        if self.runs is None:
            from grpo_fed.runs.tracking.mlflow_runs import MlflowRuns

            self.runs = MlflowRuns(self.spool, self.store)
        return self.runs

    def _wait_for_run(self, seconds: float) -> None:
        """Wait so many seconds, or until the run closes our input or is gone."""
        readable, _, _ = select.select([sys.stdin], [], [], seconds)
        if readable and not os.read(sys.stdin.fileno(), 1):
            self.is_run_alive = False


def _batches(records: Sequence[SpoolRecord]) -> Iterator[list[SpoolRecord]]:
    """Yield neighbouring rounds together, every other record alone."""
    batch: list[SpoolRecord] = []
    for record in records:
        if batch and not (record.kind == batch[-1].kind == "round"):
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch


@final
class RedactedStream(io.TextIOBase):
    """Writes text to a stream with the secrets in it replaced by stars."""

    def __init__(self, stream: TextIO, secrets: Sequence[str]) -> None:
        """Prepare to write to `stream`. secrets: longest first, since one may be a part of another."""
        self.stream, self.secrets = stream, secrets

    def write(self, text: str) -> int:
        """Write text without the secrets, at once."""
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        self.stream.write(text)
        self.stream.flush()
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()


def _log(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(text.split()), file=sys.stderr)


def run_process(folder: Path, store: str, samples: bool) -> NoReturn:
    """Send in a process that has nothing else to do, and end it; what it prints is without secrets. As for `main`."""
    sys.stderr = RedactedStream(sys.stderr, find_secrets(os.environ))
    code = 1
    with contextlib.suppress(BrokenPipeError):
        try:
            code = main(folder, store, samples)
        except Exception:  # noqa: BLE001, so that the traceback goes through the stream above too
            traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # without waiting for mlflow's own threads


if __name__ == "__main__":
    run_process(Path(sys.argv[1]), sys.argv[2], SAMPLE in sys.argv[3:])
