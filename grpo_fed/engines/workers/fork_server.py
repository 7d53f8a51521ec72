"""Worker processes, forked from a fork server: a process that has imported all that a worker needs, and stays idle.

The fork server imports while this process imports too, so the first worker is ready early. A further worker, or one
that replaces a worker that has died, costs milliseconds. The fork server is a fresh process, not a fork of this one, so
it does not matter which threads, devices or locks this process has. The fork server and the workers end with this
process, even if it is killed, because the other ends of their sockets are closed then. They ignore Ctrl-C; this process
stops them. What a client's environment has started ends with its worker: the fork server adopts it and kills it.

This module imports the standard library alone but for `orphans.py` and `output.py`, because `preload` is called before
anything else is imported.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Any, ClassVar, final

from grpo_fed.engines.workers.orphans import adopt_orphans, end_descendants
from grpo_fed.engines.workers.output import WorkerOutput

PRELOADED = "grpo_fed.engines.workers.handler"
"""The module that imports all that a worker needs."""
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""Environment variables that keep a worker to one thread: the matrices are small, and every core has a worker."""
ENTRY = """import sys
sys.path[:] = sys.argv[2:]
from grpo_fed.engines.workers.fork_server import serve
serve(int(sys.argv[1]))
"""
"""The program of the fork server; its arguments are the socket's file descriptor and the `sys.path` to import with."""
FORK, REAP = b"f", b"r"
"""What the fork server can be asked: to fork a worker, or to reap one. A worker gets what is sent along: its socket and
the end of a pipe that it prints to."""
REQUEST, REPLY = struct.Struct("<cq"), struct.Struct("<q")
"""A request is FORK or REAP and a process id; a reply is a process id, an exit status, or an error number below 0."""
OUT_OF_MEMORY_HINT = ", perhaps because memory ran out"
STOP_SECONDS = 5.0
"""Seconds that the fork server has to end what its workers have started."""


def preload() -> None:
    """Start the fork server now, so that it imports while this process imports too."""
    if is_possible():
        _ForkServer.running()


def attach(link: socket.socket) -> None:
    """Use a fork server that another process has started, by a socket at whose other end it calls `answer`."""
    _ForkServer.attach(link)


def is_possible() -> bool:
    """Return whether this system can have workers: libraries of macOS do not survive a fork, and Windows has none."""
    return sys.platform == "linux"


@final
class Worker:
    """A process with one thread that answers requests, and a socket to it. What it prints goes to stderr, limited."""

    def __init__(self) -> None:
        """Fork a worker. Raises RuntimeError if that is impossible."""
        self._fork_server = _ForkServer.running()
        self.link, worker_end = socket.socketpair()
        self._output = WorkerOutput()
        with worker_end, self._output.end() as output:
            self.pid = self._fork_server.fork(worker_end, output)

    def close(self) -> str:
        """Kill the worker if it is still alive, and say how its process ended."""
        how = self._fork_server.reap(self.pid)
        self.link.close()
        self._output.wait()
        return how


