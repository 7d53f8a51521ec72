"""A federation through `flwr run`: on Flower's simulation, on nodes of this machine, or on a deployment.

What the server's app prints comes back through Flower's log, wherever it runs; some of its lines are meant for us and
hold a round's note or the result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, final

from grpo_fed.engines.flower import warm as hearth
from grpo_fed.engines.flower.app_folder import app_folder
from grpo_fed.engines.flower.processes import POLL, SupervisedProcesses, plain
from grpo_fed.engines.flower.superlink import (
    STATE,
    Flower,
    Restarter,
    RunStatus,
    SuperLink,
    connect,
    environment,
    free_port,
    refuse_unknown,
)
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.device import resolve_device
from grpo_fed.runs import folder as journal
from grpo_fed.runs.folder import POLICIES
from grpo_fed.runs.records import RoundRecord
from grpo_fed.runs.results import RESULTS, Result
from grpo_fed.runs.serialisation import from_json
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import MissingPackageError

EngineName: TypeAlias = Literal["flower-sim", "flower"]
Watch = Callable[[RoundRecord], None]
Say = Callable[[str], None]

NOTE, RESULT = "grpo-fed note ", "grpo-fed result "
"""Begin the lines of the server's app that are meant for us."""
OWN = "grpo-fed"
"""Names the connection to a SuperLink of our own."""
CLIENTS = "clients"
"""The folder in a run's folder in which clients of this machine keep their state."""
LOGS = "flower"
"""The folder in a run's folder with what Flower's processes said."""
FOLLOW = "run"
"""Names the process that prints the run's log, and that log."""
PATIENCE = 60.0
"""Seconds that a SuperLink may be out of reach while a run is on."""


class FlowerRunError(RuntimeError):
    """A run on Flower came to a bad end; says what is known of it."""


@final
class FlowerEngine:
    """A federation that is ready to begin: to make one finds what is wrong before anything is started or written."""

    @classmethod
    def resumed(cls, folder: str | Path, engine: EngineName = "flower", superlink: str | None = None) -> Self:
        """The run that a folder holds, from its latest checkpoint on, or from its start if there is none yet."""
        scenario, _ = journal.open_unfinished(Path(folder))
        return cls(scenario, folder, engine, superlink, resume=True)

    def __init__(
        self,
        scenario: Scenario,
        out: str | Path | None = None,
        engine: EngineName = "flower",
        superlink: str | None = None,
        resume: bool = False,
    ) -> None:
        """superlink: a connection in Flower's configuration; `out` is a folder on its machine then. Without one, a
        SuperLink and a SuperNode for each client run here while it lasts.
        """
        if engine == "flower-sim" and importlib.util.find_spec("ray") is None:
            raise ValueError("engine flower-sim needs Ray: pip install 'grpo-fed[simulation]'")
        if engine == "flower-sim" and superlink is not None:
            raise ValueError(f"engine flower-sim starts a SuperLink of its own: leave out superlink {superlink}")
        if superlink is not None:
            refuse_unknown(superlink)
        self.scenario, self.engine, self.superlink, self.resume = scenario, engine, superlink, resume
        self.folder = None if out is None else Path(out).absolute()
        if self.folder is not None and superlink is None:
            journal.check_usable(self.folder)
        with (
            nullcontext() if superlink is None else suppress(MissingPackageError)
        ):  # on the clients' machines they may be
            resolve_shared_blocks(scenario)
        self.device = scenario.device if superlink is not None else str(resolve_device(scenario.device))
        self.result: Result | None = None
        """What became of it, as soon as it has ended, in whatever way, as far as that is known here."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing between runs."""

    def run(self, watch: Watch = lambda note: None, say: Say = lambda line: None) -> Result:
        """Tell `watch` of every round, `say` every other line of the log. Interrupted, the run is stopped.

        FlowerFailed says why it came to a bad end.
        """
        with tempfile.TemporaryDirectory(prefix="grpo-fed-", ignore_cleanup_errors=True) as name:
            here = Path(name)
            folder = here / "run" if self.folder is None else self.folder
            for part in ("logs", "neutral"):
                (here / part).mkdir()
            try:
                self.result = self._run(here, folder, LogListener(watch, say))
            except BaseException:
                if self.superlink is None and (folder / RESULTS).is_file():
                    document = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
                    self.result = Result.from_json(document, self.folder)
                raise
            finally:
                if folder.is_dir():
                    shutil.copytree(here / "logs", folder / LOGS, dirs_exist_ok=True)
            return self.result

    def _run(self, here: Path, folder: Path, listener: LogListener) -> Result:
        """With all processes that it takes here, which end with it."""
        config = {"scenario": self.scenario.dumps(), "out": str(folder), "resume": self.resume}
        deployed = self.superlink is not None
        home = None if deployed else here / "home"
        own = {STATE: str(folder / CLIENTS), **(hearth.worker_environment(here) if self.engine == "flower" else {})}
        known = environment(home, {} if deployed else own)
        if not deployed and not self.resume:
            shutil.rmtree(folder / CLIENTS, ignore_errors=True)
        app = app_folder(here / "app")
        with SupervisedProcesses(here / "neutral", known, here / "logs") as processes:
            upkeep = Restarter(processes, {})
            federation: Sequence[str] = ()
            if home is not None:
                upkeep = _own_superlink(processes, here, home, self.scenario, self.engine)
                federation = _resources(self.scenario) if self.engine == "flower-sim" else ()
            flower = Flower(self.superlink or OWN, known, here / "neutral")
            run = flower.start(app, config, federation)
            try:
                status = _end(flower, run, processes, upkeep, listener)
            except BaseException:
                if deployed:
                    with suppress(RuntimeError):
                        flower.stop(run)
                raise
            result = _result(status, listener, processes, self.folder)
            if not deployed:
                _fetch_policies(folder)
            return result


