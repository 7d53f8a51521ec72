"""Flower's SuperExec, which starts a server's app when a run begins, from a process that has imported it already.

`python -m grpo_fed.engines.flower.superexec` takes the arguments of `flower-superexec`. Importing what a server's app
needs takes seconds, so a second process does that while the SuperLink starts, and is forked for each run. If it has
died, or on a system where libraries do not survive a fork, an app is started as Flower does it.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import final

from grpo_fed.engines.flower.launcher import APPS, SERVER_APP, SERVER_APP_NEEDS, fork_server_of, make_link, run_and_exit
from grpo_fed.engines.workers.fork_server import is_possible


def main(arguments: Sequence[str], link: socket.socket | None = None) -> None:
    """Run the SuperExec.

    link: to the process that apps are forked from; None to fork it now, where that is possible.
    """
    if link is None and is_possible():
        # before this process has a thread or a connection; the supervisor stops it, not Ctrl-C
        forks = fork_server_of(*SERVER_APP_NEEDS, close=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        with forks:
            link = make_link(forks, APPS)
    apps = ServerApps(link)

    from grpo_fed.engines.wire.flower_private import run_superexec

    run_superexec(arguments, apps.start)


@final
class ServerApps:
    """Starts server apps as forks of a process that has imported what they need."""

    def __init__(self, link: socket.socket | None) -> None:
        """link: to that process; None without one."""
        self._link = link

    def start(self, arguments: Sequence[str]) -> None:
        """Start an app with the arguments of `flwr-serverapp`."""
        if self._link is not None:
            try:
                self._link.send(json.dumps(list(arguments)).encode())
            except OSError:  # the process has died
                self._link.close()
                self._link = None
            else:
                return
        subprocess.Popen([SERVER_APP, *arguments])


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
