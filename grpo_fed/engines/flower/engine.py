"""A federation through `flwr run`: on Flower's simulation, on nodes of this machine, or on a deployment.

For the first two this machine gets a SuperLink of its own, with a node for each client or a simulation of them, while
the run lasts. Then, as on a deployment, the server's app is started as a run of it, and its log is read until it ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Literal, Self, TypeAlias, final

from grpo_fed.engines.flower.app_folder import make_app_folder
from grpo_fed.engines.flower.flwr_command import FlwrCommand, RunStatus, check_connection, write_connection
from grpo_fed.engines.flower.log_channel import LogChannel, Say, Watch, follow_lines
from grpo_fed.engines.flower.processes import POLL, SupervisedProcesses
from grpo_fed.engines.flower.superlink import STATE, Restarter, SuperLink, find_free_port, make_flower_environment
from grpo_fed.engines.resident.host import make_host_command
from grpo_fed.federation.hostile import refuse_collusion
from grpo_fed.policy.shared import resolve_shared_blocks
from grpo_fed.rl.device import resolve_device
from grpo_fed.runs.folder import (
    CLAIMED,
    CLIENTS,
    FLOWER_LOGS,
    POLICIES,
    check_usable,
    claim_folder,
    open_unfinished,
    reclaim_folder,
)
from grpo_fed.runs.results import RESULTS, Result
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import MissingPackageError

EngineName: TypeAlias = Literal["flower-sim", "flower"]

CONNECTION = "grpo-fed"
"""The name of the connection to a SuperLink that the engine starts."""
NODES = "nodes"
"""The name of the process that serves the clients of this machine."""
RUN_LOG = "run"
"""The name of the process that prints the run's log, and of that log."""
PATIENCE = 60.0
"""Seconds for which a SuperLink may be out of reach during a run."""


class FlowerRunError(RuntimeError):
    """A run on Flower failed or was stopped; the text says why, as far as that is known."""