@final
class _ForkServer:
    """The process that workers are forked from."""

    _running: ClassVar[_ForkServer | None] = None

    @classmethod
    def running(cls) -> _ForkServer:
        """Return the fork server of this process; start one if there is none yet, or if it has died."""
        if cls._running is not None and not cls._running.is_alive:
            cls.stop()
        if cls._running is None:
            cls._running = cls()
        return cls._running

    @classmethod
    def stop(cls) -> None:
        """Stop the fork server of this process, if there is one."""
        if cls._running is not None:
            cls._running._close()
            cls._running = None

    @classmethod
    def attach(cls, control: socket.socket) -> None:
        """Use one that runs already; if it dies, another one is started."""
        cls._running = cls(control)

    def __init__(self, control: socket.socket | None = None) -> None:
        self._owner, self._lock = os.getpid(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_forked = False
        if control is not None:
            self._control = control
        else:
            self._start()

    def _start(self) -> None:
        self._control, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A blocked signal stays blocked in a new process, from its first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with server_end:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", ENTRY, str(server_end.fileno()), *sys.path],
                    pass_fds=[server_end.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what an environment prints must not mix with the output of this process
                    env={**os.environ, **ONE_THREAD},
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def is_alive(self) -> bool:
        """Whether it runs and belongs to this process, rather than to one that this process was forked from."""
        if self._owner != os.getpid():
            return False
        if self._process is not None:
            return self._process.poll() is None
        with self._lock:  # without a request, there is something to read only if the other end is closed
            return not select.select([self._control], [], [], 0)[0]

    def fork(self, link: socket.socket, output: int) -> int:
        """Fork a worker at the other end of a socket, and return its process id. output: where it prints to."""
        pid = self._ask(FORK, 0, [link.fileno(), output])
        self._has_forked = True
        if pid is None or pid < 0:
            raise RuntimeError(
                "no worker process can be started: "
                + (f"{os.strerror(-pid)}" if pid else "its imports failed, see the traceback above")
                + "; workers = 0 runs without worker processes"
            )
        return pid

    def reap(self, pid: int) -> str:
        """Kill a worker if it is still alive, and say how its process ended."""
        status = self._ask(REAP, pid) if self.is_alive else None
        if status is None:
            return "its process is gone"
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"its process ended with exit code {code}"
        hint = OUT_OF_MEMORY_HINT if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"

    def _close(self) -> None:
        """Let the process end its workers and what these have started; kill it if it takes long, or has none."""
        self._control.close()
        if self._process is not None and self._owner == os.getpid():
            try:
                self._process.wait(STOP_SECONDS if self._has_forked else 0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _ask(self, request: bytes, pid: int, handles: Sequence[int] = ()) -> int | None:
        """Send a request and return the reply; None if the fork server does not reply."""
        with self._lock:
            try:
                socket.send_fds(self._control, [REQUEST.pack(request, pid)], handles)
                data = self._control.recv(REPLY.size)
            except OSError:
                return None
        return None if len(data) < REPLY.size else int(REPLY.unpack(data)[0])


atexit.register(_ForkServer.stop)


# In the fork server and in the workers -------------------------------------------------------------------------------


def serve(handle: int) -> None:
    """Import everything, then fork and reap workers on request: the main function of the fork server."""
    from grpo_fed.runs.library_warnings import join_process

    control = socket.socket(fileno=handle)
    join_process()
    import_module(PRELOADED)
    gc.collect()
    gc.freeze()  # otherwise a worker's garbage collection would copy every page that it shares with the others
    adopt_orphans()
    workers: set[int] = set()
    while answer(control, control.close, workers):
        pass
    end_descendants()
    os._exit(0)


def answer(control: socket.socket, close: Callable[[], object], workers: set[int] | None = None) -> bool:
    """Answer one request; return False if the other end is closed.

    close: is called in a worker, to close what is not its own. workers: the workers that there are, in a process that
    adopts what they have started and has no other children.
    """
    data, handles, *_ = socket.recv_fds(control, REQUEST.size, 2)
    if len(data) < REQUEST.size:
        return False
    request, pid = REQUEST.unpack(data)
    reply = _fork(close, *handles) if request == FORK else _reap(pid)
    if workers is not None and request == FORK and reply > 0:
        workers.add(reply)
    elif workers is not None and request == REAP:
        workers.discard(pid)
        end_descendants(kept=workers)
    with suppress(BrokenPipeError):
        control.send(REPLY.pack(reply))
    return True


def _fork(close: Callable[[], object], handle: int, output: int) -> int:
    """Fork a worker, and return its process id, or the error number below 0."""
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or errno.EAGAIN)
    if pid == 0:
        try:
            close()
            _print_to(output)
            _work(socket.socket(fileno=handle))
        except BaseException:  # noqa: BLE001, a worker must never return into the loop of the fork server
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(handle)
    os.close(output)
    return pid


def _print_to(output: int) -> None:
    """Let this process, and what it starts, print to a pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what it printed before it is killed is not lost
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)


def _reap(pid: int) -> int:
    """Kill a worker if it is still alive, and return its status from `waitpid`."""
    assert pid > 0, "0 and below are whole groups of processes"
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:
        return 0


def _work(link: socket.socket) -> None:
    """Reply to requests for ever: the main function of a worker."""
    import torch

    from grpo_fed.engines.workers.frames import send
    from grpo_fed.engines.workers.handler import RequestHandler

    torch.set_num_threads(1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive_requests, args=(link, requests), daemon=True).start()
    handler = RequestHandler()
    while True:
        send(link, handler.reply(requests.get()))


def _receive_requests(link: socket.socket, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Receive requests in a thread of its own, so that the worker ends at once when the other end is closed."""
    from grpo_fed.engines.workers.frames import receive

    try:
        while True:
            requests.put(receive(link))
    except (EOFError, OSError):
        end_descendants()
        os._exit(0)
    except BaseException:  # noqa: BLE001, an exception in a thread would go unnoticed
        traceback.print_exc()
        os._exit(1)
