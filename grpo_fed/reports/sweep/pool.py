"""Several processes that train runs side by side."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Self, final

from grpo_fed.reports.sweep.points import SweptRun
from grpo_fed.reports.sweep.worker import TAKEN
from grpo_fed.runs.tracking.groups import RunGroup

PATIENCE = 60.0
"""Seconds that a process has to save its run when the sweep is interrupted."""
PAUSE = 0.5
"""Seconds between two looks at a run that another process is writing."""
Decide = Callable[[int, float | None], str]
"""Decides after a round, by its number and its score, whether a run goes on: `go`, or the reason to stop it."""


@final
class WorkerProcess:
    """A process that trains one run at a time, and is started again if it has died."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def train(self, run: SweptRun, track: str | None, group: RunGroup | None, decide: Decide | None = None) -> SweptRun:
        """Train a run, or go on with it; return it with how it ended, with the status `taken` if another process is
        writing it.

        decide: is asked after each round; None lets the run go on.
        """
        process = self._started()
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018, both are pipes
        job = {
            "scenario": run.scenario.dumps(),
            "folder": str(run.folder),
            "track": track,
            "group": None if group is None else asdict(group),
            "prune": decide is not None,
        }
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                message = json.loads(line)
                if "ended" in message:
                    if message["status"] == TAKEN:
                        return replace(run, status=TAKEN)
                    ended = run.read()
                    problem = message.get("problem", "") or ended.problem
                    return replace(ended, status=message["status"], problem=problem)
                if decide is not None:
                    process.stdin.write(decide(message["round"], message["score"]) + "\n")
                    process.stdin.flush()
        except OSError:
            pass
        code = process.wait()
        return replace(run, status="failed", problem=f"its process ended with code {code}; {self._log} may say why")

    def _started(self) -> subprocess.Popen[str]:
        """Return the process, a new one if there is none."""
        if self._process is None or self._process.poll() is not None:
            path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "grpo_fed.reports.sweep.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, "PYTHONPATH": path},
                )
        return self._process

    def stop(self) -> None:
        """Let the process save its run and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def close(self) -> None:
        """Wait until the process has ended."""
        if self._process is None:
            return
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@final
class RunPool:
    """Trains runs, as many side by side as there are processes."""

    def __init__(self, processes: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.workers = [WorkerProcess(log) for _ in range(processes)]
        self.is_stopping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_stopping = True
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.close()

    def work(self, task: Callable[[WorkerProcess], bool]) -> None:
        """Call `task` with each process in a thread of its own, again and again until it returns False.

        An exception in one of them, or Ctrl-C, is raised once all have ended what they do.
        """
        errors: queue.Queue[BaseException] = queue.Queue()

        def loop(worker: WorkerProcess) -> None:
            try:
                while not self.is_stopping and task(worker):
                    pass
            except BaseException as error:  # noqa: BLE001, raised below in the main thread
                errors.put(error)
                self.is_stopping = True

        threads = [threading.Thread(target=loop, args=(worker,)) for worker in self.workers]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.05)
        except KeyboardInterrupt:
            self.is_stopping = True
            for worker in self.workers:
                worker.stop()
            for thread in threads:
                thread.join()
            raise
        if not errors.empty():
            raise errors.get()

    def train_all(
        self,
        runs: Sequence[SweptRun],
        track: str | None,
        group_of: Callable[[SweptRun], RunGroup | None],
        watch: Callable[[SweptRun], None],
    ) -> list[SweptRun]:
        """Train the runs that have not ended; return all of them, in their order, with how they ended.

        Runs that another process is writing are waited for. watch: is called with every run when it has ended.
        """
        ended: dict[Path, SweptRun] = {}
        waiting: queue.Queue[SweptRun] = queue.Queue()
        lock = threading.Lock()
        for run in runs:
            waiting.put(run)

        def task(worker: WorkerProcess) -> bool:
            with lock:
                if len(ended) == len(runs):
                    return False
            try:
                run = waiting.get(timeout=PAUSE)
            except queue.Empty:
                return True  # another thread may put its run back
            found = run.read()
            if not found.has_ended:
                found = worker.train(run, track, group_of(run))
            if found.status == TAKEN:
                time.sleep(PAUSE)
                waiting.put(run)
                return True
            with lock:
                ended[run.folder] = found
                if not self.is_stopping:
                    watch(found)
            return True

        self.work(task)
        return [ended[run.folder] for run in runs]


def count_processes(workers: int | None, runs: int) -> int:
    """Count the processes of a sweep: one for each core, and not more than there are runs."""
    if workers is not None:
        return min(workers, runs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, runs))
