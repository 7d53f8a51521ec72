"""A TCP proxy that delays what it passes on, and that can be cut, as a stand-in for a network."""

import asyncio
import threading
from typing import Self

CHUNK = 1 << 16


class Proxy:
    """Passes connections to a port of this machine on, in a thread of its own."""

    def __init__(self, port: int, latency: float = 0.0) -> None:
        """port: of what is behind the proxy. latency: seconds that bytes take in one direction."""
        self.port = 0
        """Where the proxy listens."""
        self._behind, self._latency, self._is_cut = port, latency, False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Break all connections, and every new one."""
        self._is_cut = True
        self._loop.call_soon_threadsafe(self._break_all)

    def heal(self) -> None:
        """Pass connections on again."""
        self._is_cut = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._behind)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(back)
        try:
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        except (OSError, asyncio.CancelledError):
            pass  # one of the sides has gone, the network was cut, or the proxy is closed
        finally:
            for end in (writer, back):
                self._writers.discard(end)
                end.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Pass one direction on until its end; what follows does not wait for what is under way."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                when, data = await under_way.get()
                await asyncio.sleep(max(0.0, when - self._loop.time()))
                if not data:
                    target.write_eof()
                    return
                target.write(data)
                await target.drain()

        delivery = asyncio.create_task(deliver())
        try:
            while data := await source.read(CHUNK):
                under_way.put_nowait((self._loop.time() + self._latency, data))
            under_way.put_nowait((self._loop.time() + self._latency, b""))
            await delivery
        finally:
            delivery.cancel()

    def _break_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        self._break_all()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
