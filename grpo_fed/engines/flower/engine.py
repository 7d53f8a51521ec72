"""A federation on Flower: on its simulation, on a node of this machine, or on a deployment.

For the first two this machine gets a SuperLink of its own, with a node for all clients or a simulation of them, while
the run lasts. Its processes start before this one imports torch, since all of them take seconds to import what they
need. Then, as on a deployment, the server's app is started as a run of it, and its log is read until it ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, final

from grpo_fed.callbacks.calls import CallbackList
from grpo_fed.engines.flower.app_folder import make_app_folder
from grpo_fed.engines.flower.connections import read_connection
from grpo_fed.engines.flower.log_channel import LogChannel, Say, Watch
from grpo_fed.engines.flower.processes import POLL, SupervisedProcesses, remove_colours
from grpo_fed.engines.flower.superlink import STATE, Restarter, SuperLink, find_free_port, make_flower_environment
from grpo_fed.engines.resident.host import make_host_command
from grpo_fed.federation.hostile import refuse_collusion
from grpo_fed.policy.shared_names import POLICIES
from grpo_fed.runs.folder import (
    CLAIMED,
    CLIENTS,
    FLOWER_LOGS,
    check_usable,
    claim_folder,
    open_unfinished,
    reclaim_folder,
)
from grpo_fed.runs.results import RESULTS, Result
from grpo_fed.scenario.extras import write_install_command
from grpo_fed.scenario.scenario import Scenario
from grpo_fed.tasks.task import MissingPackageError

if TYPE_CHECKING:
    from grpo_fed.engines.flower.control import RunStatus, SuperLinkControl

EngineName: TypeAlias = Literal["flower-sim", "flower"]

NODES = "nodes"
"""The name of the process that serves the clients of this machine."""
RUN_LOG = "run"
"""The name of the file with the run's log."""
LAST_LINES = 15
"""How many lines of the log are shown of a run that has failed."""


class FlowerRunError(RuntimeError):
    """A run on Flower failed or was stopped; the text says why, as far as that is known."""


@final
class FlowerEngine:
    """A federation that is ready to begin: making one finds what is wrong before a run is started or a file written."""

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
            raise ValueError(f"engine flower-sim needs Ray: {write_install_command('simulation')}")
        if engine == "flower-sim" and superlink is not None:
            raise ValueError(f"engine flower-sim starts a SuperLink of its own: leave out superlink {superlink}")
        refuse_collusion(scenario, f"the engine {engine}")
        self._link = None if superlink is None else read_connection(superlink)
        CallbackList(scenario)  # finds what cannot be imported; the server's app makes its own
        starts = [scenario.policy.start, *(entry.start for entry in scenario.clients)]
        if superlink is None and any(start is not None for start in starts):
            # The processes on this machine do not work in this folder; a deployment's paths are those of its machines.
            from grpo_fed.policy.start_values import with_absolute_starts

            scenario = with_absolute_starts(scenario)
        self.scenario, self.engine, self.resume, self.replace = scenario, engine, resume, replace
        self.folder = None if out is None else Path(out).absolute()
        if self.folder is not None and superlink is None:
            check_usable(self.folder)
        self.result: Result | None = None
        """What became of the run, as far as that is known here, once it has ended, however it ended."""
        with ExitStack() as started:
            self._temporary = Path(
                started.enter_context(tempfile.TemporaryDirectory(prefix="grpo-fed-", ignore_cleanup_errors=True))
            )
            self._run_folder = self._temporary / "run" if self.folder is None else self.folder
            for part in ("logs", "neutral"):
                (self._temporary / part).mkdir()
            self._here = None if superlink is not None else started.enter_context(self._start_processes())
            self.device = self._check_scenario()
            self._claim: AbstractContextManager[object] = nullcontext()
            if self.folder is not None and superlink is None:
                self._claim = reclaim_folder(self.folder) if resume else claim_folder(self.folder, replace)
            self._started = started.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all processes, and release the run's folder."""
        with self._claim:
            self._started.close()

    def run(self, watch: Watch = lambda record: None, say: Say = lambda line: None) -> Result:
        """Run the federation; if interrupted, stop it.

        watch: is called with every round's record. say: is called with every other line of the log. FlowerRunError if
        the run does not complete.
        """
        with self._started:
            try:
                self.result = self._run(LogChannel(watch, say, self.folder))
            except BaseException:
                if self._here is not None:
                    self._here.close()  # the server's app writes the results of a run that is interrupted
                    if (self._run_folder / RESULTS).is_file():
                        document = json.loads((self._run_folder / RESULTS).read_text(encoding="utf-8"))
                        self.result = Result.from_json(document, self.folder)
                raise
            finally:
                if self._run_folder.is_dir():
                    shutil.copytree(self._temporary / "logs", self._run_folder / FLOWER_LOGS, dirs_exist_ok=True)
            return self.result

    def _start_processes(self) -> LocalSuperLink:
        """Start a SuperLink, and a resident node for all clients unless they are simulated."""
        more = {STATE: str(self._run_folder / CLIENTS), CLAIMED: str(self._run_folder)}
        clients = [name for settings in self.scenario.clients for name in settings.names]
        return LocalSuperLink(self._temporary, more, None if self.engine == "flower-sim" else clients)

    def _check_scenario(self) -> str:
        """Return the device that clients compute on; ValueError if the scenario cannot work.

        This imports torch, and so do the processes meanwhile.
        """
        from grpo_fed.policy.shared import resolve_shared_blocks
        from grpo_fed.rl.device import resolve_device

        # The clients' machines of a deployment may have packages that this one lacks.
        with nullcontext() if self._here is not None else suppress(MissingPackageError):
            resolve_shared_blocks(self.scenario)
        return self.scenario.device if self._here is None else str(resolve_device(self.scenario.device))

    def _run(self, channel: LogChannel) -> Result:
        """Run the federation; stop a run on a deployment if interrupted."""
        from grpo_fed.engines.flower.control import ControlError, SuperLinkControl

        here, folder = self._here, self._run_folder
        config = {"scenario": self.scenario.dumps(), "out": str(folder), "resume": self.resume, "replace": self.replace}
        if here is not None and not self.resume:
            shutil.rmtree(folder / CLIENTS, ignore_errors=True)
        app = make_app_folder(self._temporary / "app")
        link = self._link if here is None else here.superlink.connection
        assert link is not None
        with SuperLinkControl(link) as control:
            bundle = control.prepare(app)
            if here is not None:
                here.superlink.wait()
            run = control.start(
                bundle, config, _simulation_config(self.scenario) if self.engine == "flower-sim" else {}
            )
            try:
                log = self._temporary / "logs" / f"{RUN_LOG}.log"
                status = _follow(control, run, log, here, channel)
            except BaseException:
                if here is None:
                    with suppress(ControlError):
                        control.stop(run)
                raise
        result = _result(status, channel, log)
        if here is not None:
            here.close()
            _copy_policies(folder)
        return result


