"""The local engine: a whole federation on this machine, over the same checked messages as on many machines.

`LocalGrid` carries the messages: it is a Flower grid without Flower's processes. Clients whose policies have the same
shapes are trained together, in chunks, and the chunks are spread over worker processes. The state of each client is
saved in a `StateStore`. If a client raises, dies or hangs, the round goes on with the answers of the others, and the
client is asked again in the next round.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from grpo_fed.engines.local.grid import make_local_grid
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.arrivals import Arrivals, VirtualTime
from grpo_fed.federation.clients import Clients
from grpo_fed.federation.hostile import ColludingTransport, colluding_clients
from grpo_fed.federation.messages import Start
from grpo_fed.federation.rounds import Federation
from grpo_fed.federation.setup import FederationSetup
from grpo_fed.federation.state_store import StateStore
from grpo_fed.federation.transport import Transport
from grpo_fed.rl.device import resolve_device
from grpo_fed.runs.checkpoint import Checkpoint
from grpo_fed.runs.folder import CLIENTS, check_usable, claim_folder, open_unfinished, read_engine_state, reclaim_folder
from grpo_fed.runs.recorder import Watch
from grpo_fed.runs.results import Result
from grpo_fed.runs.serialisation import from_json
from grpo_fed.scenario.importing import describe_exception
from grpo_fed.scenario.scenario import Scenario


@dataclass(frozen=True)
class SavedSchedule:
    """Holds what a resumed run needs to ask the same clients together."""

    workers: int | None
    set_aside: list[list[str]]


@final
class LocalEngine:
    """Runs a federation on this machine.

    Making an engine checks the scenario and the folder; only `run` starts processes and writes the run's folder.
    """

    @classmethod
    def resumed(cls, folder: str | Path, callbacks: Sequence[object] = ()) -> Self:
        """Make an engine for the unfinished run in a folder, from its latest checkpoint or, without one, its start.

        callbacks: those that the run was started with, beside those of its scenario. Raises ValueError if the folder
        holds no such run.
        """
        folder = Path(folder)
        scenario, checkpoint = open_unfinished(folder)
        saved = read_engine_state(folder)
        return cls(scenario, folder, checkpoint, engine_state=saved, goes_on=True, callbacks=callbacks)

    def __init__(
        self,
        scenario: Scenario,
        out: str | Path | None = None,
        checkpoint: Checkpoint | None = None,
        workers: int | None = None,
        engine_state: Mapping[str, Any] | None = None,
        replace: bool = False,
        goes_on: bool = False,
        arrivals: Callable[[Transport], Arrivals] | None = None,
        alone: bool = False,
        callbacks: Sequence[object] = (),
    ) -> None:
        """Make an engine for a new run, or for one that continues from a checkpoint.

        out: the run's folder; without one nothing is left behind.
        workers: the number of worker processes, as for `make_local_grid`; ignored where a resumed run saved its own.
        engine_state: what the run saved of its schedule when it began, for a run without a checkpoint.
        replace: whether a run that `out` holds may be removed.
        goes_on: whether `out` holds this very run.
        arrivals: makes the order in which answers come with `round.mode = "buffered"`; by default in virtual time.
        alone: whether each client is computed by itself, with the bits that it has in a deployment.
        callbacks: objects beside those that the scenario names.
        Raises ValueError for what is wrong with the scenario, the folder or the checkpoint.
        """
        self.scenario, self.checkpoint = scenario, checkpoint
        self.folder = None if out is None else Path(out)
        self.device = str(resolve_device(scenario.device))
        if self.folder is not None:
            check_usable(self.folder)
        saved: Mapping[str, Any] = engine_state or {}
        if checkpoint is not None and checkpoint.shared is not None:
            saved = checkpoint.part("engine", dict[str, Any])
        if checkpoint is not None and checkpoint.shared is not None:
            if "workers" not in saved or {*checkpoint.files} - {*checkpoint.original_names}:
                raise ValueError(
                    f"{checkpoint.folder}: was not written by the local engine, and lacks the state of the clients"
                )
            names = {name for settings in scenario.clients for name in settings.names}
            if unknown := {*checkpoint.files} - names:
                raise ValueError(f"{checkpoint.folder}: has a client {min(unknown)}, which the scenario has not")
        self.setup = FederationSetup.of(scenario)
        """The tasks and shared blocks, resolved once for the server, the clients in this process and their policies."""
        with ExitStack() as stack:
            if self.folder is None:
                states = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-fed-")))
            else:
                states = self.folder / CLIENTS
            self.state_store = StateStore(states, durable=False)
            workers, set_aside = _read_schedule(saved, workers, self.setup.clients)
            grid = make_local_grid(self.setup, self.state_store, workers, set_aside, 1 if alone else None)
            self.schedule = stack.enter_context(grid).schedule
            """Which clients are asked together, and for how many workers they were put into chunks."""
            shared_blocks = self.setup.shared_blocks
            transport: Transport = GridTransport(grid, shared_blocks, scenario, grid.nodes)
            if colluding_clients(scenario):
                transport = ColludingTransport(transport, scenario, shared_blocks)
            self.federation = Federation(
                scenario,
                shared_blocks,
                transport,
                self.folder,
                checkpoint,
                client_files=self._client_files,
                before_results=lambda starts: {} if self.folder is None else self._save_policies(starts, self.folder),
                engine=self.schedule.state,
                device=self.device,
                arrivals=arrivals(transport) if arrivals else VirtualTime(transport, scenario.round.deadline),
                callbacks=callbacks,
                save_policies=lambda folder: self._save_policies(self.federation.starts, folder),
            )
            self._claim: AbstractContextManager[object] = nullcontext()
            if self.folder is not None:
                self._claim = reclaim_folder(self.folder) if goes_on else claim_folder(self.folder, replace)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._claim:  # released last
            self._stack.close()

    @property
    def result(self) -> Result | None:
        """The run's result, as soon as it has ended, in whatever way."""
        return self.federation.result

    def run(self, watch: Watch = lambda record: None) -> Result:
        """Run all rounds, or those that are left; `watch` gets the record of each round, the first being 0."""
        shutil.rmtree(self.state_store.folder, ignore_errors=True)
        if self.checkpoint is not None:
            for client, file in self.checkpoint.files.items():
                self.state_store.restore(self._run_name, client, file, self.checkpoint.original_names[client])
        return self.federation.run(watch)

    @property
    def _run_name(self) -> str:
        """The name under which the clients save their states of this run."""
        return self.federation.state.name

    def _client_files(self, round: int) -> dict[str, Path]:
        """Find the latest saved state of each client, flushed to the disk, for a checkpoint after a round."""
        rounds = {name: self.state_store.latest(self._run_name, name) for name in self.setup.clients}
        files = {
            name: self.state_store.path(self._run_name, name, last) for name, last in rounds.items() if last is not None
        }
        for file in files.values():
            _flush_to_disk(file)
        return files

    def _save_policies(self, starts: Mapping[str, Start], folder: Path) -> dict[str, str]:
        """Write the policies that clients are evaluated with to a folder, a chunk at a time to save memory.

        Return the clients whose policies could not be saved, with the reason.
        """
        problems: dict[str, str] = {}
        for chunk in self.schedule.chunks:
            tasks = [self.setup.tasks[name] for name in chunk]
            try:
                clients = Clients(self.scenario, self.setup.shared_blocks, tasks, self.state_store)
            except Exception as error:  # noqa: BLE001, a user's module may fail in any way
                problems |= dict.fromkeys(chunk, describe_exception(error))
                continue
            problems |= clients.save_policies(folder, starts, self.federation.state.round)
        return problems


def _read_schedule(
    saved: Mapping[str, Any], workers: int | None, clients: Sequence[str]
) -> tuple[int | None, Sequence[Sequence[str]]]:
    """Read the number of workers and the clients that were set aside from what a run saved; ValueError if damaged."""
    try:
        chosen = from_json(SavedSchedule, {"workers": workers, "set_aside": [], **saved})
        if unknown := {name for names in chosen.set_aside for name in names} - {*clients}:
            raise ValueError(f"set_aside names {min(unknown)}, which the scenario has not")
    except ValueError as error:
        raise ValueError(f"the schedule that the run saved is damaged: {error}") from None
    return chosen.workers, chosen.set_aside


def _flush_to_disk(file: Path) -> None:
    """Flush a file to the disk: a checkpoint must survive a power cut, and clients write without waiting for that."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
