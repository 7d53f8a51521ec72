"""Calls of a SuperLink's Control API: what they return, and what is said if there is no SuperLink."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from flwr.proto.control_pb2 import ListNodesResponse, ListRunsResponse, StreamLogsResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run
from flwr.proto.run_pb2 import RunStatus as FlowerRunStatus

from grpo_fed.engines.flower import control as module
from grpo_fed.engines.flower.connections import SuperLinkAddress
from grpo_fed.engines.flower.control import ControlError, ListedNode, ListedRun, RunStatus, SuperLinkControl
from grpo_fed.engines.flower.superlink import find_free_port

COMPLETED = FlowerRunStatus(status="finished", sub_status="completed", details="")
LATER, EARLIER = "2026-11-28T10:00:00.123456+00:00", "2026-11-27T10:00:00+00:00"


class FakeSuperLink(ThreadingHTTPServer):
    """Answers as a SuperLink does; its first log breaks off."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                server.requests.append((self.path, body))
                status, content, media = server.answer(self.path)
                self.send_response(status)
                self.send_header("content-type", media)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        super().__init__(("127.0.0.1", 0), Handler)

    def answer(self, path: str) -> tuple[int, bytes, str]:
        protobuf = "application/protobuf"
        if path.endswith("/list-runs"):
            runs = {
                1: Run(run_id=1, status=COMPLETED, pending_at=EARLIER),
                2: Run(run_id=2, status=FlowerRunStatus(status="running"), pending_at=LATER),
            }
            if any(name.endswith("/stream-logs") for name, _ in self.requests):
                is_over = sum(name.endswith("/stream-logs") for name, _ in self.requests) > 2
                runs = {1: Run(run_id=1, status=COMPLETED if is_over else FlowerRunStatus(status="running"))}
            return 200, ListRunsResponse(run_dict=runs).SerializeToString(), protobuf
        if path.endswith("/list-nodes"):
            nodes = [
                NodeInfo(node_id=5, status="online", last_activated_at=LATER, last_deactivated_at=EARLIER),
                NodeInfo(node_id=6, status="offline", last_activated_at=LATER, last_deactivated_at=EARLIER),
                NodeInfo(node_id=7, status="registered"),
                NodeInfo(node_id=8, status="deleted"),
            ]
            return 200, ListNodesResponse(nodes_info=nodes).SerializeToString(), protobuf
        if path.endswith("/stream-logs"):
            streams = sum(name == path for name, _ in self.requests)
            if streams == 2:
                return 503, b"", "text/plain"
            part = StreamLogsResponse(log_output=f"part {streams}\n", latest_timestamp=float(streams))
            content = part.SerializeToString()
            return 200, len(content).to_bytes(4, "big") + content, "application/x-protobuf-stream"
        refusal = {"code": 1, "message": "not today", "public_details": ""}
        return 400, json.dumps(refusal).encode(), "application/json"


@pytest.fixture
def superlink() -> Iterator[FakeSuperLink]:
    with FakeSuperLink() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def control(superlink: FakeSuperLink) -> Iterator[SuperLinkControl]:
    with SuperLinkControl(SuperLinkAddress(f"127.0.0.1:{superlink.server_port}", None)) as control:
        yield control


def test_runs_are_listed_with_the_latest_first(control: SuperLinkControl):
    assert control.list_runs() == [
        ListedRun(2, RunStatus("running", "", ""), "2026-11-28 10:00:00Z"),
        ListedRun(1, RunStatus("finished", "completed", ""), "2026-11-27 10:00:00Z"),
    ]
    assert [str(run.status) for run in control.list_runs()] == ["running", "finished:completed"]


def test_nodes_are_listed_with_when_they_came_or_went(control: SuperLinkControl):
    assert control.list_nodes() == [
        ListedNode(5, "online", "2026-11-28 10:00:00Z"),
        ListedNode(6, "offline", "2026-11-27 10:00:00Z"),
        ListedNode(7, "registered", ""),
    ]


def test_a_refusal_is_said_in_the_superlinks_words(control: SuperLinkControl):
    with pytest.raises(ControlError, match=r"the SuperLink at 127\.0\.0\.1:\d+ does not stop the run: status 400"):
        control.stop(1)


def test_a_log_goes_on_after_its_superlink_was_away(control: SuperLinkControl, superlink: FakeSuperLink):
    from flwr.proto.control_pb2 import StreamLogsRequest

    items = control.follow(1)
    assert [items.get(timeout=30) for _ in range(2)] == ["part 1\n", "part 3\n"]
    assert items.get(timeout=30) == RunStatus("finished", "completed", "")
    requests = [StreamLogsRequest.FromString(body) for path, body in superlink.requests if "stream" in path]
    assert [request.after_timestamp for request in requests] == [0.0, 1.0, 1.0], "each part is asked for once"


def test_a_superlink_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    address = f"127.0.0.1:{find_free_port()}"
    with SuperLinkControl(SuperLinkAddress(address, None)) as control:
        with pytest.raises(ControlError, match=f"the SuperLink at {address} does not list its runs: no connection"):
            control.list_runs()
        item = control.follow(1).get(timeout=30)
    assert isinstance(item, ControlError)
    assert f"the SuperLink at {address} is out of reach" in str(item)
