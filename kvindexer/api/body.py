"""Request bodies, read whole before any route sees them: bounded in size and in time.

The size that counts is what arrives, whatever Content-Length says.  Of a body that is somewhat too large the rest is
read and thrown away, since clients that are still sending often miss an answer; of a huge one it is not, and the
connection is closed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import perf_counter
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvindexer.api.errors import CLOSE, RefusedError
from kvindexer.errors import RequestError, TooLargeError
from kvindexer.watching.work import RECEIVED_AT

_PATIENCE: Final = 2
"""A body of up to so many times the limit is read to its end before it is refused."""


class DisconnectedError(Exception):
    """The client has gone: there is nobody to answer."""


async def read_off(scope: Scope, receive: Receive, most_bytes: int, timeout_s: float) -> None:
    """Read a body and forget it, for an answer that doesn't need it: clients that still send often miss an answer.

    Not one that says itself that it is too large, or that waits for a word of ours.
    """
    for name, value in scope["headers"]:
        if name == b"expect" or (name == b"content-length" and value.isdigit() and int(value) > most_bytes):
            return
    size, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while more and size <= most_bytes:
                message = await receive()
                _check_connected(message)
                size += len(message.get("body", b""))
                more = message.get("more_body", False)


class BodyReader:
    """Middleware: hands on requests whose body is complete, as one message."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, receive_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._receive_timeout_s = receive_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then let the application have it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unread: Message | None = await self._read(scope, receive)
        scope[RECEIVED_AT] = perf_counter()

        async def complete() -> Message:
            nonlocal unread
            message, unread = unread, None
            return message if message is not None else await receive()

        await self._app(scope, complete, send)

    async def _read(self, scope: Scope, receive: Receive) -> Message:
        self._look_at_promises(scope)
        try:
            async with asyncio.timeout(self._receive_timeout_s):
                message = await receive()
                _check_connected(message)
                if message.get("more_body"):
                    message = await self._read_on(message, receive)
        except TimeoutError:
            raise RefusedError(
                RequestError(
                    "receive_timeout",
                    f"the request was not complete after {self._receive_timeout_s:g} s",
                    "send it faster, or raise receive_timeout_s",
                    status=408,
                ),
                CLOSE,
            ) from None
        size = len(message.get("body", b""))
        if size > self._max_body_bytes:
            raise self._too_large(size)
        return message

    async def _read_on(self, message: Message, receive: Receive) -> Message:
        """Read up to the end; chunks past the limit are only counted."""
        chunks: list[bytes] = []
        size = 0
        while True:
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= self._max_body_bytes:
                chunks.append(chunk)
            else:
                chunks.clear()
            if not message.get("more_body"):
                break
            if size > self._max_body_bytes * _PATIENCE:
                raise RefusedError(self._too_large(size), CLOSE)
            message = await receive()
            _check_connected(message)
        if size > self._max_body_bytes:
            raise self._too_large(size)
        return {"type": "http.request", "body": b"".join(chunks), "more_body": False}

    def _look_at_promises(self, scope: Scope) -> None:
        """Refuse at once what says itself that it is too large, if reading on is of no use."""
        declared, waits = 0, False
        for name, value in scope["headers"]:
            if name == b"content-length":
                declared = int(value) if value.isdigit() else 0
            elif name == b"expect":
                waits = value.lower() == b"100-continue"
        if declared > self._max_body_bytes * (1 if waits else _PATIENCE):
            raise RefusedError(self._too_large(declared), CLOSE)

    def _too_large(self, size: int) -> TooLargeError:
        return TooLargeError("body in bytes", size, self._max_body_bytes, "max_body_bytes")


def _check_connected(message: Message) -> None:
    if message["type"] == "http.disconnect":
        raise DisconnectedError
