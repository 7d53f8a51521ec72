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


def is_running(pid: int) -> bool:
    """Return whether there is a process with this id that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def find_processes_in(folder: Path) -> list[int]:
    """List the processes whose current folder is this one, this process excepted; none on other systems than Linux."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc/self/cwd").exists() else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if (entry / "cwd").readlink() == folder:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
