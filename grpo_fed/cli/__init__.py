"""The command line.

Nothing here imports what a command does not need: `--help` comes without torch. Exit codes: 0 all is well, 1 a run
failed, 2 the scenario or the call is wrong and nothing was started or written, 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fed.cli.commands import app

__all__ = ["app", "main"]

INTERRUPTED = 130


def main() -> None:
    """What `grpo-fed` runs; the commands are imported in it, so that Ctrl-C at that time ends it as at any other."""
    try:
        from grpo_fed.cli.commands import answer

        answer()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def __getattr__(name: str) -> Any:
    """`app`, on first use."""
    if name != "app":
        raise AttributeError(f"module 'grpo_fed.cli' has no attribute {name!r}")
    from grpo_fed.cli.commands import app

    return app