def _own_superlink(
    processes: SupervisedProcesses, here: Path, home: Path, scenario: Scenario, engine: EngineName
) -> Restarter:
    """Start it, with a node for each client unless they are simulated."""
    link = SuperLink(processes, here, free_port(), simulation=engine == "flower-sim")
    link.start()
    connect(home, OWN, link.address, None)
    if engine == "flower":
        for name, command in hearth.start_commands(here).items():
            processes.start(name, command)
            link.commands[name] = command
        for settings in scenario.clients:
            for client in settings.names:
                link.add_node(client)
    return Restarter(processes, link.commands)


def _resources(scenario: Scenario) -> list[str]:
    """What Flower's simulation is told of clients and of this machine: as many at a time as there are cores."""
    clients, cores = sum(settings.count for settings in scenario.clients), os.cpu_count() or 1
    told: dict[str, float] = {"num-supernodes": clients, "client-resources-num-cpus": 1, "init-args-num-cpus": cores}
    if scenario.device != "cpu":
        import torch

        told |= {"client-resources-num-gpus": torch.cuda.device_count() / cores} if torch.cuda.is_available() else {}
    return [f"{key}={value}" for key, value in told.items()]


def _result(status: RunStatus, listener: LogListener, processes: SupervisedProcesses, out: Path | None) -> Result:
    """Of a run that has ended well."""
    log = f"the last lines of its log:\n{processes.tail(FOLLOW)}"
    if status.outcome != "completed":
        said = re.sub(r"^(ServerApp|Simulation) failed with exception: ", "", status.details)
        words = said if said not in ("", "N/A") else f"the run was {status.outcome}"
        raise FlowerRunError(f"{words}\n{log}")
    if listener.result is None:
        raise FlowerRunError(f"the run completed without a result\n{log}")
    return Result.from_json(listener.result, out)


def _end(
    flower: Flower, run: str, processes: SupervisedProcesses, upkeep: Restarter, listener: LogListener
) -> RunStatus:
    """Read a run's log as it grows, start again what has ended meanwhile, until the run has."""
    while True:
        processes.log(FOLLOW).unlink(missing_ok=True)
        processes.start(FOLLOW, flower.following(run))
        lines = _lines(processes.log(FOLLOW))
        while processes.ended(FOLLOW) is None:
            listener.hear(lines)
            upkeep.look()
            time.sleep(POLL)
        listener.hear(lines)
        status = _status(flower, run, upkeep)
        if status.stage == "finished":
            return status


def _status(flower: Flower, run: str, upkeep: Restarter) -> RunStatus:
    """Where a run stands, of a SuperLink that may have been killed and be on its way back."""
    until = time.monotonic() + PATIENCE
    while True:
        upkeep.look()
        try:
            return flower.status(run)
        except RuntimeError:
            if time.monotonic() > until:
                raise
        time.sleep(1)


def _fetch_policies(folder: Path) -> None:
    """What the clients have learned, where they are on this machine; those of a deployment keep theirs."""
    made = sorted((folder / CLIENTS).glob(f"*/{POLICIES}"), key=lambda path: path.stat().st_mtime)
    if made:
        shutil.copytree(made[-1], folder / POLICIES, dirs_exist_ok=True)


def _lines(path: Path) -> Iterator[str | None]:
    """A growing file's whole lines; None whenever there is no other one yet."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            rest += file.read()
            *lines, rest = rest.split("\n")
            yield from lines
            yield None


# What the server's app says ------------------------------------------------------------------------------------------


def note_line(note: RoundRecord) -> str:
    """For `Listener`."""
    return NOTE + json.dumps(asdict(note))


def result_line(result: Result) -> str:
    """For `Listener`."""
    return RESULT + json.dumps(result.to_json())


@final
class LogListener:
    """Sorts the lines of a run's log. The log may come again from its beginning: a round is told of once."""

    def __init__(self, watch: Watch, say: Say) -> None:
        self.watch, self.say = watch, say
        self.result: dict[str, Any] | None = None
        self._round = -1

    def hear(self, lines: Iterator[str | None]) -> None:
        """All that there is now."""
        while (line := next(lines)) is not None:
            if line.startswith(NOTE):
                note = from_json(RoundRecord, json.loads(line.removeprefix(NOTE)))
                if note.round > self._round:
                    self._round = note.round
                    self.watch(note)
            elif line.startswith(RESULT):
                self.result = json.loads(line.removeprefix(RESULT))
            else:
                self.say(plain(line))
