"""The SuperLink's side of an exchange: a middleware that answers the requests of `protocol.py`.

It comes before Flower's own middleware, behind which a request takes 6 to 9 ms instead of less than one, and a request
that waits holds no thread. Nodes and apps prove who they are as they do to Flower: a node signs its first request with
its key and gets a pass for a minute, an app has the token of its run.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar, final

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.exchange.exchange import Exchange, NodeAnswer, NodeMessage
from grpo_fed.engines.exchange.protocol import InvalidBodyError
from grpo_fed.engines.wire.flower_private import MEDIA_TYPE, SuperLinkState, unwrap_body, wrap_body

PASS_SECONDS = 60.0
"""Seconds for which a pass is valid: a key that is removed works so much longer at most."""
TOKEN_SECONDS = 2.0
"""Seconds for which a run's token is not checked again."""
HEARTBEAT_SECONDS = 20.0
"""Seconds between two notes in Flower's database that a node is online."""
RUN_CHECK = 20.0
"""Seconds between two looks at whether runs that have messages still go on."""
MOST_BODY = 2**30
"""The most bytes of a request."""

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class _Refusal(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class _Pass:
    node: int
    until: float


@dataclass(frozen=True)
class _Token:
    run: int
    headers: list[tuple[bytes, bytes]]
    until: float


@final
class ExchangeRoutes:
    """Answers the requests of an exchange, and passes all others on."""

    def __init__(self, app: App) -> None:
        self._app, self.exchange = app, Exchange()
        self._passes: dict[str, _Pass] = {}
        self._tokens: dict[tuple[bytes, ...], _Token] = {}
        self._heartbeats: dict[int, float] = {}
        self._checked = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._routes = {
            protocol.WHO: self._who,
            protocol.NEXT: self._next,
            protocol.ANSWER: self._answer,
            protocol.ASK: self._ask,
            protocol.HEAR: self._hear,
            protocol.STATUS: self._status,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """NodeAnswer a request, or pass it on."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        try:
            document, contents = protocol.decode(unwrap_body(await _read(receive)))
            status, body = 200, wrap_body(await route(scope, document, contents))
        except _Refusal as refusal:
            status, body = refusal.status, str(refusal).encode()
        except (InvalidBodyError, LookupError, TypeError, ValueError, OverflowError) as error:
            status, body = 400, f"{type(error).__name__}: {error}".encode()
        headers = [(b"content-type", MEDIA_TYPE if status == 200 else b"text/plain")]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # Nodes

    async def _who(self, scope: Scope, document: dict[str, Any], contents: list[bytes]) -> bytes:
        """Tell a node its id, and give it a pass; 0 for a key that is not registered."""
        state = SuperLinkState(scope["app"])
        try:
            node = await asyncio.to_thread(state.find_node, scope["headers"])
        except PermissionError as error:
            raise _Refusal(401, str(error)) from None
        if node is None:
            return self._encode({"node": 0})
        await asyncio.to_thread(state.note_sign_of_life, node)
        now, token = time.monotonic(), secrets.token_hex(16)
        self._passes = {key: entry for key, entry in self._passes.items() if entry.until > now}
        self._passes[token] = _Pass(node, now + PASS_SECONDS)
        self._heartbeats[node] = now
        words = (str(document.get(key, ""))[:128] for key in ("client", "device", "version"))
        self.exchange.arrive(node, *words)
        return self._encode({"node": node, "pass": token})

    async def _next(self, scope: Scope, document: dict[str, Any], contents: list[bytes]) -> bytes:
        node = self._find_node(document)
        self._note_sign_of_life(scope, node)
        wait = _seconds(document["wait"])
        working, answered = _texts(document["working"]), _texts(document["answered"])
        found = await self.exchange.next(node, working, answered, wait)
        reply = {"drop": found.drop, "again": found.again, "ask_flower": found.ask_flower}
        if found.instruction is None:
            return self._encode(reply)
        message = {"id": found.instruction.id, "kind": found.instruction.kind, "run": found.run}
        return self._encode({**reply, "message": message}, [found.instruction.content])

    async def _answer(self, scope: Scope, document: dict[str, Any], contents: list[bytes]) -> bytes:
        content = contents[0] if contents else None
        answer = NodeAnswer(str(document["id"]), content, int(document["code"]), str(document["reason"])[:2000])
        return self._encode({"known": self.exchange.answer(self._find_node(document), answer)})

    def _find_node(self, document: dict[str, Any]) -> int:
        """Return the node that has this pass."""
        entry = self._passes.get(str(document["pass"]))
        if entry is None or entry.until < time.monotonic():
            raise _Refusal(401, "the pass is not valid any more")
        return entry.node

    def _note_sign_of_life(self, scope: Scope, node: int) -> None:
        """Let Flower know now and then that a node is online; the request does not wait for that."""
        now = time.monotonic()
        if now > self._heartbeats.get(node, 0.0) + HEARTBEAT_SECONDS:
            self._heartbeats[node] = now
            self._start(asyncio.to_thread(SuperLinkState(scope["app"]).note_sign_of_life, node))
        if now > self._checked + RUN_CHECK:
            self._checked = now
            self._start(self._end_runs(SuperLinkState(scope["app"])))

    # Apps

    async def _ask(self, scope: Scope, document: dict[str, Any], contents: list[bytes]) -> bytes:
        run = await self._find_run(scope)
        self.exchange.end(run, _texts(document["end"]))
        instructions = [
            NodeMessage(str(entry["id"]), int(entry["node"]), str(entry["kind"]), contents[entry["content"]])
            for entry in document["messages"]
        ]
        taken = self.exchange.ask(run, instructions, bool(document["again"]))
        return self._encode({"taken": taken, "gone": self.exchange.gone})

    async def _hear(self, scope: Scope, document: dict[str, Any], contents: list[bytes]) -> bytes:
        run = await self._find_run(scope)
        self.exchange.end(run, _texts(document["end"]))
        heard = await self.exchange.hear(run, _texts(document["ids"]), _seconds(document["wait"]))
        answers = [
            {"id": answer.id, "code": answer.code, "reason": answer.reason, "has_content": answer.content is not None}
            for answer in heard.answers
        ]
        parts = [answer.content for answer in heard.answers if answer.content is not None]
        reply = {"answers": answers, "silent": heard.silent, "gone": self.exchange.gone}
        return self._encode(reply, parts)

    async def _status(self, scope: Scope, document: dict[str, Any], contents: list[bytes]) -> bytes:
        return self._encode({"nodes": [asdict(node) for node in self.exchange.nodes]})

    async def _find_run(self, scope: Scope) -> int:
        """Return the run whose app sends a request."""
        headers, now = list(scope["headers"]), time.monotonic()
        key = tuple(value for name, value in sorted(headers) if name.startswith(b"flwr"))
        token = self._tokens.get(key)
        if token is None or token.until < now:
            run = await asyncio.to_thread(SuperLinkState(scope["app"]).find_run, headers)
            if run is None:
                self._tokens.pop(key, None)
                raise _Refusal(401, "the token of the run is not valid, or the run has ended")
            token = self._tokens[key] = _Token(run, headers, now + TOKEN_SECONDS)
        return token.run

    async def _end_runs(self, state: SuperLinkState) -> None:
        """Forget the messages of runs that have ended, however they ended."""
        for key, token in list(self._tokens.items()):
            if await asyncio.to_thread(state.find_run, token.headers) is None:
                self._tokens.pop(key, None)
                self.exchange.end_run(token.run)

    # Both

    def _encode(self, document: dict[str, Any], contents: Sequence[bytes] = ()) -> bytes:
        return protocol.encode({**document, "epoch": self.exchange.epoch}, contents)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the request."""

        async def do() -> None:
            try:
                await work
            except Exception:
                log.exception("a note in Flower's database failed")

        task = asyncio.create_task(do())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _read(receive: Receive) -> bytes:
    """Read the body of a request."""
    parts, size, more = [], 0, True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise _Refusal(400, "the connection was closed")
        parts.append(event.get("body", b""))
        size, more = size + len(parts[-1]), event.get("more_body", False)
        if size > MOST_BODY:
            raise _Refusal(413, "the request is too large")
    return b"".join(parts)


def _seconds(value: Any) -> float:
    """Return for how long a request waits; ValueError if that is no number."""
    seconds = float(value)
    if math.isnan(seconds):
        raise ValueError("wait is no number")
    return max(0.0, min(seconds, protocol.WAIT))


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values]
