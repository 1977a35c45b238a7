"""One HTTP connection: uvicorn's, bounded in what it lacks bounds for, and with the client's certificate.

    head of a request     so many seconds, so many bytes, then 408 or 431
    an answer             the client takes something of it every so often, or is cut off
    connections           so many, one more is answered with 503

Bodies are bounded in `api.body`; idle connections are closed by uvicorn.  Nothing here is awaited, and a request
whose head comes in one piece costs no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvindexer.api.doors import CERTIFICATE
from kvindexer.api.errors import error_body
from kvindexer.api.limits import RETRY_AFTER_S
from kvindexer.errors import RequestError
from kvindexer.lull import Lull

MAX_HEAD_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """See the settings of these names."""

    receive_timeout_s: float = 10.0
    send_timeout_s: float = 30.0
    max_connections: int = 4096


class Connection(HttpToolsProtocol):
    """Uvicorn's protocol; `bounded` gives a class of its own."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    lull: ClassVar[Lull | None] = None
    """Who is to give way to requests."""

    _in_head = True
    """The next byte is one of a request's head, or the first one of the next head."""
    _begun = False
    """A part of a head is here."""
    _heads = 0
    """Complete ones."""
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _certificate: Mapping[str, Any] | None = None

    # From the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._certificate = transport.get_extra_info("peercert") or None
        if len(self.connections) > self.limits.max_connections:
            self._refuse(
                RequestError(
                    "overloaded",
                    f"{self.limits.max_connections} connections are open, which is the limit",
                    "try again later, or raise max_connections",
                    status=503,
                ),
                b"retry-after: %d\r\n" % RETRY_AFTER_S,
            )
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.lull is not None:
            self.lull.disturb()
        expected, heads = self._in_head, self._heads
        super().data_received(data)
        # a head that is not complete, or stray line ends, with which a client could keep an idle connection
        if self._in_head and (self._begun or (expected and self._heads == heads)):
            self._expect_head()
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(
                    RequestError(
                        "too_large",
                        f"the request's head is longer than {MAX_HEAD_BYTES} bytes",
                        "send less",
                        status=431,
                    )
                )

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self.limits.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._send_timer = None
        super().connection_lost(exc)

    # From the parser

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._begun = True
        if self._certificate is not None:
            cast("dict[str, Any]", self.scope)[CERTIFICATE] = self._certificate

    def on_headers_complete(self) -> None:
        """A request's head is complete."""
        self._in_head = self._begun = False
        self._heads += 1
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
            self._head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is complete."""
        self._in_head = True
        super().on_message_complete()

    # Bounds

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.receive_timeout_s, self._too_slow)

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # it is being answered, and the rest may wait until then: reading is paused, or goes on later
        if not self._head_bytes:
            self.transport.close()  # it has not asked anything
            return
        self._refuse(
            RequestError(
                "receive_timeout",
                f"the request's head was not complete after {self.limits.receive_timeout_s:g} s",
                "send it faster, or raise receive_timeout_s",
                status=408,
            )
        )

    def send_400_response(self, msg: str) -> None:
        """What uvicorn can't read."""
        self._refuse(RequestError("invalid_request", msg.rstrip("."), "speak HTTP/1.1"))

    def _refuse(self, error: RequestError, more: bytes = b"") -> None:
        """Answer without an application, and hang up."""
        body = error_body(error)
        head = [b"HTTP/1.1 %d %s\r\n" % (error.status, HTTPStatus(error.status).phrase.encode())]
        head += [name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers]
        head.append(b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body))
        self.transport.write(b"".join([*head, more, b"connection: close\r\n\r\n", body]))
        self.transport.close()


def bounded(limits: ConnectionLimits, lull: Lull | None = None) -> type[Connection]:
    """Connections with these limits, that say when somebody asks."""
    return type("Connection", (Connection,), {"limits": limits, "lull": lull})
