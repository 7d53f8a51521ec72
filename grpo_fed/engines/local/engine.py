"""The local engine: a whole federation on this machine, through the same messages as on many.

`LocalGrid` is Flower's grid without Flower's processes. Clients whose policies have the same shapes answer together, in
chunks, and the chunks are spread over worker processes; what each client remembers lies in a `Home`. A client that
raises, dies or hangs has no answer, the others have theirs, and the next time it is asked again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, final

from grpo_fed.engines.local.grid import LocalGrid
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.messages import Start
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.state_store import StateStore
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.device import resolve_device
from grpo_fed.runs import folder as journal
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.recorder import Watch
from grpo_fed.runs.results import Result
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.resolve import group_by_policy_shape
from grpo_fed.tasks.task import Task

CLIENTS = "clients"
"""Of a run folder: what its clients remember."""


def federate(
    scenario: Scenario,
    out: str | Path | None = None,
    watch: Watch = lambda note: None,
    workers: int | None = None,
) -> Result:
    """Train a federation; write a run folder to `out`; tell `watch` of every round, the first being 0.

    ValueError for what is wrong with the scenario, before anything is written. Whatever stops it after that,
    KeyboardInterrupt too, first finds the policies and `results.json` saved as they are. `workers` as for `LocalGrid`.
    """
    with LocalEngine(scenario, out, workers=workers) as federation:
        return federation.run(watch)


def resume(folder: str | Path, watch: Watch = lambda note: None) -> Result:
    """Go on with a federation that was stopped, from its latest checkpoint, to the very end that it would have had.

    ValueError if the folder holds no such run.
    """
    with LocalEngine.resumed(folder) as federation:
        return federation.run(watch)


@final
class LocalEngine:
    """A federation that is ready to begin: to make one finds what is wrong before anything is started or written."""

    @classmethod
    def resumed(cls, folder: str | Path) -> Self:
        """The run that a folder holds, from its latest checkpoint on, or from its start if there is none yet."""
        folder = Path(folder)
        scenario, after = journal.open_unfinished(folder)
        return cls(scenario, folder, after, begun=journal.read_engine_state(folder))

    def __init__(
        self,
        scenario: Scenario,
        out: str | Path | None = None,
        after: Checkpoint | None = None,
        workers: int | None = None,
        begun: Mapping[str, Any] | None = None,
    ) -> None:
        """A new run, or one that goes on `after` a checkpoint, with the workers that it had or was `begun` with."""
        self.scenario, self.after = scenario, after
        self.folder = None if out is None else Path(out)
        self.device = str(resolve_device(scenario.device))
        if self.folder is not None:
            journal.check_usable(self.folder)
        noted: Mapping[str, Any] = (begun or {}) if after is None else after.parts.get("engine", {})
        if after is not None and after.shared is not None and "workers" not in noted:
            raise ValueError(f"{after.folder}: was not written by the local engine, and has not what its clients need")
        self.shared_blocks = resolve_shared_blocks(scenario)
        with ExitStack() as stack:
            if self.folder is None:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-fed-")))
            else:
                place = self.folder / CLIENTS
            self.state_store = StateStore(place, durable=False)
            grid = LocalGrid(
                scenario, self.shared_blocks, self.state_store, noted.get("workers", workers), noted.get("apart", ())
            )
            self.grid = stack.enter_context(grid)
            self.federation = Federation(
                scenario,
                self.shared_blocks,
                GridTransport(grid, self.shared_blocks, scenario, grid.nodes),
                self.folder,
                after,
                client_files=self._files,
                before_results=self._save_policies,
                engine={"workers": grid.workers, "apart": grid.schedule.set_aside},
                device=self.device,
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def result(self) -> Result | None:
        """What became of it, as soon as it has ended, in whatever way."""
        return self.federation.result

    def run(self, watch: Watch = lambda note: None) -> Result:
        """All rounds, or those that are left."""
        shutil.rmtree(self.state_store.folder, ignore_errors=True)
        if self.after is not None:
            for client, file in self.after.files.items():
                self.state_store.restore(self._run, client, file, self.after.original_names[client])
        return self.federation.run(watch)

    @property
    def _run(self) -> str:
        """What the clients call it."""
        return self.federation.state.name

    def _files(self, number: int) -> dict[str, Path]:
        """Where what each client remembers is, on the disk."""
        latest = {name: self.state_store.latest(self._run, name) for name in self.shared_blocks.clients}
        files = {
            name: self.state_store.path(self._run, name, last) for name, last in latest.items() if last is not None
        }
        for file in files.values():
            _flush(file)
        return files

    def _save_policies(self, starts: Mapping[str, Start]) -> None:
        """Those that clients play with, a few at a time."""
        if self.folder is None:
            return
        tasks: dict[str, Task] = {task.client: task for fleet in group_by_policy_shape(self.scenario) for task in fleet}
        for chunk in self.grid.schedule.chunks:
            members = Clients(self.scenario, self.shared_blocks, [tasks[name] for name in chunk], self.state_store)
            members.save_policies(self.folder, starts)


def _flush(file: Path) -> None:
    """To the disk, for a checkpoint must outlive the machine, and clients write without waiting for that."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
