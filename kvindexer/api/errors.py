"""The one JSON error shape of all routes: {"error": {"code", "message", "hint"}}.

Never a stack, never a piece of the body: what a caller sent comes back at most as the name of a model or instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from starlette.types import Send

from kvindexer.errors import RequestError

Headers = Sequence[tuple[bytes, bytes]]

CLOSE: Final = (b"connection", b"close")
"""For answers to requests of which a part is still to come."""

_encode = msgspec.json.Encoder().encode


class ErrorDetail(msgspec.Struct):
    """What went wrong, for programs, for people, and what to do about it."""

    code: str
    message: str
    hint: str


class ErrorAnswer(msgspec.Struct):
    """The answer to every request that can't be met."""

    error: ErrorDetail


class RefusedError(RequestError):
    """A request that is refused before its meaning is looked at; the answer has headers of its own."""

    def __init__(self, error: RequestError, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(error.code, error.message, error.hint, status=error.status)
        self.headers = headers


def method_not_allowed(allowed: str) -> RefusedError:
    """The path exists, with another method."""
    error = RequestError("method_not_allowed", f"this route takes {allowed}", "see /docs for the routes", status=405)
    return RefusedError(error, (b"allow", allowed.encode()))


def internal_error() -> RequestError:
    """What callers are told about a fault of ours; the log has the rest."""
    return RequestError("internal", "the request could not be answered", "the service's log says why", status=500)


def error_body(error: RequestError) -> bytes:
    """The error as bytes of JSON."""
    return _encode(ErrorAnswer(ErrorDetail(error.code, error.message, error.hint)))


def error_headers(error: RequestError) -> Headers:
    """Headers that belong to the error."""
    return error.headers if isinstance(error, RefusedError) else ()


async def send_json(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    """Send a whole answer."""
    await send_body(send, status, body, b"application/json", headers)


async def send_body(send: Send, status: int, body: bytes, content_type: bytes, headers: Headers = ()) -> None:
    """Send a whole answer of any form."""
    head = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: RequestError) -> None:
    """Send an error as the whole answer."""
    await send_json(send, error.status, error_body(error), error_headers(error))
