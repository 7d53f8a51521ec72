"""The parts of Flower that it does not document: no other file of the package imports them.

Flower may change these with any version, so `tests/engines/test_flower_private.py` names every one of them and fails if
it is gone or takes other arguments. Four programs lean on them:

- all: a message's content as bytes, and messages outside of a run;
- a client's node: Flower's Fleet API, and further requests that are signed like Flower's own;
- the server: the SuperLink's keys and tokens for further requests, how server apps are started, and the connection of
  such an app;
- what starts a run: the Control API, which `flwr` calls too.

What a program does not need is imported only where it is called.

Over 400 lines: that all of this is in one file is what the file is for.
"""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, final

import numpy as np
from flwr.app import DEFAULT_TTL, Error, Message, Metadata, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.run import Run
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.wrappers_pb2 import BytesValue  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from flwr.serverapp import Grid

__all__ = [
    "ConfirmMessageReceivedRequest",
    "DecodeError",
    "NodeInfo",
    "ObjectPullError",
    "ObjectPushError",
    "ObjectTree",
    "PullAppMessagesRequest",
    "Run",
    "get_object_body",
    "get_object_head_values_from_object_content",
    "inflate_object_from_contents",
    "iterate_object_tree",
    "make_pull_object_fn_protobuf",
    "pull_objects",
]

RUN, SERVER = 1, 0
"""The ids of the run and of the server's node in a federation without Flower's processes."""
HEARTBEAT = 30.0
"""Seconds: a node counts as offline after twice as long without a sign of life."""
FIRST_BACKOFF, LONGEST_BACKOFF = 0.02, 0.5
"""Seconds before an object that is not there yet is asked for again; Flower's own are 1 and 10."""

Result = TypeVar("Result")

_ids = itertools.count(1)

# Messages ------------------------------------------------------------------------------------------------------------


def pack(content: RecordDict) -> np.ndarray:
    """Pack records into [n] uint8."""
    return np.frombuffer(recorddict_to_proto(content).SerializeToString(), np.uint8)


def unpack(array: np.ndarray) -> RecordDict:
    """Unpack what `pack` packed."""
    return recorddict_from_proto(RecordDictProto.FromString(array.tobytes()))


def make_message(content: RecordDict, kind: str, node: int, group: str = "", ttl: float | None = None) -> Message:
    """Make a message of type `kind` to a node, with an id that no other message of this process has.

    Flower makes messages in a process that was given a task of a run, and its link numbers them. A federation in one
    process has neither.
    """
    metadata = Metadata(
        run_id=RUN,
        message_id=str(next(_ids)),
        src_node_id=SERVER,
        dst_node_id=node,
        reply_to_message_id="",
        group_id=group,
        created_at=time.time(),
        ttl=DEFAULT_TTL if ttl is None else ttl,
        message_type=kind,
    )
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload, no-any-return]


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message an id, as Flower's grid does when it pushes it."""
    message.metadata.__dict__["_message_id"] = message_id


# A client's node -----------------------------------------------------------------------------------------------------


class NoConnectionError(OSError):
    """The SuperLink does not answer; the text says why. It may come back."""


class RefusedError(RuntimeError):
    """The SuperLink does not accept the node or its request; the text says why."""

    def __init__(self, text: str, status: int = 0) -> None:
        """status: of the HTTP answer."""
        super().__init__(text)
        self.status = status


class NoRouteError(RefusedError):
    """The SuperLink does not know such a request: it was not started by grpo_fed."""


class RunOverError(RefusedError):
    """The run that a request is about has ended."""


