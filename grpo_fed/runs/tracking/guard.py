"""Runs a command until standard input is closed, then ends it with all that it has started.

`python -m grpo_fed.runs.tracking.guard COMMAND...`, in a session of its own. The pipe closes when the process that
started it ends in any way, by `kill -9` too, so none of the processes remains.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

PATIENCE = 5.0
"""Seconds that the processes have after SIGTERM."""


def main(command: Sequence[str]) -> int:
    """Run the command; return its exit code, if it ends by itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # those that it is sent to are the others of the session
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_accept_sigterm)
    ending = threading.Event()
    thread = threading.Thread(target=_end_with_input, args=(process, ending), daemon=True)
    thread.start()
    code = process.wait()
    if ending.is_set():
        thread.join()  # it ends us, too
    os.killpg(0, signal.SIGTERM)
    return code if code >= 0 else 128 - code


def _accept_sigterm() -> None:
    """Undo in the command what it would inherit."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_input(process: subprocess.Popen[bytes], ending: threading.Event) -> None:
    """Wait for the end of the input, then end the whole session."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    ending.set()
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
