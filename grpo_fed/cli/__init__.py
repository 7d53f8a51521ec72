"""The command line.

Nothing here imports what a command does not need: `--help` comes without torch. Exit codes: 0 all is well, 1 a run
failed, 2 the scenario or the call is wrong and nothing was started or written, 130 Ctrl-C.
"""

from __future__ import annotations

from grpo_fed.cli import comparing, deploying, looking, running, tracked  # noqa: F401, a command is registered where it is written
from grpo_fed.cli.app import app, main

__all__ = ["app", "main"]