@final
class FlowerEngine:
    """A federation that is ready to begin: making one finds what is wrong before anything is started or written."""

    @classmethod
    def resumed(cls, folder: str | Path, engine: EngineName = "flower", superlink: str | None = None) -> Self:
        """Prepare to go on with the run in a folder, from its latest checkpoint, or from its start without one."""
        scenario, _ = open_unfinished(Path(folder))
        return cls(scenario, folder, engine, superlink, resume=True)

    def __init__(
        self,
        scenario: Scenario,
        out: str | Path | None = None,
        engine: EngineName = "flower",
        superlink: str | None = None,
        resume: bool = False,
        replace: bool = False,
    ) -> None:
        """Check the scenario and the other arguments; ValueError if they cannot work.

        out: the run's folder, for a deployment on the server's machine.
        superlink: a connection of Flower's configuration, to a deployment; None starts a SuperLink here.
        replace: whether a run that `out` holds may be removed.
        """
        if engine == "flower-sim" and importlib.util.find_spec("ray") is None:
            raise ValueError("engine flower-sim needs Ray: pip install 'grpo-fed[simulation]'")
        if engine == "flower-sim" and superlink is not None:
            raise ValueError(f"engine flower-sim starts a SuperLink of its own: leave out superlink {superlink}")
        refuse_collusion(scenario, f"the engine {engine}")
        if superlink is not None:
            check_connection(superlink)
        self.scenario, self.engine, self.superlink, self.resume = scenario, engine, superlink, resume
        self.replace = replace
        self.folder = None if out is None else Path(out).absolute()
        if self.folder is not None and superlink is None:
            check_usable(self.folder)
        # The clients' machines of a deployment may have packages that this one lacks.
        with nullcontext() if superlink is None else suppress(MissingPackageError):
            resolve_shared_blocks(scenario)
        self.device = scenario.device if superlink is not None else str(resolve_device(scenario.device))
        self.result: Result | None = None
        """What became of the run, as far as that is known here, once it has ended, however it ended."""
        self._claim: AbstractContextManager[object] = nullcontext()
        if self.folder is not None and superlink is None:
            self._claim = reclaim_folder(self.folder) if resume else claim_folder(self.folder, replace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the run's folder; all processes have ended with `run`."""
        with self._claim:
            pass

    def run(self, watch: Watch = lambda record: None, say: Say = lambda line: None) -> Result:
        """Run the federation; if interrupted, stop it.

        watch: is called with every round's record. say: is called with every other line of the log. FlowerRunError if
        the run does not complete.
        """
        with tempfile.TemporaryDirectory(prefix="grpo-fed-", ignore_cleanup_errors=True) as name:
            temporary = Path(name)
            folder = temporary / "run" if self.folder is None else self.folder
            for part in ("logs", "neutral"):
                (temporary / part).mkdir()
            try:
                self.result = self._run(temporary, folder, LogChannel(watch, say, self.folder))
            except BaseException:
                if self.superlink is None and (folder / RESULTS).is_file():
                    document = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
                    self.result = Result.from_json(document, self.folder)
                raise
            finally:
                if folder.is_dir():
                    shutil.copytree(temporary / "logs", folder / FLOWER_LOGS, dirs_exist_ok=True)
            return self.result

    def _run(self, temporary: Path, folder: Path, channel: LogChannel) -> Result:
        """Run the federation with all processes that this machine needs for it, and stop these in the end."""
        config = {"scenario": self.scenario.dumps(), "out": str(folder), "resume": self.resume, "replace": self.replace}
        is_deployed = self.superlink is not None
        home = None if is_deployed else temporary / "home"
        here = {} if is_deployed else {STATE: str(folder / CLIENTS), CLAIMED: str(folder)}
        environment = make_flower_environment(home, here)
        if not is_deployed and not self.resume:
            shutil.rmtree(folder / CLIENTS, ignore_errors=True)
        app = make_app_folder(temporary / "app")
        with SupervisedProcesses(temporary / "neutral", environment, temporary / "logs") as processes:
            restarter = Restarter(processes, {})
            federation: Sequence[str] = ()
            if home is not None:
                restarter = _start_superlink(processes, temporary, home, self.scenario, self.engine)
                federation = _simulation_config(self.scenario) if self.engine == "flower-sim" else ()
            flwr = FlwrCommand(self.superlink or CONNECTION, environment, temporary / "neutral")
            run = flwr.start(app, config, federation)
            try:
                status = _follow(flwr, run, processes, restarter, channel)
            except BaseException:
                if is_deployed:
                    with suppress(RuntimeError):
                        flwr.stop(run)
                raise
            result = _result(status, channel, processes)
            if not is_deployed:
                _copy_policies(folder)
            return result


def _start_superlink(
    processes: SupervisedProcesses, temporary: Path, home: Path, scenario: Scenario, engine: EngineName
) -> Restarter:
    """Start a SuperLink, and a resident node for all clients unless they are simulated."""
    superlink = SuperLink(processes, temporary, find_free_port(), simulation=engine == "flower-sim")
    if engine == "flower":
        clients = {client: None for settings in scenario.clients for client in settings.names}
        superlink.commands[NODES] = make_host_command(superlink.address, clients, own_keys=temporary / "keys")
    superlink.start()
    write_connection(home, CONNECTION, superlink.address, None)
    return Restarter(processes, superlink.commands)


def _simulation_config(scenario: Scenario) -> list[str]:
    """Configure Flower's simulation for the scenario's clients, as many at a time as this machine has cores."""
    clients, cores = sum(settings.count for settings in scenario.clients), os.cpu_count() or 1
    config: dict[str, float] = {"num-supernodes": clients, "client-resources-num-cpus": 1, "init-args-num-cpus": cores}
    if scenario.device != "cpu":
        import torch

        if torch.cuda.is_available():
            config["client-resources-num-gpus"] = torch.cuda.device_count() / cores
    return [f"{key}={value}" for key, value in config.items()]


def _follow(
    flwr: FlwrCommand, run: str, processes: SupervisedProcesses, restarter: Restarter, channel: LogChannel
) -> RunStatus:
    """Read a run's log until the run ends, and restart processes that end meanwhile; return how the run ended."""
    while True:
        processes.log(RUN_LOG).unlink(missing_ok=True)
        processes.start(RUN_LOG, flwr.log_command(run))
        lines = follow_lines(processes.log(RUN_LOG))
        while processes.exit_code(RUN_LOG) is None:
            channel.read(lines)
            restarter.restart_ended()
            time.sleep(POLL)
        channel.read(lines)
        status = _status(flwr, run, restarter)
        if status.stage == "finished":
            return status


def _status(flwr: FlwrCommand, run: str, restarter: Restarter) -> RunStatus:
    """Return the status of a run, waiting for a SuperLink that was killed and is being restarted."""
    until = time.monotonic() + PATIENCE
    while True:
        restarter.restart_ended()
        try:
            return flwr.status(run)
        except RuntimeError:
            if time.monotonic() > until:
                raise
        time.sleep(1)


def _result(status: RunStatus, channel: LogChannel, processes: SupervisedProcesses) -> Result:
    """Return the result of a run that has completed; FlowerRunError if it has not."""
    log = f"the last lines of its log:\n{processes.tail(RUN_LOG)}"
    if status.outcome != "completed":
        details = re.sub(r"^(ServerApp|Simulation) failed with exception: ", "", status.details)
        reason = details if details not in ("", "N/A") else f"the run was {status.outcome}"
        raise FlowerRunError(f"{reason}\n{log}")
    if channel.result is None:
        raise FlowerRunError(f"the run completed without a result\n{log}")
    return channel.result


def _copy_policies(folder: Path) -> None:
    """Copy the clients' policies into the run's folder; the clients of a deployment keep theirs."""
    saved = sorted((folder / CLIENTS).glob(f"*/{POLICIES}"), key=lambda path: path.stat().st_mtime)
    if saved:
        shutil.copytree(saved[-1], folder / POLICIES, dirs_exist_ok=True)
