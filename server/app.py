"""ServerApp: reads a run's configuration, runs the federation over Flower's grid, and prints its records and result."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from grpo_fed.engines.flower.admission import serve_federation
from grpo_fed.engines.flower.app_folder import scenario_from_config
from grpo_fed.engines.flower.log_channel import LogChannel
from grpo_fed.engines.flower.superlink import read_registered_keys
from grpo_fed.engines.flower.superlink_grid import SuperLinkGrid
from grpo_fed.engines.wire.flower_private import AppConnection
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.runs.folder import (
    FolderClaim,
    claim_folder,
    claim_new_folder,
    is_claimed_by_parent,
    open_unfinished,
    read_engine_state,
    reclaim_folder,
)
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.newcomers import takes_newcomers
from grpo_fed.scenario.scenario import Scenario

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, or go on with it."""
    text, out = str(context.run_config["scenario"]), str(context.run_config["out"])
    if context.run_config["resume"]:
        scenario, after = open_unfinished(Path(out))
        state = read_engine_state(Path(out)) if after is None else after.part("engine", dict)
    else:
        scenario, after, state = scenario_from_config(text), None, {}
    claim = _claim_folder(scenario, out, bool(context.run_config["resume"]), bool(context.run_config["replace"]))
    if AppConnection.is_possible(grid):
        grid = SuperLinkGrid(grid)
    names = [name for settings in scenario.clients for name in settings.names]
    registry = NodeRegistry(grid, names, keys=read_registered_keys(), welcomes=takes_newcomers(scenario))
    with claim, _stop_cleanly():
        result = serve_federation(scenario, grid, registry, claim.folder, after, state, _print_record)
        print(LogChannel.format_result(result), flush=True)


def _claim_folder(scenario: Scenario, out: str, resume: bool, replace: bool) -> FolderClaim:
    """Claim the run's folder, a new one if the run was started without; the engine that starts a run may hold it."""
    if not out:
        return claim_new_folder(scenario)
    folder = Path(out)
    if is_claimed_by_parent(folder):
        return FolderClaim(folder, None)
    return reclaim_folder(folder) if resume else claim_folder(folder, replace)


def _print_record(record: RoundRecord) -> None:
    print(LogChannel.format_record(record), flush=True)


@contextmanager
def _stop_cleanly() -> Iterator[None]:
    """Let a run that Flower stops end as on Ctrl-C, so that its folder is complete."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a simulation runs the app in a thread, where no signals arrive
        return

    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) == 1:  # a second signal must not interrupt the writing of the results
            raise KeyboardInterrupt

    # The process that ends a task sends SIGTERM; Flower's client in this process sends SIGINT if the run was stopped.
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        handler = before.get(signal.Signals(caught[0])) if caught else None
        if callable(handler):
            handler(caught[0], None)  # reports to the SuperLink, and ends this process
        raise
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