@final
class NodeConnection:
    """A node's connection to a SuperLink: Flower's Fleet API, and further requests that the node's key signs.

    The methods raise NoConnectionError and RefusedError. They may be called from several threads.
    """

    def __init__(self, superlink: str, authority: Path | None, key: EllipticCurvePrivateKey) -> None:
        """superlink: HOST:PORT. authority: the certificate that signed the SuperLink's; None for no encryption."""
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        self._public_key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            superlink,
            authority is None,
            None if authority is None else authority.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        self.node = 0
        """The node's id, once it is known."""

    def request(self, path: str, body: bytes, timeout: float) -> bytes:
        """Send one of our own requests, and return what is answered; NoRouteError if the SuperLink has none."""
        return _call(lambda: _request(self._client, path, body, timeout))

    def register(self) -> None:
        """Register the node's key; RefusedError if it is registered already, or if nodes may not do that."""
        from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest

        _call(lambda: self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._public_key)))

    def activate(self) -> None:
        """Sign on; RefusedError if the key is not registered, or if the node has not been offline yet."""
        from flwr.proto.fleet_pb2 import ActivateNodeRequest

        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT)
        self.node = int(_call(lambda: self._client.ActivateNode(request)).node_id)

    def deactivate(self) -> None:
        """Sign off."""
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        _call(lambda: self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node)))

    def send_heartbeat(self) -> None:
        """Give a sign of life."""
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
        from flwr.proto.node_pb2 import Node

        request = SendNodeHeartbeatRequest(node=Node(node_id=self.node), heartbeat_interval=HEARTBEAT)
        if not _call(lambda: self._client.SendNodeHeartbeat(request)).success:
            raise RefusedError("the SuperLink no longer knows this node")

    def pull(self) -> Message | None:
        """Return a message to this node that Flower has; None if it has none, or if its run has ended."""
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_protobuf_utils import (
            make_confirm_message_received_fn_protobuf,
            make_pull_object_fn_protobuf,
        )
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        node = Node(node_id=self.node)
        pulled = _call(lambda: self._client.PullMessages(PullMessagesRequest(node=node)))
        if not pulled.messages_list:
            return None
        metadata, tree = pulled.messages_list[0].metadata, pulled.message_object_trees[0]
        message: Message = _call(
            lambda: pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._client.PullObject, node, metadata.run_id),
                make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, metadata.run_id),
                return_type=Message,
                initial_backoff=FIRST_BACKOFF,
                backoff_cap=LONGEST_BACKOFF,
            )
        )
        set_message_id(message, metadata.message_id)
        return message

    def push(self, reply: Message) -> None:
        """Send the reply to a message that `pull` returned; RunOverError if the run no longer wants it."""
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        node = Node(node_id=self.node)
        with no_object_id_recompute():
            set_message_id(reply, reply.object_id)
            head = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(head)],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            pushed = _call(lambda: self._client.PushMessages(request))
            push = make_push_object_fn_protobuf(self._client.PushObject, node, reply.metadata.run_id, pushed.session_id)
            _call(
                lambda: push_objects(
                    get_all_nested_objects(reply), push, object_ids_to_push=set(pushed.objects_to_push)
                )
            )

    def read_run_config(self, run: int) -> dict[str, Any]:
        """Return a run's configuration, with its app's defaults; RunOverError if the run has ended."""
        from flwr.common.config import get_fused_config_from_fab
        from flwr.common.serde import fab_from_proto, run_from_proto
        from flwr.proto.fab_pb2 import GetFabRequest
        from flwr.proto.node_pb2 import Node
        from flwr.proto.run_pb2 import GetRunRequest

        node = Node(node_id=self.node)
        info = run_from_proto(_call(lambda: self._client.GetRun(GetRunRequest(node=node, run_id=run))).run)
        request = GetFabRequest(node=node, hash_str=info.fab_hash, run_id=run)
        fab = fab_from_proto(_call(lambda: self._client.GetFab(request)).fab)
        return dict(get_fused_config_from_fab(fab.content, info))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _request(client: Any, path: str, body: bytes, timeout: float) -> bytes:
    """Send one of our own requests through a client of Flower's, with what that adds to a request."""
    answer = client._unary_unary(
        path=path,
        rpc_method=path,
        request=BytesValue(value=body),
        response_type=BytesValue,
        timeout=timeout,
    )
    return bytes(answer.value)


def _call(call: Callable[[], Result]) -> Result:
    """Return what a call returns, with errors of our own for those of httpx."""
    import httpx
    from flwr.supercore.error import FlowerError

    try:
        return call()
    except (ObjectPullError, ObjectPushError, httpx.TransportError) as error:
        raise NoConnectionError(f"no connection, {type(error).__name__}: {error}") from error
    except httpx.HTTPStatusError as error:
        code, text = error.response.status_code, error.response.text
        known = FlowerError.from_json(text)
        reason = text.strip()[:200] if known is None else known.message
        if code in (429, 502, 503, 504):
            raise NoConnectionError(f"status {code}: {reason}") from error
        kind = {403: RunOverError, 404: NoRouteError}.get(code, RefusedError)
        raise kind(f"status {code}: {reason}", code) from error


