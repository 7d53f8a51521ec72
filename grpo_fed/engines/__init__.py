"""What runs a federation. All engines run the same loop over the same checked messages.

    start.py  run and resume: the engine that was asked for
    local/    this machine's processes
    flower/   Flower: simulation, or a SuperLink and nodes
    exchange/  messages in the SuperLink's memory, through requests that wait
    resident/  one process for all clients of a machine
    deploy/   keys, certificates, a server and clients on several machines
    replay_order.py  repeats a run whose rounds did not wait
    threads.py  how many threads torch computes with
    alone.py  the control: every client by itself, no federation
    wire/     messages as Flower's records, checked; a transport over any Flower grid
    workers/  worker processes, and how they are asked

Begin with start.py. A new engine is a class with what `start.Engine` asks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fed._lazy import lazy_getattr

if TYPE_CHECKING:
    from grpo_fed.engines.alone import train
    from grpo_fed.engines.start import Engine, resume, run

__all__ = [
    "Engine",
    "resume",
    "run",
    "train",
]

MODULES = {
    "Engine": "grpo_fed.engines.start",
    "resume": "grpo_fed.engines.start",
    "run": "grpo_fed.engines.start",
    "train": "grpo_fed.engines.alone",
}

__getattr__ = lazy_getattr(__name__, MODULES)
