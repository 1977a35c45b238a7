"""What becomes of a call: from what came back to the answer, an error, or another try.  No I/O here.

    reply ──200, 201──► the answer, typed
          ──503───────► again, once, after the pause that it asks for   ──► UnavailableError
          ──others────► RefusedError
    refused connection ► again, once                                    ──► UnreachableError
    hung up, unheard ──► again, once, if it does no harm                ──► UnreachableError

The first two are safe for every route: nothing has been done yet.  The last one is what a request meets that a server
closes a kept connection under: most likely it was not read, but that is not certain, so what must not be done twice
(`Call.repeatable`) is not sent again.  All of it, pauses too, ends at the call's deadline.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeVar

import httpx
import msgspec

from kvindexer.client.answers import ErrorDetail
from kvindexer.client.calls import MSGPACK, Call
from kvindexer.client.errors import (
    BadAnswerError,
    ClientError,
    InvalidRequestError,
    NotFoundError,
    RefusedError,
    TimedOutError,
    UnavailableError,
    UnreachableError,
)

T = TypeVar("T")

TRIES: Final = 2
REFUSED_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0
"""A service that asks for a longer pause (`Retry-After`) is not waited for."""


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Again(NamedTuple):
    """Try once more, after a pause."""

    pause_s: float


class HungUpError(Exception):
    """A connection that had been used before was closed before anything of the answer came."""


class _ErrorAnswer(msgspec.Struct, frozen=True):
    error: ErrorDetail


_read_error: Final = msgspec.json.Decoder(_ErrorAnswer).decode


def answer_of(call: Call[T], reply: Reply, url: str) -> T:
    """The answer to a call.  Raises RefusedError, BadAnswerError."""
    if reply.status not in call.good:
        raise refusal(reply, url)
    try:
        kind: Any = call.answer
        answer: T = _decoder(kind, call.form).decode(reply.body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        if reply.status >= HTTPStatus.BAD_REQUEST:
            raise refusal(reply, url) from None
        raise BadAnswerError(url, f"the answer to {_route(call)} can't be read") from None
    return answer


def refusal(reply: Reply, url: str) -> ClientError:
    """The error that a reply is, whoever sent it: the service, or something before it."""
    status = reply.status
    if status < HTTPStatus.BAD_REQUEST:
        return BadAnswerError(url, f"status {status} is none of its own")
    try:
        detail = _read_error(reply.body).error
    except (msgspec.MsgspecError, ValueError, RecursionError):
        detail = ErrorDetail(f"status_{status}", f"{url} answered {status}", "it may come from a proxy before it")
    kind: type[RefusedError] = InvalidRequestError
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        kind = UnavailableError
    elif status == HTTPStatus.NOT_FOUND:
        kind = NotFoundError
    return kind(status, detail.code, detail.message, detail.hint)


def again(call: Call[T], outcome: Reply | Exception, left_s: float) -> Again | None:
    """Whether a first try is worth a second one, in the time that is left."""
    if isinstance(outcome, httpx.ConnectError):
        pause_s = REFUSED_PAUSE_S
    elif isinstance(outcome, HungUpError) and call.repeatable:
        pause_s = 0.0
    elif isinstance(outcome, Reply) and outcome.status == HTTPStatus.SERVICE_UNAVAILABLE not in call.good:
        pause_s = _retry_after_s(outcome)
    else:
        return None
    return Again(pause_s) if pause_s <= LONGEST_PAUSE_S and pause_s < left_s else None


def failure(error: Exception, url: str, timeout_s: float) -> ClientError:
    """An error of httpx, or of the clock, in our words; never its text: that may hold what was sent."""
    if isinstance(error, (httpx.TimeoutException, TimeoutError)):
        return TimedOutError(url, timeout_s)
    if isinstance(error, httpx.ConnectError):
        return UnreachableError(url, "no connection")
    if isinstance(error, httpx.DecodingError | httpx.RemoteProtocolError):
        return BadAnswerError(url, "what came back is no HTTP, or broke off")
    if isinstance(error, HungUpError):
        return UnreachableError(url, "it hung up before it answered")
    return UnreachableError(url, f"the connection broke ({type(error).__name__})")


class Trace:
    """Watches one request: on a connection that was used before, and not answered?  Told by httpx, step by step."""

    def __init__(self) -> None:
        self._fresh = self._answered = False

    def __call__(self, step: str, _: Mapping[str, Any]) -> None:
        """Take note of a step."""
        self._fresh |= step == "connection.connect_tcp.started"
        self._answered |= step == "http11.receive_response_headers.complete"

    async def awaited(self, step: str, _: Mapping[str, Any]) -> None:
        """The same, as asyncio's side of httpx wants it."""
        self(step, _)

    def judged(self, error: Exception) -> Exception:
        """The error, or what it means on a connection like this."""
        broken = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError)
        return HungUpError() if broken and not self._fresh and not self._answered else error


class Body:
    """A body as it comes in: bounded in bytes."""

    def __init__(self, url: str, most: int) -> None:
        self._url = url
        self._left = most
        self._chunks: list[bytes] = []

    def add(self, chunk: bytes) -> None:
        """Take a piece.  Raises BadAnswerError if it is one too many."""
        self._left -= len(chunk)
        if self._left < 0:
            raise BadAnswerError(self._url, "the answer is longer than max_answer_bytes")
        self._chunks.append(chunk)

    def reply(self, response: httpx.Response) -> Reply:
        """The whole of it."""
        return Reply(response.status_code, response.headers, b"".join(self._chunks))


def _route(call: Call[Any]) -> str:
    return call.path.partition("?")[0]


def _retry_after_s(reply: Reply) -> float:
    try:
        return max(0.0, float(reply.headers.get("retry-after", REFUSED_PAUSE_S)))
    except ValueError:
        return REFUSED_PAUSE_S


@cache
def _decoder(kind: Any, form: str) -> Any:
    """Made once for each kind of answer."""
    return msgspec.msgpack.Decoder(kind) if form == MSGPACK else msgspec.json.Decoder(kind)
