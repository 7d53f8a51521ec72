"""A SuperLink gives a node the scenario of a run with the arguments of its own client alone.

Flower gives every node the configuration of a run as the run was started with it. Where nodes need registered keys,
this rewrites the answer: by the node's key it is known which client that is. Where they need none, any node could call
itself any client, and nothing is removed; nor is it where no file says for which client each key was made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias, final

from grpo_fed.engines.flower.superlink import read_registered_keys
from grpo_fed.engines.wire.flower_private import GET_RUN, SuperLinkState, replace_scenario
from grpo_fed.scenario.own_arguments import withhold_arguments

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


@final
class OwnScenario:
    """Removes from the answers to a node's question for a run what belongs to other clients."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and rewrite the answer if it is a run."""
        if scope["type"] != "http" or scope["path"] != GET_RUN:
            await self._app(scope, receive, send)
            return
        start: MutableMapping[str, Any] = {}
        parts: list[bytes] = []

        async def collect(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start":
                start.update(event)
                return
            parts.append(event.get("body", b""))
            if not event.get("more_body", False):
                body = b"".join(parts)
                keys = await asyncio.to_thread(_read_keys)
                if start["status"] == 200 and keys is not None:
                    node = await asyncio.to_thread(_find_node, scope)
                    client = None if node is None else keys.get(node)
                    body = replace_scenario(body, lambda text: withhold_arguments(text, client), client)
                headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, collect)


def _read_keys() -> dict[int, str] | None:
    """Read by node id for which client each key was made; of none if the file that says so is lost or damaged."""
    try:
        return read_registered_keys()
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def _find_node(scope: Scope) -> int | None:
    """Return the node whose key signed a request; None if the signature is not valid."""
    try:
        return SuperLinkState(scope["app"]).find_node(scope["headers"])
    except PermissionError:
        return None
