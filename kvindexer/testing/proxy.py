"""A TCP proxy that breaks the network between two peers, on purpose and on command.

    client ──► listener of the proxy ──► pipe ──► upstream
           ◄─────────────────────────── pipe ◄──

Faults are data: swap the whole object at any time (`proxy.faults = LinkFaults(...)`); when the assignment returns,
it holds for open connections and for new ones.  No container, no privileges, no wait in the test's own thread.

Invariants: a pipe holds one chunk at most, so a slow reader slows its writer; a stream that has lost bytes is never
carried on, for TCP never delivers a stream with a hole; behind `close()` no thread, task or socket is left.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

_HOST: Final = "127.0.0.1"
_CHUNK_BYTES: Final = 64 * 1024
_BACKLOG: Final = 128
_RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)
_ANSWER_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFaults:
    """What the network does to connections; the default is nothing."""

    latency_s: float = 0.0
    """Every chunk of bytes is this late, in each direction; a connection carries 64 KiB in that time."""
    slice_bytes: int | None = None
    """Bytes are passed on in pieces of this size."""
    byte_limit: int | None = None
    """A connection is closed behind this many bytes, counted in both directions together."""
    stall: bool = False
    """Bytes wait, and come late but whole: a short partition, a stopped process."""
    blackhole: bool = False
    """Bytes vanish, also the end of a stream; connections stay open, and are reset once they are used again."""
    reset: bool = False
    """Connections are reset: those that are open, and new ones as soon as they are accepted."""
    down: bool = False
    """Nobody listens; connections that were open are reset."""


class FaultProxy:
    """Listens on a loopback port of its own and passes everything on to the upstream, as well as `faults` allow.

    It runs in a thread of its own, so that synchronous and asynchronous tests can use it; every call may come from
    any thread and returns when it is done.  An upstream that can't be reached looks like a reset.  IPv4 only.
    """

    def __init__(self, upstream_host: str, upstream_port: int, faults: LinkFaults | None = None) -> None:
        self._upstream = (socket.gethostbyname(upstream_host), upstream_port)
        self._faults = faults or LinkFaults()
        self._links: dict[asyncio.Task[None], tuple[socket.socket, ...]] = {}
        self._accepted = 0
        self._vanished_bytes = 0
        # bound and never listening: nobody else gets the port while we are down
        self._reservation = _bound_socket(0)
        self.port: int = self._reservation.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._acceptor: asyncio.Task[None] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"fault proxy {self.port}", daemon=True)
        self._thread.start()
        self._do(self._take_effect())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """Where clients connect, as ZMQ spells it."""
        return f"tcp://{_HOST}:{self.port}"

    @property
    def accepted(self) -> int:
        """Connections accepted so far."""
        return self._accepted

    @property
    def open_connections(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    @property
    def vanished_bytes(self) -> int:
        """Bytes that went into the blackhole so far."""
        return self._vanished_bytes

    @property
    def faults(self) -> LinkFaults:
        """What the network does at present; assign to change it."""
        return self._faults

    @faults.setter
    def faults(self, faults: LinkFaults) -> None:
        self._do(self._change(faults))

    def cut(self) -> None:
        """Reset all open connections, now; new ones are welcome."""
        self._do(self._cut())

    def close(self) -> None:
        """Reset all connections and stop listening. May be called twice."""
        if self._closed:
            return
        self._do(self._change(LinkFaults(down=True)))
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._reservation.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closed:
            work.close()
            raise RuntimeError(f"{self.endpoint}: the proxy is closed")
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_ANSWER_TIMEOUT_S)

    # -- everything below runs in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    async def _change(self, faults: LinkFaults) -> None:
        self._faults = faults
        self._changed.set()
        self._changed = asyncio.Event()
        await self._take_effect()

    async def _take_effect(self) -> None:
        if self._faults.down and self._acceptor is not None:
            await _end(self._acceptor)
            self._acceptor = None
        if self._faults.down or self._faults.reset:
            await self._cut()
        if not self._faults.down and self._acceptor is None:
            listener = _bound_socket(self.port)
            listener.listen(_BACKLOG)
            self._acceptor = self._loop.create_task(self._accept(listener), name="accept")

    async def _cut(self) -> None:
        await _end(*self._links)

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                self._accepted += 1
                upstream = socket.socket()
                for end in (client, upstream):
                    end.setblocking(False)  # noqa: FBT003 - its only argument
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link = self._loop.create_task(self._carry(client, upstream), name="link")
                self._links[link] = (client, upstream)
                link.add_done_callback(self._hang_up)

    def _hang_up(self, link: asyncio.Task[None]) -> None:
        """Close a link's sockets: with a reset, unless it came to its end by itself."""
        for end in self._links.pop(link):
            if link.cancelled() or link.exception() is not None:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
            end.close()

    async def _carry(self, client: socket.socket, upstream: socket.socket) -> None:
        if self._faults.reset:
            raise ConnectionResetError
        await self._loop.sock_connect(upstream, self._upstream)
        link = _Link()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pipe(client, upstream, link), name="to upstream")
                group.create_task(self._pipe(upstream, client, link), name="to client")
        except* _LimitReached:
            pass

    async def _pipe(self, source: socket.socket, sink: socket.socket, link: _Link) -> None:
        while True:
            data = await self._loop.sock_recv(source, _CHUNK_BYTES)
            await asyncio.sleep(self._faults.latency_s)
            await self._until(lambda faults: not faults.stall)
            if self._faults.blackhole:
                link.torn = True
                self._vanished_bytes += len(data)
                if data:
                    continue
                await self._until(lambda faults: not faults.blackhole)
            if link.torn:
                raise ConnectionResetError
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            await self._forward(data, sink, link)

    async def _until(self, predicate: Callable[[LinkFaults], bool]) -> None:
        while not predicate(self._faults):
            await self._changed.wait()

    async def _forward(self, data: bytes, sink: socket.socket, link: _Link) -> None:
        limit = self._faults.byte_limit
        allowed = data if limit is None else data[: max(0, limit - link.forwarded)]
        size = self._faults.slice_bytes or _CHUNK_BYTES
        for start in range(0, len(allowed), size):
            await self._loop.sock_sendall(sink, allowed[start : start + size])
            await asyncio.sleep(0)
        link.forwarded += len(allowed)
        if limit is not None and link.forwarded >= limit:
            raise _LimitReached


@dataclass(slots=True)
class _Link:
    """What both directions of a connection share."""

    forwarded: int = 0
    torn: bool = False


class _LimitReached(Exception):  # noqa: N818 - no error: the link has come to its appointed end
    """The byte limit."""


def _bound_socket(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((_HOST, port))
    bound.setblocking(False)  # noqa: FBT003 - its only argument
    return bound


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