def send_request(superlink: str, authority: Path | None, path: str, body: bytes, timeout: float = 10.0) -> bytes:
    """Send one of our own requests from the SuperLink's machine, which needs no proof of who sends it."""
    from flwr.supercore.protobuf.client import ProtobufClient

    certificates = None if authority is None else authority.read_bytes()
    with ProtobufClient.from_server_address(superlink, authority is None, certificates, interceptors=()) as client:
        return _call(lambda: _request(client, path, body, timeout))


MEDIA_TYPE = b"application/protobuf"
"""Of the bodies of requests and answers."""


def wrap_body(content: bytes) -> bytes:
    """Make the body of a request of ours, or of the answer to one: Flower's clients send protobuf alone."""
    return bytes(BytesValue(value=content).SerializeToString())


def unwrap_body(body: bytes) -> bytes:
    """Return the content of a body; ValueError if it is none."""
    try:
        return bytes(BytesValue.FromString(body).value)
    except DecodeError as error:
        raise ValueError(f"no protobuf: {error}") from None


# The SuperLink -------------------------------------------------------------------------------------------------------


def run_superlink(arguments: Sequence[str], middleware: Sequence[Callable[..., Any]], **options: Any) -> None:
    """Run `flower-superlink` with these arguments in this process, behind further middleware, outermost first.

    options: further ones of `uvicorn.run`.
    """
    import uvicorn
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    make: Callable[[Any], Middleware] = Middleware
    flowers_own, run = extensions.get_middleware, uvicorn.run
    extensions.get_middleware = lambda: (*map(make, middleware), *flowers_own())
    uvicorn.run = lambda *args, **kwargs: run(*args, **{**kwargs, **options})
    sys.argv = ["flower-superlink", *arguments]
    flower_superlink()


GET_RUN = "/v1/fleet/get-run"
"""The path by which a node asks for a run and its configuration."""
OWN_CLIENT, ALL_CLIENTS = "own_client", "*"
"""The key of a node's configuration with the client for which the scenario was made; its value for all clients."""


def replace_scenario(body: bytes, replace: Callable[[str], str], client: str | None) -> bytes:
    """Rewrite the scenario of the run in the answer to a node's question for it, and name the client it is for."""
    from flwr.proto.run_pb2 import GetRunResponse

    answer = GetRunResponse.FromString(body)
    config = answer.run.override_config
    if "scenario" in config:
        config["scenario"].string = replace(config["scenario"].string)
        config[OWN_CLIENT].string = client or ""
    return bytes(answer.SerializeToString())


@final
class SuperLinkState:
    """What a SuperLink knows of nodes and runs. It is read from its database, so call this in a thread."""

    def __init__(self, app: Any) -> None:
        """app: Flower's, which a request's scope names."""
        self._factory = app.state.linkstate_factory

    def find_node(self, headers: list[tuple[bytes, bytes]]) -> int | None:
        """Return the id of the node that signed a request; None if its key is not registered.

        PermissionError if the signature is missing, wrong or old.
        """
        from base64 import b64decode

        from fastapi import HTTPException, Request
        from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
        from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
        from flwr.superlink.routers.fleet.node_auth import authenticate_node

        request = Request({"type": "http", "headers": headers, "state": {}})
        try:
            key = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            request.state.protobuf_request = RegisterNodeFleetRequest(public_key=key)
            authenticate_node(request)
        except (HTTPException, KeyError, ValueError) as error:
            raise PermissionError("the node's signature is not valid") from error
        node = self._factory.state().get_node_id_by_public_key(key)
        return None if node is None else int(node)

    def note_sign_of_life(self, node: int) -> None:
        """Note that a node is online."""
        self._factory.state().acknowledge_node_heartbeat(node, HEARTBEAT)

    def find_run(self, headers: list[tuple[bytes, bytes]]) -> int | None:
        """Return the run whose app sent a request; None if its token is not, or no longer, valid."""
        from fastapi import Request
        from flwr.supercore.constant import TASK_TOKEN_HEADER
        from flwr.supercore.dependencies.task import authenticate_task
        from flwr.supercore.error import FlowerError

        request = Request({"type": "http", "headers": headers})
        try:
            task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), self._factory.state())
        except FlowerError:
            return None
        return int(task.run_id)


