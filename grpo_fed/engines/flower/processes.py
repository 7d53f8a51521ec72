"""Processes that end with this one, however it ends; `guard.py` sees to that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import Signals
from typing import Self, final

from grpo_fed.engines.flower import supervisor as guard

POLL = 0.05
"""Seconds between two looks at what has become of a process."""


@final
class SupervisedProcesses:
    """Named processes of one environment and one folder."""

    def __init__(self, folder: Path, environment: Mapping[str, str], logs: Path | None = None) -> None:
        """They start in `folder`; `logs` gets a file for each name with what it says; without, it goes to stderr."""
        self.folder = folder
        self.logs = logs
        self._pids: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._errors: dict[str, str] = {}
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,  # Ctrl-C is for this process, which then tells the others
        )
        self._news = threading.Thread(target=self._listen, name="guard", daemon=True)
        self._news.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, name: str, command: Sequence[str]) -> int:
        """Its process id; a name can be started again once it has ended. OSError if it cannot be started."""
        for known in (self._pids, self._ended, self._errors):
            known.pop(name, None)
        log = None if self.logs is None else str(self.log(name))
        self._ask(name=name, start=list(command), folder=str(self.folder), log=log)
        while name not in self._pids:
            if name in self._errors:
                raise OSError(self._errors[name])
            self._refuse_dead()
            time.sleep(POLL / 10)
        return self._pids[name]

    def send(self, name: str, number: Signals) -> None:
        """A signal, to the named process alone."""
        self._ask(name=name, signal=int(number))

    def ended(self, name: str) -> int | None:
        """Its exit code, negative for the signal that ended it; None while it runs."""
        self._refuse_dead()
        return self._ended.get(name)

    def wait(self, name: str, seconds: float) -> int | None:
        """Its exit code as soon as it has ended, None if it has not after so many seconds."""
        until = time.monotonic() + seconds
        while self.ended(name) is None and time.monotonic() < until:
            time.sleep(POLL)
        return self._ended.get(name)

    def log(self, name: str) -> Path:
        """What it says, on either stream."""
        assert self.logs is not None, "with logs"
        return self.logs / f"{name}.log"

    def tail(self, name: str, lines: int = 15) -> str:
        """The last of that, where there is a log."""
        here = self.logs is not None and self.log(name).is_file()
        text = self.log(name).read_text(encoding="utf-8", errors="replace") if here else ""
        return plain("\n".join(text.splitlines()[-lines:]))

    def close(self) -> None:
        """Stop all, and whatever they started."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(3 * guard.GRACE)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        self._news.join()
        assert self._guard.stdout is not None
        self._guard.stdout.close()

    def _ask(self, **request: object) -> None:
        assert self._guard.stdin is not None
        self._refuse_dead()
        self._guard.stdin.write(json.dumps(request).encode() + b"\n")
        self._guard.stdin.flush()

    def _listen(self) -> None:
        assert self._guard.stdout is not None
        for line in self._guard.stdout:
            news = json.loads(line)
            for key, known in (("pid", self._pids), ("ended", self._ended), ("error", self._errors)):
                if key in news:
                    known[news["name"]] = news[key]

    def _refuse_dead(self) -> None:
        if self._guard.poll() is not None:
            raise RuntimeError(f"the process that starts others ended, with {self._guard.returncode}")


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
