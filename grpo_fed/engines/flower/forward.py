"""Hands a message that Flower has brought to the process that stays warm for it (hearth.py).

It has no torch and nothing that needs it, since Flower starts a process for every message. Where no such process is to
be had, it is the one that does the work.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, final

from flwr.app import Context, Message, RecordDict

from grpo_fed.engines.wire.packing import pack, unpack
from grpo_fed.engines.workers.frames import receive, send

if TYPE_CHECKING:
    from grpo_fed.engines.flower.node import NodeHandler
from grpo_fed.engines.wire.grids import WorkerDiedError

WARM_SOCKET = "GRPO_FED_HEARTH"
"""Names the socket of the process that stays."""


@final
class MessageForwarder:
    """Of one process."""

    def __init__(self) -> None:
        self.node: NodeHandler | None = None
        """Who does the work in this process, if somebody had to."""

    def answer(self, message: Message, context: Context) -> RecordDict:
        """What the node's client answers; raises what it raises."""
        told: dict[str, Any] = {
            "kind": message.metadata.message_type,
            "text": str(context.run_config["scenario"]),
            "config": dict(context.node_config),
        }
        link = _link()
        if link is not None:
            with link:
                answer = _ask(link, context.run_id, {**told, "content": pack(message.content)})
            if answer is not None:
                return answer
        if self.node is None:
            from grpo_fed.engines.flower.node import NodeHandler

            self.node = NodeHandler()
        return self.node.answer(content=message.content, **told)


def _link() -> socket.socket | None:
    """To the process that stays; None where there is none."""
    place = os.environ.get(WARM_SOCKET)
    if not place:
        return None
    link = socket.socket(socket.AF_UNIX)
    with suppress(OSError):
        link.connect(place)
        return link
    link.close()
    return None


def _ask(link: socket.socket, run: int, told: dict[str, Any]) -> RecordDict | None:
    """Its answer; None if it cannot give one, which says nothing of the client."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    own = max(1, int(threads)) if threads.isdecimal() else 1
    try:
        send(link, {"run": run, "path": sys.path, "told": {**told, "threads": own}})
        found = receive(link)
    except (EOFError, OSError):
        return None
    if "died" in found:
        raise WorkerDiedError(found["died"])
    if "raised" in found:
        print(found["trace"], file=sys.stderr)
        kind, _, text = found["raised"].partition(": ")
        raise type(kind, (Exception,), {})(text)
    return unpack(found["content"]) if "content" in found else None