def run_superexec(arguments: Sequence[str], start_server_app: Callable[[Sequence[str]], object]) -> None:
    """Run `flower-superexec` with these arguments in this process; server apps are started by a call.

    start_server_app: is called with the arguments of `flwr-serverapp`. Flower starts the other kinds of apps.
    """
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec.executor import subprocess_executor

    def start(command: Sequence[str], **options: Any) -> object:
        if command[0] == SERVER_APP:
            return start_server_app(without_parent(command[1:]))
        return subprocess.Popen(command, **options)

    replaced: Any = subprocess_executor
    replaced.subprocess = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
    sys.argv = ["flower-superexec", *arguments]
    flower_superexec()


def without_parent(arguments: Sequence[str]) -> list[str]:
    """Leave out the process whose end would interrupt an app: the app survives a SuperExec that was killed.

    The supervisor ends both when their owner ends.
    """
    kept = list(arguments)
    if PARENT in kept:
        place = kept.index(PARENT)
        del kept[place : place + 2]
    return kept


PARENT = "--parent-pid"
"""An app's argument: the process after whose end the app ends."""
SERVER_APP = "flwr-serverapp"
"""Flower's command that runs a server's app."""


def run_server_app(arguments: Sequence[str]) -> None:
    """Run `flwr-serverapp` with these arguments in this process."""
    from flwr.superlink.cli import flwr_serverapp

    sys.argv = [SERVER_APP, *arguments]
    flwr_serverapp()


def report_lost_app(arguments: Sequence[str], details: str) -> None:
    """Tell the SuperLink that the run of an app has failed, whose process has ended without a word.

    arguments: those of `flwr-serverapp`. NoConnectionError and RefusedError if the SuperLink does not take it; then it
    finds out by itself, after a minute without a sign of life.
    """
    from flwr.common.args import try_obtain_flwr_app_token
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import PushTaskOutputRequest
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.superlink.grid import HttpGrid

    module = import_module("flwr.superlink.cli.flwr_serverapp")
    given = module._parse_args_run_flwr_serverapp().parse_args(arguments)
    grid = HttpGrid(
        runtime_api_address=given.runtime_api_address,
        insecure=given.insecure,
        root_certificates=validate_and_resolve_root_certificates(given.root_certificates, given.insecure),
        token=try_obtain_flwr_app_token(given),
    )
    try:
        request = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details)
        client = copy.copy(grid._runtime_client)
        client._retry_invoker = None
        _call(lambda: client.PushTaskOutput(request))
    finally:
        grid.close()


# What starts a run ---------------------------------------------------------------------------------------------------