@final
class LocalSuperLink:
    """A SuperLink on this machine for one run, with a resident node for the clients."""

    def __init__(self, folder: Path, environment: Mapping[str, str], clients: Sequence[str] | None) -> None:
        """Start the processes, which import what they need while this one does.

        folder: a temporary one, with the folders `logs` and `neutral`. clients: those of the node; None for a
        simulation.
        """
        self.processes = SupervisedProcesses(
            folder / "neutral", make_flower_environment(folder / "home", environment), folder / "logs"
        )
        try:
            self.superlink = SuperLink(self.processes, folder, find_free_port(), simulation=clients is None)
            if clients is not None:
                keys = dict.fromkeys(clients)
                self.superlink.commands[NODES] = make_host_command(
                    self.superlink.address, keys, own_keys=folder / "keys"
                )
            self.superlink.begin()
            self.restarter = Restarter(self.processes, self.superlink.commands)
        except BaseException:
            self.processes.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop all processes."""
        self.processes.close()


def _simulation_config(scenario: Scenario) -> dict[str, float]:
    """Configure Flower's simulation for the scenario's clients, as many at a time as this machine has cores."""
    clients, cores = sum(settings.count for settings in scenario.clients), os.cpu_count() or 1
    config: dict[str, float] = {"num_supernodes": clients, "client_resources_num_cpus": 1, "init_args_num_cpus": cores}
    if scenario.device != "cpu":
        import torch

        if torch.cuda.is_available():
            config["client_resources_num_gpus"] = torch.cuda.device_count() / cores
    return config


def _follow(
    control: SuperLinkControl, run: int, log: Path, here: LocalSuperLink | None, channel: LogChannel
) -> RunStatus:
    """Read a run's log until the run ends, and restart processes that end meanwhile; return how the run ended."""
    items = control.follow(run)
    with log.open("a", encoding="utf-8") as file:
        while True:
            if here is not None:
                here.restarter.restart_ended()
            try:
                item = items.get(timeout=POLL)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            if not isinstance(item, str):
                return item
            file.write(item)
            file.flush()
            channel.read(item)


def _result(status: RunStatus, channel: LogChannel, log: Path) -> Result:
    """Return the result of a run that has completed; FlowerRunError if it has not."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    last_lines = remove_colours("\n".join(text.splitlines()[-LAST_LINES:]))
    end = f"the last lines of its log:\n{last_lines}"
    if status.outcome != "completed":
        details = re.sub(r"^(ServerApp|Simulation) failed with exception: ", "", status.details)
        reason = details if details not in ("", "N/A") else f"the run was {status.outcome}"
        raise FlowerRunError(f"{reason}\n{end}")
    if channel.result is None:
        raise FlowerRunError(f"the run completed without a result\n{end}")
    return channel.result


def _copy_policies(folder: Path) -> None:
    """Copy the clients' policies into the run's folder; the clients of a deployment keep theirs."""
    saved = sorted((folder / CLIENTS).glob(f"*/{POLICIES}"), key=lambda path: path.stat().st_mtime)
    if saved:
        shutil.copytree(saved[-1], folder / POLICIES, dirs_exist_ok=True)
