"""Starts the processes that send records to MLflow as forks of one that has imported it, which takes five seconds.

What they do is the same as that of a process that was started as a command.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from grpo_fed.runs.tracking import writer
from grpo_fed.runs.tracking.spool import Spool
from grpo_fed.runs.tracking.store import Store
from grpo_fed.runs.tracking.tracker import make_writer_environment


class ForkedWriter:
    """Has what the tracker uses of a `subprocess.Popen`."""

    def __init__(self, spool: Spool, store: Store, samples: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["grpo_fed.runs.tracking.mlflow_runs"])
        reader, self.stdin = context.Pipe(duplex=False)
        place, environment = (str(spool.folder.parent), store.uri), make_writer_environment(store)
        arguments = (reader, str(spool.log), str(Path.cwd()), environment, *place, samples)
        self._process = context.Process(target=send_records, args=arguments, daemon=True)
        self._process.start()
        reader.close()

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code."""
        return self._process.exitcode

    def kill(self) -> None:
        """Kill it with -9."""
        self._process.kill()

    def wait(self) -> int | None:
        """Wait until it has ended, and return its exit code."""
        self._process.join()
        return self._process.exitcode


def send_records(
    stdin: Connection,
    log: str,
    working_folder: str,
    environment: Mapping[str, str],
    folder: str,
    store: str,
    samples: bool,
) -> None:
    """Do in a fork what the writer does as a command."""
    os.setsid()
    os.dup2(stdin.fileno(), 0)
    stdin.close()
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    os.chdir(working_folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stderr = open(0, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    writer.run_process(Path(folder), store, samples)
