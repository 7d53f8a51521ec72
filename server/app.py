"""ServerApp: a run's configuration -> a federation over Flower's grid -> its folder, and lines for who started it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from grpo_fed.engines.flower.app_folder import scenario_from_config
from grpo_fed.engines.flower.discovery import discover_shared_blocks
from grpo_fed.engines.flower.engine import note_line, result_line
from grpo_fed.engines.flower.superlink import names_of_keys
from grpo_fed.engines.wire.registry import NodeRegistry
from grpo_fed.engines.wire.transport import GridTransport
from grpo_fed.federation.rounds import Federation
from grpo_fed.runs import folder as journal
from grpo_fed.runs.records import RoundRecord
from grpo_fed.scenario.scenario import Scenario

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, or go on with it."""
    text, out = str(context.run_config["scenario"]), str(context.run_config["out"])
    resumed = bool(context.run_config["resume"])
    if resumed:
        folder = Path(out)
        scenario, after = journal.open_unfinished(folder)
    else:
        scenario = scenario_from_config(text)
        folder, after = Path(out) if out else _fresh(scenario), None
    folder.parent.mkdir(parents=True, exist_ok=True)
    noted = after.parts["engine"] if after is not None else journal.read_engine_state(folder) if resumed else {}
    names = [name for settings in scenario.clients for name in settings.names]
    roll = NodeRegistry(grid, names, keys=names_of_keys())
    with _stopped_in_order():
        commons, engine = discover_shared_blocks(scenario, roll, noted)
        post = GridTransport(grid, commons, scenario, roll)
        federation = Federation(scenario, commons, post, folder, after, evaluate_with_next_round=True, engine=engine)
        print(f"run folder: {folder.absolute()}", flush=True)
        print(result_line(federation.run(_tell)), flush=True)


def _fresh(scenario: Scenario) -> Path:
    """A folder for who named none."""
    return Path("runs") / f"{scenario.name}-{scenario.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _tell(note: RoundRecord) -> None:
    print(note_line(note), flush=True)


@contextmanager
def _stopped_in_order() -> Iterator[None]:
    """Stopped by Flower, a federation ends as it does on Ctrl-C: with what it has written down."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a simulation has it in a thread, which nobody stops
        return

    told: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        told.append(number)
        raise KeyboardInterrupt

    # whoever ends a task sends SIGTERM; Flower's own client sends SIGINT when it finds that the run was stopped
    flowers = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        handler = flowers.get(signal.Signals(told[0])) if told else None
        if callable(handler):
            handler(told[0], None)  # tells the SuperLink, and ends this process
        raise
    finally:
        for number, flower in flowers.items():
            signal.signal(number, flower)
