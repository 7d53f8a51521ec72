"""Worker processes, forked from a fork server: a process that has imported all that a worker needs, and stays idle.

The fork server imports while this process imports too, so the first worker is ready early. A further worker, or one
that replaces a worker that has died, costs milliseconds. The fork server is a fresh process, not a fork of this one, so
it does not matter which threads, devices or locks this process has. The fork server and the workers end with this
process, even if it is killed, because the other ends of their sockets are closed then. They ignore Ctrl-C; this process
stops them.

This module imports the standard library alone, because `preload` is called before anything else is imported.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, ClassVar, final

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
"""What the fork server can be asked: to fork a worker, which gets the socket that is sent along, or to reap one."""
REQUEST, REPLY = struct.Struct("<cq"), struct.Struct("<q")
"""A request is FORK or REAP and a process id; a reply is a process id, an exit status, or an error number below 0."""
OUT_OF_MEMORY_HINT = ", perhaps because memory ran out"


def preload() -> None:
    """Start the fork server now, so that it imports while this process imports too."""
    if is_possible():
        _ForkServer.running()


def is_possible() -> bool:
    """Return whether this system can have workers: libraries of macOS do not survive a fork, and Windows has none."""
    return sys.platform == "linux"


@final
class Worker:
    """A process with one thread that answers requests, and a socket to it."""

    def __init__(self) -> None:
        """Fork a worker. Raises RuntimeError if that is impossible."""
        self._fork_server = _ForkServer.running()
        self.link, worker_end = socket.socketpair()
        with worker_end:
            self.pid = self._fork_server.fork(worker_end)

    def close(self) -> str:
        """Kill the worker if it is still alive, and say how its process ended."""
        how = self._fork_server.reap(self.pid)
        self.link.close()
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

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._control, server_end = socket.socketpair()
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
        return self._owner == os.getpid() and self._process.poll() is None

    def fork(self, link: socket.socket) -> int:
        """Fork a worker at the other end of a socket, and return its process id."""
        pid = self._ask(FORK, 0, [link.fileno()])
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
        """Kill the process; the workers end by themselves when their sockets are closed."""
        self._control.close()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()

    def _ask(self, request: bytes, pid: int, handles: Sequence[int] = ()) -> int | None:
        """Send a request and return the reply; None if the fork server does not reply."""
        with self._lock:
            try:
                socket.send_fds(self._control, [REQUEST.pack(request, pid)], handles)
                data = self._control.recv(REPLY.size, socket.MSG_WAITALL)
            except OSError:
                return None
        return None if len(data) < REPLY.size else int(REPLY.unpack(data)[0])


atexit.register(_ForkServer.stop)


# In the fork server and in the workers -------------------------------------------------------------------------------


def serve(handle: int) -> None:
    """Import everything, then fork and reap workers on request: the main function of the fork server."""
    control = socket.socket(fileno=handle)
    import_module(PRELOADED)
    gc.collect()
    gc.freeze()  # otherwise a worker's garbage collection would copy every page that it shares with the others
    while True:
        data, handles, *_ = socket.recv_fds(control, REQUEST.size, 1)
        if len(data) < REQUEST.size:
            os._exit(0)
        request, pid = REQUEST.unpack(data)
        control.sendall(REPLY.pack(_fork(control, handles[0]) if request == FORK else _reap(pid)))


def _fork(control: socket.socket, handle: int) -> int:
    """Fork a worker, and return its process id, or the error number below 0."""
    try:
        pid = os.fork()
    except OSError as error:
        return -(error.errno or errno.EAGAIN)
    if pid == 0:
        try:
            control.close()
            _work(socket.socket(fileno=handle))
        except BaseException:  # noqa: BLE001, a worker must never return into the loop of the fork server
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(handle)
    return pid


def _reap(pid: int) -> int:
    """Kill a worker if it is still alive, and return its status from `waitpid`."""
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
        os._exit(0)
    except BaseException:  # noqa: BLE001, an exception in a thread would go unnoticed
        traceback.print_exc()
        os._exit(1)
