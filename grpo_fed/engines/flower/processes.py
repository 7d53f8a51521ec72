"""Processes that end with this one, however it ends: `supervisor.py` starts them and sees to that."""

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

from grpo_fed.engines.flower import supervisor

LAUNCHER = "grpo_fed.engines.flower.launcher"
POLL = 0.05
"""Seconds between two looks at whether a process has ended."""


@final
class SupervisedProcesses:
    """Starts named processes, with one environment and in one folder, and ends them with this process."""

    def __init__(self, folder: Path, environment: Mapping[str, str], logs: Path | None = None) -> None:
        """folder: where the processes start. logs: gets a file with each one's output; None leaves it on stderr."""
        self.folder = folder
        self.logs = logs
        self._pids: dict[str, int] = {}
        self._exit_codes: dict[str, int] = {}
        self._errors: dict[str, str] = {}
        self._launched: set[str] = set()
        """Names of programs that are forked from one that has imported what they need."""
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the others
        )
        self._listener = threading.Thread(target=self._listen, name="supervisor", daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, name: str, command: Sequence[str]) -> int:
        """Start a command under a name that no running process has, and return its process id; OSError if it fails.

        A program that was launched is launched again, as long as there is what launches it.
        """
        for reports in (self._pids, self._exit_codes, self._errors):
            reports.pop(name, None)
        place = {"folder": str(self.folder), "log": None if self.logs is None else str(self.log(name))}
        if name in self._launched:
            module, *arguments = command[command.index("-m") + 1 :]
            self._request(name=name, module=module, arguments=arguments, **place)
        else:
            self._request(name=name, start=list(command), **place)
        while name not in self._pids:
            if name in self._errors:
                raise OSError(self._errors[name])
            if name in self._launched and name in self._exit_codes and name not in self._pids:
                # what launches it has died
                self._launched.discard(name)
                return self.start(name, command)
            self._check_supervisor()
            time.sleep(POLL / 10)
        return self._pids[name]

    def launch(self, programs: Mapping[str, Sequence[str]]) -> None:
        """Start programs of ours under names, forked from one process as soon as it has imported what they need.

        programs: by name, the module of a program, as `launcher.py` lists them, and its arguments.
        """
        assert self.logs is not None, "a program that is launched writes to a log"
        command, folder = [sys.executable, "-P", "-m", LAUNCHER], str(self.folder)
        self._request(launcher=command, folder=folder, log=str(self.log("launcher")))
        for name, (module, *arguments) in programs.items():
            self._request(name=name, module=module, arguments=arguments, folder=folder, log=str(self.log(name)))
            self._launched.add(name)

    def send(self, name: str, number: Signals) -> None:
        """Send a signal to the named process alone."""
        self._request(name=name, signal=int(number))

    def pid(self, name: str) -> int | None:
        """Return a process's id; None before it is known."""
        return self._pids.get(name)

    def exit_code(self, name: str) -> int | None:
        """Return a process's exit code, negative for the signal that ended it; None while it runs."""
        self._check_supervisor()
        return self._exit_codes.get(name)

    def wait(self, name: str, seconds: float) -> int | None:
        """Wait until a process has ended, and return its exit code; None if it still runs after so many seconds."""
        until = time.monotonic() + seconds
        while self.exit_code(name) is None and time.monotonic() < until:
            time.sleep(POLL)
        return self._exit_codes.get(name)

    def log(self, name: str) -> Path:
        """Return the file with a process's output."""
        assert self.logs is not None, "only processes with logs have such a file"
        return self.logs / f"{name}.log"

    def tail(self, name: str, lines: int = 15) -> str:
        """Return the last lines of a process's output; empty without a log."""
        has_log = self.logs is not None and self.log(name).is_file()
        text = self.log(name).read_text(encoding="utf-8", errors="replace") if has_log else ""
        return remove_colours("\n".join(text.splitlines()[-lines:]))

    def close(self) -> None:
        """Stop all processes, and the processes that these have started; a second call does nothing."""
        assert self._supervisor.stdin is not None
        if self._supervisor.stdin.closed:
            return
        self._supervisor.stdin.close()
        try:
            self._supervisor.wait(3 * supervisor.GRACE)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        self._listener.join()
        assert self._supervisor.stdout is not None
        self._supervisor.stdout.close()

    def _request(self, **request: object) -> None:
        assert self._supervisor.stdin is not None
        self._check_supervisor()
        self._supervisor.stdin.write(json.dumps(request).encode() + b"\n")
        self._supervisor.stdin.flush()

    def _listen(self) -> None:
        """Note what the supervisor reports, until it ends."""
        assert self._supervisor.stdout is not None
        for line in self._supervisor.stdout:
            report = json.loads(line)
            for key, reports in (("pid", self._pids), ("exit_code", self._exit_codes), ("error", self._errors)):
                if key in report:
                    reports[report["name"]] = report[key]

    def _check_supervisor(self) -> None:
        if self._supervisor.poll() is not None:
            raise RuntimeError(f"the supervisor of Flower's processes ended, with {self._supervisor.returncode}")


def remove_colours(text: str) -> str:
    """Remove a terminal's colour codes from a text."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
