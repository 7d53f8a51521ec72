"""A process that trains one run after another; `python -m grpo_fed.reports.sweep.worker` by the pool.

It reads a job from each line of its input and writes lines of JSON: the score of every round, and how the run ended.
If the job says so, it waits after each round for a line that says whether the run goes on. When its input or output
closes, the run is interrupted as by Ctrl-C, so that it can be resumed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from grpo_fed.reports.sweep.points import round_score
from grpo_fed.runs import checkpoint
from grpo_fed.runs.folder import FolderTakenError
from grpo_fed.runs.records import RoundRecord, record_to_line
from grpo_fed.runs.results import ENDED, Status, read_results, status_of
from grpo_fed.runs.tracking import Tracker
from grpo_fed.runs.tracking.groups import RunGroup
from grpo_fed.scenario.importing import import_from_working_folder
from grpo_fed.scenario.scenario import Scenario

TAKEN = "taken"
"""The status of a run that another process is writing."""


@dataclass
class Pruning:
    """A callback that reports each round, and stops the run if the pool says so."""

    channel: Channel

    def on_round_end(self, run: Any, record: RoundRecord) -> None:
        """Send the round's score, and wait for the answer."""
        if record.round:
            self.channel.send({"round": record.round, "score": round_score(record)})
            if (answer := self.channel.read()) != "go":
                run.stop(answer or "the sweep was stopped")


class Channel:
    """Lines from the pool and to it; closed ones interrupt the run."""

    def __init__(self, reads: TextIO, writes: TextIO) -> None:
        self.reads, self.writes = reads, writes

    def send(self, message: dict[str, Any]) -> None:
        """Write a line; KeyboardInterrupt if nobody reads it."""
        try:
            self.writes.write(json.dumps(message) + "\n")
            self.writes.flush()
        except OSError:
            raise KeyboardInterrupt from None

    def read(self) -> str:
        """Read a line; KeyboardInterrupt if there will be none."""
        if not (line := self.reads.readline()):
            raise KeyboardInterrupt
        return line.rstrip("\n")


def train_job(job: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Train the run of a job, or go on with it; return how it ended."""
    from grpo_fed.engines.local.engine import LocalEngine

    folder, scenario = Path(job["folder"]), Scenario.loads(job["scenario"])
    callbacks = [Pruning(channel)] if job["prune"] else []
    try:
        resumed = checkpoint.latest(folder) is not None
        engine = (
            LocalEngine.resumed(folder, callbacks)
            if resumed
            else LocalEngine(scenario, folder, workers=0, replace=True, callbacks=callbacks)
        )
    except FolderTakenError:
        return {"status": TAKEN}
    except ValueError:
        if (found := read_results(folder)) is not None and found["status"] in ENDED:
            return {"status": found["status"]}  # another process has ended it in between
        raise
    with engine:
        if (found := read_results(folder)) is not None and found["status"] in ENDED:
            return {"status": found["status"]}
        group = None if job["group"] is None else RunGroup(**job["group"])
        tracker = Tracker.open(job["track"], folder, scenario, resumed=resumed, models=False, group=group)

        def watch(record: RoundRecord) -> None:
            tracker.round(record_to_line(record))
            if record.round and not job["prune"]:
                channel.send({"round": record.round, "score": round_score(record)})

        error: BaseException | None = None
        try:
            engine.run(watch)
        except BaseException as raised:
            error = raised
            raise
        finally:
            result = engine.result
            status: Status = status_of(error) if result is None else result.status
            tracker.close(None if result is None else result.to_json(), status)
    return {"status": status, "note": tracker.trouble or ""}


def main() -> None:
    """Train jobs until the input ends."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: what follows saves the run
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the pool sends SIGTERM
    channel = Channel(sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # an environment may print
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import_from_working_folder()
    try:
        while True:
            job = json.loads(channel.read())
            try:
                answer = train_job(job, channel)
            except Exception as error:  # noqa: BLE001, whatever stops a run, the others are still worth having
                answer = {"status": "failed", "problem": f"{type(error).__name__}: {error}".splitlines()[0]}
            channel.send({"ended": True, **answer})
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
