"""What Flower does not document is as `flower_private` expects it, and no other file of the package leans on it."""

from __future__ import annotations

import argparse
import ast
import inspect
from importlib import import_module

import pytest

from grpo_fed.engines.wire.flower_private import PARENT, without_parent
from tests.test_layout import ROOT, SOURCES, imported_names

PUBLIC = ("flwr.app", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.clientapp")

PARAMETERS = {
    "flwr.common.serde:recorddict_to_proto": "recorddict",
    "flwr.common.serde:recorddict_from_proto": "recorddict_proto",
    "flwr.common.serde:message_to_proto": "message",
    "flwr.common.serde:run_from_proto": "run_proto",
    "flwr.common.serde:fab_from_proto": "fab",
    "flwr.common.config:get_fused_config_from_fab": "fab_file run",
    "flwr.app.message:remove_content_from_message": "message",
    "flwr.supercore.interceptors.http.runtime_version:RuntimeVersionHttpInterceptor": "component_name",
    "flwr.supercore.primitives.asymmetric:public_key_to_bytes": "public_key",
    "flwr.supercore.primitives.asymmetric:bytes_to_public_key": "public_key_bytes",
    "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor": "private_key public_key",
    "flwr.supernode.fleet_http_client:FleetHttpClient.from_server_address": (
        "server_address insecure root_certificates interceptors retry_invoker"
    ),
    "flwr.supernode.fleet_http_client:FleetHttpClient.RegisterNode": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.ActivateNode": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.DeactivateNode": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.SendNodeHeartbeat": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.PullMessages": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.PushMessages": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.PullObject": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.PushObject": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.ConfirmMessageReceived": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.GetRun": "self request",
    "flwr.supernode.fleet_http_client:FleetHttpClient.GetFab": "self request",
    "flwr.supercore.protobuf.client:ProtobufClient._unary_unary": (
        "self path rpc_method request response_type timeout"
    ),
    "flwr.supercore.inflatable.inflatable_object:get_object_body": "object_content cls",
    "flwr.supercore.inflatable.inflatable_object:get_object_head_values_from_object_content": "object_content",
    "flwr.supercore.inflatable.inflatable_object:iterate_object_tree": "tree",
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": (
        "object_id object_contents keep_object_contents objects"
    ),
    "flwr.supercore.inflatable.inflatable_object:get_object_tree": "obj",
    "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects": "obj",
    "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute": "",
    "flwr.supercore.inflatable.inflatable_utils:push_objects": (
        "objects push_object_fn object_ids_to_push keep_objects max_concurrent_pushes"
    ),
    "flwr.supercore.inflatable.inflatable_utils:pull_objects": (
        "object_ids pull_object_fn max_concurrent_pulls max_time max_tries_per_object initial_backoff backoff_cap"
    ),
    "flwr.supercore.inflatable.inflatable_utils:pull_and_inflate_object_from_tree": (
        "object_tree pull_object_fn confirm_object_received_fn return_type max_concurrent_pulls max_time"
        " max_tries_per_object initial_backoff backoff_cap"
    ),
    "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf": (
        "pull_object_protobuf node run_id"
    ),
    "flwr.supercore.inflatable.inflatable_protobuf_utils:make_push_object_fn_protobuf": (
        "push_object_protobuf node run_id session_id"
    ),
    "flwr.supercore.inflatable.inflatable_protobuf_utils:make_confirm_message_received_fn_protobuf": (
        "confirm_message_received_protobuf node run_id"
    ),
    "flwr.supercore.error:FlowerError.from_json": "value",
    "flwr.cli.build:build_fab_from_disk": "app",
    "flwr.common.serde:fab_to_proto": "fab",
    "flwr.common.serde:user_config_to_proto": "user_config",
    "flwr.supercore.fab:Fab": "hash_str content verifications",
    "flwr.supercore.control:ControlHttpClient.from_server_address": (
        "server_address insecure root_certificates interceptors retry_invoker"
    ),
    "flwr.supercore.control:ControlHttpClient.StartRun": "self request",
    "flwr.supercore.control:ControlHttpClient.ListRuns": "self request",
    "flwr.supercore.control:ControlHttpClient.StopRun": "self request",
    "flwr.supercore.control:ControlHttpClient.StreamLogs": "self request",
    "flwr.supercore.control:ControlHttpClient.ListNodes": "self request",
    "flwr.supercore.control:ControlHttpClient.RegisterNode": "self request",
    "flwr.supercore.control:ControlHttpClient.UnregisterNode": "self request",
    "flwr.common.args:try_obtain_flwr_app_token": "args",
    "flwr.supercore.tls:validate_and_resolve_root_certificates": "root_cert_path insecure",
    "flwr.superlink.grid:HttpGrid": "runtime_api_address insecure root_certificates token",
    "flwr.supercore.cli:flower_superexec": "",
    "flwr.superlink.cli:flwr_serverapp": "",
    "flwr.superlink.extensions:get_middleware": "",
    "flwr.superlink.cli:flower_superlink": "",
    "flwr.superlink.routers.fleet.node_auth:authenticate_node": "request",
    "flwr.supercore.dependencies.task:authenticate_task": "request token state",
    "flwr.server.superlink.linkstate:LinkState.get_node_id_by_public_key": "self public_key",
    "flwr.server.superlink.linkstate:LinkState.acknowledge_node_heartbeat": "self node_id heartbeat_interval",
    "flwr.server.superlink.linkstate:LinkState.get_task_by_token": "self token",
}
"""The parameters of what `flower_private` calls."""

