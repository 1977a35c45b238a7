"""A small TCP load balancer for HTTP services: connections go in turn to the backends whose /ready answers 200.

    client ──► balancer ──► replica whose turn it is
                   └─ GET /ready of all, a few times a second

As a Kubernetes Service does, it deals out connections, not requests: whoever keeps one open stays with its replica
until one of them ends it.  A connection that a backend does not take goes to the next one.

Invariants: nobody is sent to a backend that has not answered its last check with 200; behind `close()` no thread,
task or socket is left.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import closing, suppress
from types import TracebackType
from typing import Final, NamedTuple, Self

_HOST: Final = "127.0.0.1"
_BACKLOG: Final = 1024
_CHUNK_BYTES: Final = 64 * 1024
_CONNECT_TIMEOUT_S: Final = 1.0
_CHECK: Final = b"GET /ready HTTP/1.1\r\nhost: balancer\r\nconnection: close\r\n\r\n"
_NOBODY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 22\r\n\r\n"
    b"no replica is ready.\r\n"
)


class Backend(NamedTuple):
    """Where a replica listens."""

    host: str
    port: int


class Balancer:
    """Listens on a loopback port and passes connections on, in a thread of its own; port 0: any free one."""

    def __init__(self, backends: Sequence[Backend], *, port: int = 0, check_interval_s: float = 0.2) -> None:
        self._turns = deque(backends)
        self._ready: frozenset[Backend] = frozenset()
        self._check_interval_s = check_interval_s
        self._listener = socket.create_server((_HOST, port), backlog=_BACKLOG)
        self.port: int = self._listener.getsockname()[1]
        self._links: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._work = self._loop.create_task(self._run())
        self._thread = threading.Thread(target=self._live, name=f"balancer {self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://{_HOST}:{self.port}"

    @property
    def ready(self) -> frozenset[Backend]:
        """The backends that get connections at present."""
        return self._ready

    def close(self) -> None:
        """Stop listening and hang up. May be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._work.cancel)
            self._thread.join()

    # -- everything below runs in the thread -------------------------------------------------------------------------

    def _live(self) -> None:
        with suppress(asyncio.CancelledError), closing(self._loop):
            self._loop.run_until_complete(self._work)

    async def _run(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._listener, limit=_CHUNK_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                for backend in tuple(self._turns):
                    group.create_task(self._watch(backend))
        finally:
            server.close()
            for link in self._links:
                link.cancel()
            await asyncio.gather(*self._links, return_exceptions=True)

    async def _watch(self, backend: Backend) -> None:
        while True:
            good = await _says_ready(backend)
            self._ready = self._ready | {backend} if good else self._ready - {backend}
            await asyncio.sleep(self._check_interval_s)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = self._loop.create_task(self._carry(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                chosen = await self._choose()
                if chosen is None:
                    await _refuse(reader, writer)
                else:
                    await _join(reader, writer, *chosen)
            except* OSError:  # either end has hung up
                pass

    async def _choose(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """Connect to the next backend that is ready and takes the connection."""
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            backend = self._turns[-1]
            if backend not in self._ready:
                continue
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    return await asyncio.open_connection(*backend, limit=_CHUNK_BYTES)
            except (OSError, TimeoutError):
                self._ready -= {backend}
        return None


async def _says_ready(backend: Backend) -> bool:
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(*backend)
            with closing(writer):
                writer.write(_CHECK)
                status = await reader.readline()
    except (OSError, TimeoutError, ValueError):
        return False
    return status.split(b" ")[1:2] == [b"200"]


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(_CHUNK_BYTES)  # closing on a request that was not read would reset the answer away
    writer.write(_NOBODY)
    await writer.drain()


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    upstream: asyncio.StreamReader,
    downstream: asyncio.StreamWriter,
) -> None:
    with closing(downstream):
        async with asyncio.TaskGroup() as group:
            group.create_task(_pipe(reader, downstream))
            group.create_task(_pipe(upstream, writer))


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Carry bytes as they come, and the end of them."""
    while data := await source.read(_CHUNK_BYTES):
        sink.write(data)
        await sink.drain()
    sink.write_eof()
