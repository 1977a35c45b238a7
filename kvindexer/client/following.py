"""Following GET /v1/changes, blocking or with asyncio: connections around `client.changes`, which reads.

    with client.changes("m", since=position) as changes:
        for event in changes:
            ...                       # PositionEvent: everything up to here was told, `changes.position` is where
            position = changes.position

An iteration ends when the service says so (`EndEvent`, which is told too); whatever else ends it is an error.  In
either case one goes on by following `since` the last position.  What comes twice then does no harm: what is told of a
hash is absolute.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import Any, Final, Self

import httpx

from kvindexer.client.calls import EVENTS
from kvindexer.client.changes import Change, EndEvent, Reader, Told
from kvindexer.client.errors import ClientError, UnreachableError
from kvindexer.client.exchange import Body, failure, refusal

SILENCE_S: Final = 60.0
"""Longest wait for the next bytes; the service gives signs of life every `changes_heartbeat_s`, 10 s by default."""
_MOST_REFUSAL_BYTES: Final = 65_536


class _Following:
    """What both have in common."""

    def __init__(self, url: str, request: dict[str, Any], since: str | None) -> None:
        self._url = url
        self._request = request
        self._reader = Reader(url)
        self.position = since
        """Up to where everything was told; None: nowhere yet."""

    def _heard(self, told: Told) -> Change:
        if told.position is not None:
            self.position = told.position
        return told.event

    def _broken(self, error: Exception) -> ClientError:
        if isinstance(error, httpx.TimeoutException):
            return failure(error, self._url, SILENCE_S)
        return UnreachableError(self._url, f"the stream broke off ({type(error).__name__})")


class Changes(_Following):
    """An iterator of changes."""

    def __init__(self, http: httpx.Client, url: str, request: dict[str, Any], since: str | None) -> None:
        super().__init__(url, request, since)
        self._http = http
        self._events = self._told()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        """Wait for the next one.  Raises ClientError."""
        return next(self._events)

    def close(self) -> None:
        """Hang up."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _told(self) -> Generator[Change, None, None]:
        try:
            with self._http.stream(**self._request) as response:
                if not _is_stream(response):
                    body = Body(self._url, _MOST_REFUSAL_BYTES)
                    for chunk in response.iter_raw():
                        body.add(chunk)
                    raise refusal(body.reply(response), self._url)
                for chunk in response.iter_raw():
                    for told in self._reader.feed(chunk):
                        yield self._heard(told)
                        if isinstance(told.event, EndEvent):
                            return
        except (httpx.HTTPError, OSError) as error:
            raise self._broken(error) from None
        raise UnreachableError(self._url, "the stream ended without a word")


class AsyncChanges(_Following):
    """The same for asyncio."""

    def __init__(self, http: httpx.AsyncClient, url: str, request: dict[str, Any], since: str | None) -> None:
        super().__init__(url, request, since)
        self._http = http
        self._events = self._told()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        """Wait for the next one.  Raises ClientError."""
        return await anext(self._events)

    async def close(self) -> None:
        """Hang up."""
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _told(self) -> AsyncGenerator[Change, None]:
        try:
            async with self._http.stream(**self._request) as response:
                if not _is_stream(response):
                    body = Body(self._url, _MOST_REFUSAL_BYTES)
                    async for chunk in response.aiter_raw():
                        body.add(chunk)
                    raise refusal(body.reply(response), self._url)
                async for chunk in response.aiter_raw():
                    for told in self._reader.feed(chunk):
                        yield self._heard(told)
                        if isinstance(told.event, EndEvent):
                            return
        except (httpx.HTTPError, OSError) as error:
            raise self._broken(error) from None
        raise UnreachableError(self._url, "the stream ended without a word")


def _is_stream(response: httpx.Response) -> bool:
    return response.status_code == httpx.codes.OK and response.headers.get("content-type", "").startswith(EVENTS)
