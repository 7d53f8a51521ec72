"""Commands of `grpo-fed` in processes that can be killed, whose disk is full, or whose clock jumps.

A process is a fork of one that has imported everything, so that a command costs what its run costs.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import grpo_fed.cli.run
import grpo_fed.engines.local.engine
import grpo_fed.reports.progress
import grpo_fed.runs.tracking

PRELOADED = [module.__name__ for module in (grpo_fed.cli.run, grpo_fed.engines.local.engine, grpo_fed.reports.progress)]
PRELOADED += [grpo_fed.runs.tracking.__name__, __name__]
WRITES = os.O_WRONLY | os.O_RDWR


def start_command(arguments: Sequence[str], log: Path, weather: Sequence[object] = ()) -> BaseProcess:
    """Start `grpo-fed` with some arguments; its output is appended to a log.

    weather: ("full", FOLDER, FIRST, COUNT) lets writes below a folder fail, COUNT of them from the FIRST on; ("clock",
    SEED) lets the clock jump.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_command, args=(tuple(arguments), str(log), tuple(weather)))
    process.start()
    return process


def run_command(arguments: Sequence[str], log: str, weather: Sequence[object]) -> None:
    """Do what the command does: the main function of the process."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for number in (1, 2):
        os.dup2(handle, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["grpo-fed", *arguments]
    match weather:
        case ("full", folder, first, count):
            fill_disk(str(folder), int(str(first)), int(str(count)))
        case ("clock", seed):
            shake_clock(int(str(seed)))
    from grpo_fed.cli import main

    main()


def fill_disk(folder: str, first: int, count: int) -> None:
    """Let so many attempts to write below a folder fail as on a full disk, from the first on."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event != "open" or not isinstance(arguments[2], int) or not arguments[2] & WRITES:
            return
        if str(arguments[0]).startswith(folder):
            seen += 1
            if first <= seen < first + count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hook)


def shake_clock(seed: int) -> None:
    """Let the time of day jump by up to ten years, forth and back, whenever it is asked for."""
    rng, real = random.Random(seed), time.time
    time.time = lambda: real() + rng.choice((0.0, rng.uniform(-3e8, 3e8)))
