"""Finds processes that a test has started, and kills them; on Linux alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def find_descendants(pid: int, words: str) -> list[int]:
    """List the descendants of a process whose commands contain these words."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue

    def descends(process: int) -> bool:
        while process in parents and process != pid:
            process = parents[process]
        return process == pid

    return [process for process, command in commands.items() if words in command and descends(process)]


def kill_descendant(pid: int, words: str) -> None:
    """Kill -9 the one descendant of a process whose command contains these words."""
    (victim,) = find_descendants(pid, words)
    os.kill(victim, signal.SIGKILL)