NAMES = [
    "flwr.supercore.constant:FLEET_HTTP_PUBLIC_KEY_HEADER",
    "flwr.supercore.constant:TASK_TOKEN_HEADER",
    "flwr.supercore.inflatable.inflatable_utils:ObjectPullError",
    "flwr.supercore.inflatable.inflatable_utils:ObjectPushError",
    "flwr.common.constant:SubStatus.FAILED",
    "flwr.supercore.run:Run",
    "flwr.supercore.superexec.executor:subprocess_executor",
    "flwr.superlink.grid.http_grid:pull_objects",
    "flwr.superlink.grid:HttpGrid._runtime_client",
]
"""What it uses without calling it."""


def find(name: str) -> object:
    module, _, path = name.partition(":")
    found: object = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", PARAMETERS)
def test_flower_has_what_is_called_with_the_same_parameters(name: str):
    parameters = inspect.signature(find(name)).parameters  # type: ignore[arg-type]
    assert " ".join(parameters) == PARAMETERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_flower_has_what_is_used(name: str):
    assert find(name) is not None


def test_the_list_names_all_that_is_imported():
    path = SOURCES["engines.wire.flower_private"]
    listed = {name.replace(":", ".") for name in (*PARAMETERS, *NAMES)}
    used = {name for name in imported_names(path) if name.startswith("flwr.") and not name.startswith("flwr.proto.")}
    used = {name for name in used if name.rpartition(".")[0] not in PUBLIC}
    assert not {name for name in used if not any(f"{entry}.".startswith(f"{name}.") for entry in listed)}


def test_no_other_file_leans_on_what_flower_does_not_document():
    files = {
        **SOURCES,
        **{str(path.relative_to(ROOT)): path for part in ("clients", "server") for path in (ROOT / part).glob("*.py")},
    }
    others = {
        name: private
        for name, path in files.items()
        if name != "engines.wire.flower_private"
        and (private := {used for used in imported_names(path) if used.startswith("flwr.")} - _public(path))
    }
    assert not others


def _public(path: object) -> set[str]:
    """List the names that a file imports from Flower's public modules."""
    return {name for name in imported_names(path) if name.rpartition(".")[0] in PUBLIC or name in PUBLIC}  # type: ignore[arg-type]


def test_an_app_does_not_end_with_the_process_that_has_started_it():
    from flwr.common.args import add_args_flwr_app_common

    parser = argparse.ArgumentParser()
    add_args_flwr_app_common(parser)
    given = parser.parse_args(without_parent(["--insecure", PARENT, "7", "--token", "a"]))
    assert (given.parent_pid, given.insecure, given.token) == (None, True, "a")
    assert parser.parse_args(["--token", "a", PARENT, "7"]).parent_pid == 7, "Flower has the argument"
    assert without_parent(["--insecure"]) == ["--insecure"]


def test_the_superexec_starts_apps_as_processes_that_are_replaced():
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
    from flwr.supercore.superexec.executor import subprocess_executor

    from grpo_fed.engines.wire.flower_private import SERVER_APP

    assert TASK_TYPE_TO_COMMAND[TaskType.SERVER_APP] == SERVER_APP
    assert subprocess_executor.subprocess.Popen
    source = inspect.getsource(subprocess_executor.SubprocessExecutor.launch)
    assert source.count("subprocess.Popen(") == 2
    assert source.count("subprocess.") == 4, "it uses DEVNULL twice, and nothing else of that module"


def test_the_superlink_puts_our_middleware_before_its_own():
    from flwr.superlink import extensions
    from flwr.superlink import main as superlink
    from flwr.superlink.cli import flower_superlink as module

    assert superlink.extensions is extensions
    first = ast.parse(inspect.getsource(superlink._get_middleware)).body[0].body[-1].value.elts[0]  # type: ignore[attr-defined]
    assert ast.unparse(first) == "*extensions.get_middleware()"
    assert "uvicorn.run(" in inspect.getsource(import_module("flwr.superlink.cli.flower_superlink"))
    assert module is not None
    paths = {route.path for route in superlink.fleet_router.routes}
    assert paths
    assert all(path.startswith("/v1/fleet/") for path in paths)
