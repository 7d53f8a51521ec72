"""The command line.

    application.py  the application that all commands belong to, and the order of its help
    options.py      options that commands share, and the scenario and the folder that they lead to
    errors.py       messages and exit codes instead of tracebacks
    output.py       a stream that outlives its reader
    run.py          run, train
    drawing.py      figures, a summary, films and the page of a run that has finished
    join.py         join
    play.py         play
    export.py       export
    compare.py      compare, report
    sweep.py        sweep
    attacks.py      attack-board
    scenarios.py    new, check, explain, list, config, schema
    deploy.py       deploy init, rotate, enroll, server, client, status
    tracking.py     ui, replay
    replay_order.py replay-order
    knobs_table.py  all knobs as tables

Begin with run.py. No module imports what a command does not need, so that `--help` does not import torch. Exit codes:
0 success, 1 a run failed, 2 the scenario or the call is wrong and nothing was started or written, 130 Ctrl-C.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typer import Typer

    from grpo_fed.cli.application import app

__all__ = ["app", "main"]

INTERRUPTED = 130


def main() -> None:
    """Run the command `grpo-fed`; commands are imported here, so that Ctrl-C during the imports ends it quietly too."""
    try:
        from grpo_fed.cli.application import prepare_streams

        loaded = _load_app()
        prepare_streams()
        loaded(prog_name="grpo-fed")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        gc.freeze()  # else the interpreter looks through all that torch has made before it ends, most of a second


def _load_app() -> Typer:
    """Import the application and every module of commands; each module registers its own."""
    from grpo_fed.cli import (  # noqa: F401
        attacks,
        compare,
        deploy,
        export,
        join,
        play,
        replay_order,
        run,
        scenarios,
        sweep,
        tracking,
    )
    from grpo_fed.cli.application import app

    return app


def __getattr__(name: str) -> Any:
    """Load `app` on first use."""
    if name != "app":
        raise AttributeError(f"module 'grpo_fed.cli' has no attribute {name!r}")
    return _load_app()