@final
class ControlConnection:
    """A connection to a SuperLink's Control API. The methods raise NoConnectionError and RefusedError."""

    def __init__(self, superlink: str, authority: Path | None) -> None:
        """superlink: HOST:PORT. authority: the certificate that signed the SuperLink's; None for no encryption."""
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            superlink,
            authority is None,
            None if authority is None else authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def start_run(self, bundle: bytes, run_config: Mapping[str, Any], simulation: Mapping[str, float]) -> int:
        """Start a run of an app, and return its id.

        bundle: from `build_bundle`. simulation: settings of Flower's simulation; empty without one.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.federation_config_pb2 import SimulationConfig
        from flwr.supercore.fab import Fab

        request = StartRunRequest(
            fab=fab_to_proto(Fab(sha256(bundle).hexdigest(), bundle, {})),
            override_config=user_config_to_proto(dict(run_config)),
            override_federation_config=SimulationConfig(**dict[str, Any](simulation)) if simulation else None,
        )
        answer = _call(lambda: self._client.StartRun(request))
        if not answer.HasField("run_id"):
            raise RefusedError(f"no run was started: {answer.note or 'without a reason'}")
        return int(answer.run_id)

    def list_runs(self, run: int | None = None) -> list[Run]:
        """Return the latest runs, or one."""
        from flwr.common.serde import run_from_proto
        from flwr.proto.control_pb2 import ListRunsRequest

        answer = _call(lambda: self._client.ListRuns(ListRunsRequest(run_id=run)))
        return [run_from_proto(entry) for entry in answer.run_dict.values()]

    def stop_run(self, run: int) -> None:
        """Stop a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        if not _call(lambda: self._client.StopRun(StopRunRequest(run_id=run))).success:
            raise RefusedError(f"run {run} could not be stopped")

    def stream_log(self, run: int, after: float) -> Iterator[tuple[str, float]]:
        """Yield the parts of a run's log, each with its time, until the run has ended.

        after: the time of the last part that is known.
        """
        from flwr.proto.control_pb2 import StreamLogsRequest

        parts = self._client.StreamLogs(StreamLogsRequest(run_id=run, after_timestamp=after))
        while (part := _call(lambda: next(parts, None))) is not None:
            yield part.log_output, part.latest_timestamp

    def list_nodes(self) -> list[NodeInfo]:
        """Return all nodes that were not unregistered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        nodes = _call(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        return [node for node in nodes if node.status not in ("deleted", "unregistered")]

    def list_keys(self) -> dict[bytes, int]:
        """Return the ids of these nodes by their public keys, in the format of OpenSSH."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
        from flwr.supercore.primitives.asymmetric import bytes_to_public_key

        form = Encoding.OpenSSH, PublicFormat.OpenSSH
        nodes = [node for node in self.list_nodes() if node.public_key]
        return {bytes_to_public_key(node.public_key).public_bytes(*form): node.node_id for node in nodes}

    def register_node(self, public_key: bytes, name: str) -> int:
        """Accept a node by its public key in the format of OpenSSH, and return its id."""
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
        from flwr.proto.control_pb2 import RegisterNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        key: Any = load_ssh_public_key(public_key)
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name)
        return int(_call(lambda: self._client.RegisterNode(request)).node_id)

    def unregister_node(self, node: int) -> None:
        """Accept a node no longer."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        _call(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node)))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def build_bundle(app: Path) -> bytes:
    """Return an app's folder as the archive that a SuperLink takes."""
    from flwr.cli.build import build_fab_from_disk

    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # it uses an old pattern of pathspec
        return bytes(build_fab_from_disk(app))


# A server's app ------------------------------------------------------------------------------------------------------


@final
class AppConnection:
    """The connection of a server's app to its SuperLink, for further requests with the token of its run."""

    @staticmethod
    def is_possible(grid: Grid) -> bool:
        """Return whether a grid is a connection to a SuperLink."""
        from flwr.superlink.grid import HttpGrid

        return isinstance(grid, HttpGrid)

    def __init__(self, grid: Any) -> None:
        self._client = copy.copy(grid._runtime_client)
        self._client._retry_invoker = None  # it begins with a pause of a second

    def request(self, path: str, body: bytes, timeout: float) -> bytes:
        """Send a request, and return what is answered; raises as the methods of `NodeConnection` do."""
        return _call(lambda: _request(self._client, path, body, timeout))


def shorten_backoffs() -> None:
    """Let Flower's grid ask again soon for an object that a node is still sending."""
    from flwr.supercore.inflatable.inflatable_utils import pull_objects
    from flwr.superlink.grid import http_grid

    http_grid.pull_objects = partial(  # type: ignore[attr-defined]
        pull_objects, initial_backoff=FIRST_BACKOFF, backoff_cap=LONGEST_BACKOFF
    )


def make_reply(message_id: str, message: Message, content: RecordDict | Error) -> Message:
    """Make the reply to a message that was sent under this id."""
    metadata = message.metadata
    reply = Metadata(
        run_id=metadata.run_id,
        message_id="",
        src_node_id=metadata.dst_node_id,
        dst_node_id=metadata.src_node_id,
        reply_to_message_id=message_id,
        group_id=metadata.group_id,
        created_at=time.time(),
        ttl=metadata.ttl,
        message_type=metadata.message_type,
    )
    parts = {"error": content} if isinstance(content, Error) else {"content": content}
    return Message(metadata=reply, **parts)  # type: ignore[call-overload, no-any-return]
