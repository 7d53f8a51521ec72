"""Shows tracked runs in MLflow's pages: starts a light `mlflow server` on a free port and opens the right page."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo_fed.runs.folder import TRACKING
from grpo_fed.runs.tracking.guard import PATIENCE as GUARD_PATIENCE
from grpo_fed.runs.tracking.spool import SendState, Spool
from grpo_fed.runs.tracking.store import Store, resolve_store
from grpo_fed.runs.tracking.tracker import QUIET, page_link, store_of_run

HOST = "127.0.0.1"
PATIENCE = 120.0
"""Seconds that a server may take to start: it first migrates the database of an older MLflow."""


@dataclass(frozen=True)
class MlflowPages:
    """Describes a server that shows MLflow's pages."""

    address: str
    """The server's address."""
    link: str
    """The address of the page that the user asked for."""
    server: subprocess.Popen[bytes] | None
    """The process that we have started; None if the store is a server itself."""


def serve(
    run: Path | None = None,
    uri: str | None = None,
    port: int | None = None,
    browse: bool = True,
    say: Callable[[str], None] = print,
    from_run: bool = False,
) -> int:
    """Show a run, or the latest of a store, until Ctrl-C or the server's end; return the exit code.

    run: the run's folder. browse: whether to open a browser. say: prints a line. from_run: as for `store_of_run`.
    ValueError if there is nothing to show, RuntimeError if the server does not start.
    """
    with open_pages(run, uri, port, from_run) as pages:
        say(pages.link)
        if browse and _has_screen():
            webbrowser.open(pages.link)
        if pages.server is None:
            return 0
        say("Ctrl-C ends it.")
        with contextlib.suppress(KeyboardInterrupt):
            return pages.server.wait()
        return 0


@contextlib.contextmanager
def open_pages(
    run: Path | None = None, uri: str | None = None, port: int | None = None, from_run: bool = False
) -> Iterator[MlflowPages]:
    """Run the server that shows the pages while the context lasts; arguments and errors as for `serve`."""
    sent = None if run is None else _read_send_state(run)
    store = resolve_store(uri)
    if store is None and not (run is not None and from_run and uri is None):
        raise ValueError("there is nothing to show with tracking off; name a tracking URI")
    if run is not None and uri is None:
        store = store_of_run(store, None, Spool(run), from_run)
    assert store is not None, "there is one, or an error"
    if sent is None:
        sent = _latest(store)
    if store.page is not None:
        yield MlflowPages(store.page, _link(store.page, sent, run), None)
        return
    if store.file is not None and not store.file.is_file():
        raise ValueError(f"{store.file}: no run was tracked there yet; begin with grpo-fed run, or name a RUN")
    port = _free_port() if port is None else port
    address = f"http://{HOST}:{port}"
    with _server(store, port, address) as server:
        yield MlflowPages(address, _link(address, sent, run), server)


@contextlib.contextmanager
def _server(store: Store, port: int, address: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `mlflow server` with one worker and no jobs, which takes a tenth of the time and memory of its default."""
    command = [sys.executable, "-P", "-m", "grpo_fed.runs.tracking.guard"]
    command += [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    if store.artifacts is not None:
        command += ["--default-artifact-root", store.artifacts.as_uri()]
    environment = {**os.environ, **QUIET, **store.environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
    environment["PYTHONPATH"] = path  # as of the process that sends
    environment["MLFLOW_BACKEND_STORE_URI"] = store.environment["MLFLOW_TRACKING_URI"]  # no password on a command line
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + PATIENCE
            while not _is_ready(f"{address}/health"):
                if server.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    tail = log.read()[-2000:].decode(errors="replace").strip()
                    raise RuntimeError(f"mlflow server does not start on port {port}:\n{tail}")
                time.sleep(0.1)
            yield server
        finally:
            _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and the processes that it has started: the guard ends them when its input is closed."""
    assert server.stdin is not None
    server.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(2 * GUARD_PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _read_send_state(run: Path) -> SendState:
    """Read what has been sent of a run; ValueError if nothing of it was tracked."""
    spool = Spool(run)
    if not spool.sent_path.is_file():
        problem = "no run of it was tracked" if run.is_dir() else "there is no such folder"
        raise ValueError(f"{run}: {problem}, or it has not reached MLflow yet: there is no {TRACKING}/sent.json in it")
    return spool.load_state("")


def _latest(store: Store) -> SendState | None:
    """Find the latest run that was tracked to a database, among the run folders beside it."""
    if store.file is None:
        return None
    paths = sorted(store.file.parent.glob(f"*/{TRACKING}/sent.json"), key=lambda path: path.stat().st_mtime)
    states = [Spool(path.parent.parent).load_state("") for path in reversed(paths)]
    return next((sent for sent in states if sent.store == store.uri and sent.parent is not None), None)


def _link(address: str, sent: SendState | None, run: Path | None) -> str:
    """Make the link to a run's page, or else to its experiment's charts, or else to all experiments."""
    if sent is None or sent.experiment is None:
        return f"{address}/#/experiments?workflowType=machine_learning"
    if run is not None and (link := page_link(address, sent)) is not None:
        return link
    query = "compareRunsMode=CHART&viewStateShareKey=federation&workflowType=machine_learning"
    return f"{address}/#/experiments/{sent.experiment}/runs?{query}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _has_screen() -> bool:
    """Return whether there is a screen; without one a text browser would take the terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
