"""The folder `tracking/` of a run: what is to be sent, what has been, and the names that it goes by."""

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

FOLDER = "tracking"
LOG = "writer.log"

SpoolKind: TypeAlias = Literal["begin", "resume", "round", "end"]
"""begin: what the run is. resume: it goes on after a stop. round: a line of rounds.jsonl. end: the results."""


@dataclass(frozen=True)
class SpoolRecord:
    """A line of the spool."""

    kind: SpoolKind
    time: int
    """Milliseconds since 1970: when it happened, which is when it is said to have happened whenever it is sent."""
    content: Mapping[str, Any]
    end: int
    """Place in the file where the next one begins."""


@dataclass
class SendState:
    """How far sending has come, and what it made: kept beside the spool, so that nothing is made twice."""

    store: str
    """As `Store.uri`."""
    run: str | None = None
    """Which run this is about: a name of its own, drawn when it began."""
    position: int = 0
    """In the spool: all before it has been sent."""
    experiment: str | None = None
    parent: str | None = None
    """Run id of the federation."""
    clients: dict[str, str] = field(default_factory=dict)
    """Run ids by client."""
    models: dict[str, str] = field(default_factory=dict)
    """Model ids by client."""
    done: bool = False
    """The run has ended, and nothing waits."""


@final
class Spool:
    """A run's records, appended by the run, read by the writer."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the run's."""
        self.folder = folder / FOLDER
        self.path = self.folder / "spool.jsonl"
        self.sent_path = self.folder / "sent.json"
        self.log = self.folder / LOG

    def clear(self) -> None:
        """Forget an older run."""
        for old in (self.path, self.sent_path, self.log):
            old.unlink(missing_ok=True)

    def append(self, kind: SpoolKind, content: Mapping[str, Any]) -> None:
        """Add a record, stamped now."""
        append_line(self.path, json.dumps({"kind": kind, "time": time.time_ns() // 1_000_000, **content}))

    def mend(self) -> None:
        """A kill may have left half a line: what follows it begins a line of its own."""
        if self.path.is_file() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            append_line(self.path, "")

    def read(self, position: int = 0, most: int = 4_000_000) -> Iterator[SpoolRecord]:
        """Whole lines from a position on, about `most` bytes of them; half a line is not there."""
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
    def waits(self) -> bool:
        """Whether there is anything that was not sent."""
        return self.path.is_file() and any(True for _ in self.read(self.load_state("").position))

    def load_state(self, store: str) -> SendState:
        """How far it has come; the beginning, for `store`, where nothing is known."""
        try:
            return SendState(**json.loads(self.sent_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return SendState(store)

    def save_state(self, sent: SendState) -> None:
        """Remember it."""
        write_atomic(self.sent_path, json.dumps(asdict(sent), indent=2) + "\n")

    @contextmanager
    def locked(self, patience: float) -> Iterator[None]:
        """One writer at a time; TimeoutError if another does not end in so many seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file, exclusively(file.fileno(), patience):
            yield


@contextmanager
def exclusively(handle: int, patience: float) -> Iterator[None]:
    """Hold a file's lock; the system lets go of it however the process ends."""
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
    """None for what a kill or a full disk left of one."""
    try:
        content = json.loads(line)
        return SpoolRecord(content.pop("kind"), int(content.pop("time")), content, end)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
