"""Forwards a message that Flower has brought to this process to the warm server (warm.py).

Flower starts a process for every message, so this imports neither torch nor anything that needs it. Without a warm
server this process does the work itself.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, final

from flwr.app import Context, Message, RecordDict

from grpo_fed.engines.wire.grids import WorkerDiedError
from grpo_fed.engines.wire.packing import pack, unpack
from grpo_fed.engines.workers.frames import receive, send

if TYPE_CHECKING:
    from grpo_fed.engines.flower.node import NodeHandler

WARM_SOCKET = "GRPO_FED_WARM_SOCKET"
"""The environment variable with the path of the warm server's socket."""


@final
class MessageForwarder:
    """Answers the messages of this process, by way of the warm server where there is one."""

    def __init__(self) -> None:
        self.node: NodeHandler | None = None
        """Answers messages in this process; None as long as the warm server has answered them all."""

    def answer(self, message: Message, context: Context) -> RecordDict:
        """Return the answer of the node's client; raises what the client raises."""
        request: dict[str, Any] = {
            "kind": message.metadata.message_type,
            "scenario": str(context.run_config["scenario"]),
            "config": dict(context.node_config),
        }
        link = _connect()
        if link is not None:
            with link:
                answer = _ask(link, context.run_id, {**request, "content": pack(message.content)})
            if answer is not None:
                return answer
        if self.node is None:
            from grpo_fed.engines.flower.node import NodeHandler

            self.node = NodeHandler()
        return self.node.answer(content=message.content, **request)


def _connect() -> socket.socket | None:
    """Connect to the warm server; None if there is none."""
    path = os.environ.get(WARM_SOCKET)
    if not path:
        return None
    link = socket.socket(socket.AF_UNIX)
    with suppress(OSError):
        link.connect(path)
        return link
    link.close()
    return None


def _ask(link: socket.socket, run: int, request: dict[str, Any]) -> RecordDict | None:
    """Return the warm server's answer; None if it cannot give one, which says nothing about the client."""
    omp_threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = max(1, int(omp_threads)) if omp_threads.isdecimal() else 1
    try:
        send(link, {"run": run, "path": sys.path, "request": {**request, "threads": threads}})
        reply = receive(link)
    except (EOFError, OSError):
        return None
    if "died" in reply:
        raise WorkerDiedError(reply["died"])
    if "raised" in reply:
        print(reply["trace"], file=sys.stderr)
        kind, _, text = reply["raised"].partition(": ")
        raise type(kind, (Exception,), {})(text)
    return unpack(reply["content"]) if "content" in reply else None
