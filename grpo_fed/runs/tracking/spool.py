"""The folder `tracking/` of a run: records to be sent, how much of them has been sent, and the ids of MLflow's runs."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

from grpo_fed.runs.files import append_line, write_atomic
from grpo_fed.runs.folder import TRACKING
from grpo_fed.runs.serialisation import from_json, parse_json, read_json

SpoolKind: TypeAlias = Literal["begin", "resume", "round", "end"]
"""begin: what the run is. resume: the run goes on after a stop. round: a line of rounds.jsonl. end: the results."""


@dataclass(frozen=True)
class SpoolRecord:
    """Holds a line of the spool."""

    kind: SpoolKind
    time: int
    """When it happened, in milliseconds since 1970; MLflow gets this time, however late the record is sent."""
    content: Mapping[str, Any]
    end: int
    """The position in the file where the next record begins."""


@dataclass
class SendState:
    """Stores how much of the spool has been sent, and the ids of what was created, so that nothing is created twice."""

    store: str
    """The store that the run is sent to, as in `Store.uri`."""
    run: str | None = None
    """The run's unique name, made when it began."""
    position: int = 0
    """The position in the spool before which everything has been sent."""
    experiment: str | None = None
    """The experiment's id."""
    parent: str | None = None
    """The id of the federation's run."""
    clients: dict[str, str] = field(default_factory=dict)
    """The id of each client's run."""
    models: dict[str, str] = field(default_factory=dict)
    """The id of each client's model."""
    done: bool = False
    """Whether the run has finished and all of it has been sent."""


@final
class Spool:
    """Stores a run's records: the run appends them, the writer reads and sends them."""

    def __init__(self, folder: Path) -> None:
        """Prepare to read or write; nothing is created yet. folder: the run's folder."""
        self.folder = folder / TRACKING
        self.path = self.folder / "spool.jsonl"
        self.sent_path = self.folder / "sent.json"
        self.log = self.folder / "writer.log"

    def clear(self) -> None:
        """Remove what an older run left."""
        for path in (self.path, self.sent_path, self.log):
            path.unlink(missing_ok=True)

    def append(self, kind: SpoolKind, content: Mapping[str, Any]) -> None:
        """Add a record with the present time."""
        append_line(self.path, json.dumps({"kind": kind, "time": time.time_ns() // 1_000_000, **content}))

    def end_partial_line(self) -> None:
        """End a line that a killed process left incomplete, so that the next record has a line of its own."""
        if self.path.is_file() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            append_line(self.path, "")

    def read(self, position: int = 0, most: int = 4_000_000) -> Iterator[SpoolRecord]:
        """Yield the records from a position on, about `most` bytes of them; an incomplete last line is left out."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            end = file.seek(position)
            for line in file:
                if not line.endswith(b"\n") or end - position > most:
                    return
                end += len(line)
                if (record := _record(line, end)) is not None:
                    yield record

    @property
    def has_unsent(self) -> bool:
        """Whether any record has not been sent."""
        return self.path.is_file() and any(True for _ in self.read(self.load_state("").position))

    def load_state(self, store: str) -> SendState:
        """Read how much has been sent; a new state for `store` if the file is missing or damaged."""
        try:
            return from_json(SendState, read_json(self.sent_path))
        except (OSError, ValueError):
            return SendState(store)

    def save_state(self, state: SendState) -> None:
        """Write how much has been sent."""
        write_atomic(self.sent_path, json.dumps(asdict(state), indent=2) + "\n")

    @contextmanager
    def locked(self, patience: float) -> Iterator[None]:
        """Let one process send at a time; TimeoutError if another one still sends after `patience` seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file, hold_lock(file.fileno(), patience):
            yield


@contextmanager
def hold_lock(handle: int, patience: float) -> Iterator[None]:
    """Hold a file's lock; the system releases it however the process ends.

    TimeoutError if another process holds it for longer than `patience` seconds.
    """
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > until:
                raise TimeoutError("another process is sending") from None
            time.sleep(0.05)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)


def _record(line: bytes, end: int) -> SpoolRecord | None:
    """Read a record; None for a line that a killed process or a full disk left damaged."""
    try:
        content = parse_json(line.decode())
        return SpoolRecord(content.pop("kind"), int(content.pop("time")), content, end)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
