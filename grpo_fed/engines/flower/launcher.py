"""Two processes that import once what the processes of a federation need, and fork them.

The SuperLink, what starts apps for it, the node, its workers and the server's app import Flower, and most of them
torch: some fourteen seconds of processor time if each does so by itself. The launcher forks the first three as soon as
Flower is imported; a second process imports torch meanwhile, and then forks workers and server apps. Both have one
thread and no connection, so all that they hand on is what they have imported.

`python -m grpo_fed.engines.flower.launcher` is started by the supervisor, with a socket as its standard input. There it
is asked for programs, one after another, and again for one that has ended: a SuperLink or a node that was killed is
back at once, even on a busy machine, where starting a command may take longer than a node may be silent.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from grpo_fed.engines.workers import fork_server
from grpo_fed.runs.library_warnings import join_process

PROGRAMS = {
    "grpo_fed.engines.flower.access": ("flwr.superlink.cli", "flwr.superlink.main"),
    "grpo_fed.engines.flower.superexec": ("flwr.supercore.cli",),
    "grpo_fed.engines.resident.host": ("grpo_fed.engines.resident.client", "grpo_fed.engines.resident.run_configs"),
}
"""By the module of a program, what it imports; the module has a `main` that takes arguments and a socket."""
SERVER_APP_NEEDS = (
    "flwr.serverapp",
    "flwr.superlink.cli",
    "grpo_fed.engines.flower.admission",
    "grpo_fed.engines.flower.app_folder",
    "grpo_fed.engines.flower.discovery",
    "grpo_fed.engines.flower.log_channel",
    "grpo_fed.engines.flower.superlink",
    "grpo_fed.engines.flower.superlink_grid",
    "grpo_fed.engines.wire.flower_private",
    "grpo_fed.engines.wire.registry",
    "grpo_fed.engines.wire.transport",
    "grpo_fed.federation.rounds",
    "grpo_fed.runs.folder",
    "grpo_fed.runs.records",
    "grpo_fed.scenario.newcomers",
    "grpo_fed.scenario.scenario",
)
"""What a server's app imports; its own module comes with the run."""
APPS, WORKERS = b"a", b"w"
"""What is asked for at a socket: server apps or workers."""
LINKS = {"grpo_fed.engines.flower.superexec": APPS, "grpo_fed.engines.resident.host": WORKERS}
"""By the module of a program, what it asks for."""
MOST_BYTES = 1 << 16
"""The most bytes of a request."""
PR_SET_NAME = 15
SERVER_APP = "flwr-serverapp"
"""What a process that runs a server's app is called, as with Flower."""


def main() -> None:
    """Fork the process that forks workers and apps, and programs, until the supervisor is gone."""
    control = socket.socket(fileno=os.dup(0))
    join_process()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(fork_server.ONE_THREAD)
    forks = fork_server_of(*SERVER_APP_NEEDS, fork_server.PRELOADED, close=control.close)
    while data := control.recv(MOST_BYTES):
        request = json.loads(data)
        module = request["module"]
        for name in (*PROGRAMS[module], module):
            import_module(name)
        freeze()
        link = make_link(forks, LINKS[module]) if module in LINKS else None
        pid = fork_away(lambda request=request, link=link: _run_program(request, link, [control, forks]))  # type: ignore[misc]
        if link is not None:
            link.close()
        control.send(json.dumps({"name": request["name"], "pid": pid}).encode())


def fork_server_of(*modules: str, close: Callable[[], object] = lambda: None) -> socket.socket:
    """Fork a process that imports modules, and then forks server apps and workers; return the socket for `make_link`.

    close: is called in that process, to close what is not its own.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve_links() -> None:
        close()
        ours.close()
        serve(theirs, modules)

    fork_away(serve_links)
    theirs.close()
    return ours


def make_link(forks: socket.socket, kind: bytes) -> socket.socket:
    """Return a new socket at which server apps or workers can be asked for; that for others before stays as it is."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, suppress(OSError):  # if the process has died, the new socket says so
        socket.send_fds(forks, [kind], [theirs.fileno()])
    return ours


def serve(control: socket.socket, modules: Sequence[str]) -> None:
    """Import what apps and workers need, and fork them until nobody is left who could ask for one.

    control: brings the sockets at which they are asked for.
    """
    for name in modules:
        import_module(name)
    freeze()
    links: dict[socket.socket, bytes] = {control: b""}
    """By the socket, what is asked for."""

    def close() -> None:
        for link in links:
            link.close()

    while links:
        for link in select.select([*links], [], [])[0]:
            if link is control:
                is_open = _receive_link(control, links)
            elif links[link] == WORKERS:
                is_open = fork_server.answer(link, close)
            elif is_open := bool(request := link.recv(MOST_BYTES)):
                fork_away(lambda request=request: _run_app(json.loads(request), close))  # type: ignore[misc]
            if not is_open:
                del links[link]
                link.close()


def _receive_link(control: socket.socket, links: dict[socket.socket, bytes]) -> bool:
    """Add a socket to the links; return False if there will be no more."""
    kind, handles, *_ = socket.recv_fds(control, 1, 1)
    if not kind:
        return False
    if kind == WORKERS and WORKERS not in links.values():
        _reap_orphans()
    links[socket.socket(fileno=handles[0])] = kind
    return True


def _reap_orphans() -> None:
    """Reap the workers of a node that was killed, which end with it: the next one does not know them."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def freeze() -> None:
    """Keep the garbage collections of forked processes from copying every page that they share."""
    gc.collect()
    gc.freeze()


def fork_away(call: Callable[[], object]) -> int:
    """Call something in a new process that this one does not have to wait for, and return its id."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        os.close(reader)
        if (pid := os.fork()) == 0:
            os.close(writer)
            run_and_exit(call)
        os.write(writer, str(pid).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(between, 0)
    with os.fdopen(reader) as answer:
        return int(answer.read())


def rename_process(command: Sequence[str]) -> None:
    """Let the system list this process by another command, as far as that fits in the place of the first one."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, Path(command[0]).name.encode(), 0, 0, 0)
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    if begin:
        text = b"\0".join(word.encode() for word in command)[: end - begin - 1]
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _run_program(request: Mapping[str, Any], link: socket.socket | None, others: Sequence[socket.socket]) -> None:
    """Run a program in this process, which is a new one. others: sockets that are not its own."""
    for other in others:
        other.close()
    os.setsid()
    os.chdir(request["folder"])
    with Path(request["log"]).open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    rename_process([sys.executable, "-m", request["module"]])
    import_module(request["module"]).main(request["arguments"], link)


def _run_app(arguments: Sequence[str], close: Callable[[], object]) -> None:
    """Run a server's app in a fork of this process, and report one that is killed: Flower would wait for a minute."""
    from grpo_fed.engines.wire.flower_private import NoConnectionError, RefusedError, report_lost_app, run_server_app

    close()
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        rename_process([SERVER_APP])
        run_and_exit(lambda: run_server_app(arguments))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        with suppress(NoConnectionError, RefusedError):
            report_lost_app(arguments, f"the run's process was ended by {signal.Signals(-code).name}")


def run_and_exit(call: Callable[[], object]) -> NoReturn:
    """Call something and end this process, which must never return into what it was forked from.

    Python's own end would first take apart all that was imported, which on a busy machine takes longer than the rest.
    """
    code = 1
    try:
        call()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001, see above
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
