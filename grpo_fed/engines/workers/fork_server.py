"""Worker processes, forked from a nursery: a process that has imported all that a worker needs, and does nothing else.

So the first worker starts while this process imports too, and a further one costs milliseconds, as does one that takes
the place of another that has died. The nursery is started fresh, not forked from here, so it does not matter what
threads, devices or locks this process has. All of them end with this process, even if it is killed: their end of a
socket closes then. They never see Ctrl-C; this process tells them to stop.

Nothing here imports more than the standard library, for `start_ahead` is called first of all.
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
from typing import Any, final

PRELOADED = "grpo_fed.engines.workers.handler"
"""Imports all that a worker needs."""
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""The matrices are small, and every core has a process."""
ENTRY = """import sys
sys.path[:] = sys.argv[2:]
from grpo_fed.engines.workers.fork_server import serve
serve(int(sys.argv[1]))
"""
REQUEST, REPLY = struct.Struct("<cq"), struct.Struct("<q")
HINT = ", perhaps for want of memory"
FORK, REAP = b"b", b"k"
"""Fork a worker that gets the socket which comes along; kill one, should it live, and say how it ended."""


def preload() -> None:
    """Let the nursery start importing, before this process does the same."""
    if is_possible():
        _fork_server()


def is_possible() -> bool:
    """Whether workers can be had here: macOS has libraries that do not bear being forked, and Windows has no fork."""
    return sys.platform == "linux"


@final
class Worker:
    """A process with one thread that answers what it is asked, with a socket to it."""

    def __init__(self) -> None:
        """RuntimeError if there can be none."""
        self._fork_server = _fork_server()
        self.link, theirs = socket.socketpair()
        with theirs:
            self.pid = self._fork_server.fork(theirs)

    def close(self) -> str:
        """Kill it, should it live; says how it ended."""
        ended = self._fork_server.reap(self.pid)
        self.link.close()
        return ended


@final
class _ForkServer:
    """Where workers come from, as this process sees it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        # a blocked signal stays so in what is started here, from its first instruction on
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", ENTRY, str(theirs.fileno()), *sys.path],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what an environment prints must not get between what this process prints
                    env={**os.environ, **ONE_THREAD},
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def is_there(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def fork(self, link: socket.socket) -> int:
        """A new worker's process id."""
        pid = self._ask(FORK, 0, [link.fileno()])
        if pid is None or pid < 0:
            raise RuntimeError(
                "no worker process can be started: "
                + (f"{os.strerror(-pid)}" if pid else "what it imports failed, as said above")
                + "; workers = 0 does without"
            )
        return pid

    def reap(self, pid: int) -> str:
        """How a worker ended, that is gone then in any case."""
        status = self._ask(REAP, pid) if self.is_there else None
        if status is None:
            return "its process is gone"
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"its process ended with exit code {code}"
        return f"its process was ended by {signal.Signals(-code).name}{HINT if -code == signal.SIGKILL else ''}"

    def close(self) -> None:
        """Workers end by themselves, as their sockets close."""
        self._control.close()
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()

    def _ask(self, request: bytes, pid: int, handles: Sequence[int] = ()) -> int | None:
        """None if it does not answer."""
        with self._lock:
            try:
                socket.send_fds(self._control, [REQUEST.pack(request, pid)], handles)
                data = self._control.recv(REPLY.size, socket.MSG_WAITALL)
            except OSError:
                return None
        return None if len(data) < REPLY.size else int(REPLY.unpack(data)[0])


_known: list[_ForkServer] = []


def _fork_server() -> _ForkServer:
    """The one of this process, for as long as it lives."""
    if _known and not _known[0].is_there:
        _known.pop().close()
    if not _known:
        _known.append(_ForkServer())
    return _known[0]


@atexit.register
def _close() -> None:
    for nursery in _known:
        nursery.close()


# In the nursery and in the worker ------------------------------------------------------------------------------------


def serve(handle: int) -> None:
    """The nursery: import, then fork whenever it is asked to."""
    control = socket.socket(fileno=handle)
    import_module(PRELOADED)
    gc.collect()
    gc.freeze()  # else a worker that collects garbage would copy every page that it has in common with the others
    while True:
        data, handles, *_ = socket.recv_fds(control, REQUEST.size, 1)
        if len(data) < REQUEST.size:
            os._exit(0)
        request, pid = REQUEST.unpack(data)
        control.sendall(REPLY.pack(_fork(control, handles[0]) if request == FORK else _reap(pid)))


def _fork(control: socket.socket, handle: int) -> int:
    """The process id of a new worker, or the error's number, negative."""
    try:
        pid = os.fork()
    except OSError as error:
        return -(error.errno or errno.EAGAIN)
    if pid == 0:
        try:
            control.close()
            _work(socket.socket(fileno=handle))
        except BaseException:  # noqa: BLE001, whatever it is, this must not go on as a second nursery
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(handle)
    return pid


def _reap(pid: int) -> int:
    """The status that `waitpid` gives."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:
        return 0


def _work(link: socket.socket) -> None:
    """Answer for ever."""
    import torch

    from grpo_fed.engines.workers.frames import send
    from grpo_fed.engines.workers.handler import RequestHandler

    torch.set_num_threads(1)
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, inbox), daemon=True).start()
    desk = RequestHandler()
    while True:
        send(link, desk.reply(inbox.get()))


def _listen(link: socket.socket, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Ends the process as soon as whoever asks is gone, in the middle of an answer too."""
    from grpo_fed.engines.workers.frames import receive

    try:
        while True:
            inbox.put(receive(link))
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:  # noqa: BLE001, of a thread's exceptions nobody else takes notice
        traceback.print_exc()
        os._exit(1)
