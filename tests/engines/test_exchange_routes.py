"""The SuperLink's side of an exchange over HTTP: who is let in, checked by Flower's own state of nodes and runs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, TASK_TOKEN_HEADER
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.superlink.federation import NoOpFederationManager
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fed.engines.exchange import protocol
from grpo_fed.engines.exchange import routes as module
from grpo_fed.engines.exchange.routes import ExchangeRoutes
from grpo_fed.engines.wire.flower_private import unwrap_body, wrap_body

Headers = list[tuple[bytes, bytes]]


class SuperLink:
    """The routes before an app that answers 404, with a state of Flower's in memory."""

    def __init__(self) -> None:
        self.factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        )
        self.app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=self.factory))
        self.routes = ExchangeRoutes(self.passed_on)

    async def passed_on(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def post(self, path: str, body: bytes, headers: Headers = []) -> tuple[int, bytes]:  # noqa: B006
        """Send a request; return the status and the body of the answer."""
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {"type": "http", "path": path, "headers": headers, "app": self.app}
        asyncio.run(self.routes(scope, receive, send))
        return sent[0]["status"], sent[1]["body"]

    def ask(self, path: str, document: dict[str, Any], headers: Headers = []) -> tuple[int, dict[str, Any]]:  # noqa: B006
        """Send a request of the protocol; return the status and the JSON of the answer."""
        status, body = self.post(path, wrap_body(protocol.encode(document)), headers)
        return status, protocol.decode(unwrap_body(body))[0] if status == 200 else {"text": body.decode()}

    def register(self, key: EllipticCurvePrivateKey) -> int:
        return self.factory.state().create_node("", "", public_key_to_bytes(key.public_key()), 0)


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


def new_key() -> EllipticCurvePrivateKey:
    return generate_private_key(SECP384R1())


def sign(key: EllipticCurvePrivateKey) -> Headers:
    """Make the headers that a node signs."""
    request = httpx.Request("POST", "http://here")
    context = ProtobufRequestContext("", None, request)  # type: ignore[arg-type]
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda context: httpx.Response(200))
    return [(name.lower(), value) for name, value in request.headers.raw]


NEXT = {"working": [], "answered": [], "wait": 0.0}


def test_a_node_gets_its_id_and_a_pass_for_its_signature(superlink: SuperLink):
    key = new_key()
    node = superlink.register(key)
    status, answer = superlink.ask(protocol.WHO, {"client": "ant"}, sign(key))
    assert (status, answer["node"]) == (200, node)
    status, next_answer = superlink.ask(protocol.NEXT, {**NEXT, "pass": answer["pass"]})
    assert (status, next_answer["epoch"]) == (200, answer["epoch"])
    (entry,) = superlink.ask(protocol.STATUS, {})[1]["nodes"]
    assert (entry["node"], entry["client"]) == (node, "ant")


def test_a_key_that_is_not_registered_gets_no_pass(superlink: SuperLink):
    status, answer = superlink.ask(protocol.WHO, {"client": "ant"}, sign(new_key()))
    assert (status, answer["node"]) == (200, 0)
    assert "pass" not in answer


def test_a_wrong_signature_is_refused(superlink: SuperLink):
    key = new_key()
    superlink.register(key)
    mine, other = dict(sign(key)), dict(sign(new_key()))
    forged = {**other, b"flwr-public-key": mine[b"flwr-public-key"]}
    for headers in ({}, forged, {**mine, b"flwr-public-key": b"?"}):
        assert superlink.ask(protocol.WHO, {"client": "ant"}, list(headers.items()))[0] == 401


def test_a_pass_ends_after_a_while(superlink: SuperLink, monkeypatch: pytest.MonkeyPatch):
    key = new_key()
    superlink.register(key)
    monkeypatch.setattr(module, "PASS_SECONDS", -1.0)
    _, answer = superlink.ask(protocol.WHO, {"client": "ant"}, sign(key))
    for ticket in (answer["pass"], "", "guessed"):
        assert superlink.ask(protocol.NEXT, {**NEXT, "pass": ticket})[0] == 401
        document = {"id": "a", "code": 0, "reason": "", "pass": ticket}
        assert superlink.ask(protocol.ANSWER, document)[0] == 401


@pytest.mark.parametrize("path", [protocol.ASK, protocol.HEAR])
def test_an_app_needs_the_token_of_a_run(path: str, superlink: SuperLink):
    document = {"messages": [], "again": False, "end": [], "ids": [], "wait": 0.0}
    assert superlink.ask(path, document)[0] == 401
    assert superlink.ask(path, document, [(TASK_TOKEN_HEADER.encode(), b"guessed")])[0] == 401


@pytest.mark.parametrize("body", [b"\xff", wrap_body(b"?"), wrap_body(protocol.encode({}))])
def test_a_body_that_is_none_is_refused(body: bytes, superlink: SuperLink):
    assert superlink.post(protocol.NEXT, body)[0] == 400


def test_a_request_that_is_too_large_is_refused(superlink: SuperLink, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_BODY", 3)
    assert superlink.post(protocol.NEXT, b"four")[0] == 413


def test_other_requests_are_flowers(superlink: SuperLink):
    assert superlink.post("/v1/fleet/pull-messages", b"")[0] == 404
    assert superlink.post(f"{protocol.NODE}unknown", b"")[0] == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(("working", "answered", "wait", "id", "code", "reason", "client", "device", "version"))


@settings(max_examples=60, deadline=None)
@given(path=st.sampled_from((protocol.NEXT, protocol.ANSWER, protocol.WHO)), changes=st.dictionaries(FIELDS, JSON))
def test_whatever_a_node_with_a_key_sends_is_answered_or_refused(path: str, changes: dict[str, Any]):
    superlink, key = SuperLink(), new_key()
    superlink.register(key)
    _, answer = superlink.ask(protocol.WHO, {"client": "ant"}, sign(key))
    document = {**NEXT, "wait": 0.0, "id": "a", "code": 0, "reason": "", "client": "ant", **changes}
    if not isinstance(document["wait"], str | list | dict | type(None)) and document["wait"] > 0:
        document["wait"] = -document["wait"]  # what waits is another test's matter
    status, _ = superlink.ask(path, {**document, "pass": answer["pass"]}, sign(key))
    assert status in (200, 400)


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=64), path=st.sampled_from((protocol.NEXT, protocol.ASK, protocol.WHO)))
def test_any_bytes_are_answered_or_refused(body: bytes, path: str):
    status, _ = SuperLink().post(path, body)
    assert status in (400, 401)
    status, _ = SuperLink().post(path, wrap_body(body))
    assert status in (400, 401)


@pytest.mark.parametrize("change", [{"wait": float("nan")}, {"wait": "soon"}, {"wait": None}])
def test_a_wait_that_is_no_number_is_refused(superlink: SuperLink, change: dict[str, Any]):
    key = new_key()
    superlink.register(key)
    _, answer = superlink.ask(protocol.WHO, {"client": "ant"}, sign(key))
    assert superlink.ask(protocol.NEXT, {**NEXT, "pass": answer["pass"], **change})[0] == 400


def test_a_code_beyond_all_numbers_is_refused(superlink: SuperLink):
    key = new_key()
    superlink.register(key)
    _, answer = superlink.ask(protocol.WHO, {"client": "ant"}, sign(key))
    document = {"id": "a", "code": float("inf"), "reason": "", "pass": answer["pass"]}
    assert superlink.ask(protocol.ANSWER, document)[0] == 400
