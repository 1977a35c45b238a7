"""The two clients: connections and clocks around `client.exchange`, which decides.

Connections are kept and used again.  Every wait is bounded by `timeout_s`, retries included: a scheduler would
rather route without an answer than wait for one.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import httpx

from kvindexer.client.calls import Call
from kvindexer.client.changes import Change
from kvindexer.client.exchange import TRIES, Body, Reply, Trace, again, answer_of, failure
from kvindexer.client.following import SILENCE_S, AsyncChanges, Changes
from kvindexer.client.methods import Methods

T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)

TIMEOUT_S: Final = 5.0
CONNECT_S: Final = 1.0
KEEPALIVE_S: Final = 2.0
"""Idle connections are closed before the server does so (after 5 s), or a request could run into that."""
MAX_CONNECTIONS: Final = 100
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024


class _Base(Methods, Generic[H]):
    """What both clients are told, and how they make requests."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retry: bool = True,
        headers: Mapping[str, str] | None = None,
        token: str | Callable[[], str] | None = None,
        verify: ssl.SSLContext | None = None,
        max_connections: int = MAX_CONNECTIONS,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        """`url` is http(s)://host:port; `retry` allows a second try, as `client.exchange` says when.

        `token` says who is asking, a function that is called for each request if it is one: tokens of Kubernetes
        change.  `verify` is whom to believe over TLS, and may hold a certificate of the client's own.
        """
        self._token = token
        self._timeout_s = timeout_s
        self._tries = TRIES if retry else 1
        self._max_answer_bytes = max_answer_bytes
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            raise ValueError("url: expected http://host:port") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError("url: expected http://host:port")
        if not timeout_s > 0:
            raise ValueError("timeout_s: expected more than 0")
        self._named = f"{parsed.scheme}://{parsed.netloc.decode()}"
        """Without the password that a URL may have."""
        if verify is None and parsed.scheme == "http":
            verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # loading certificates that nobody needs takes long
        limits = httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=KEEPALIVE_S
        )
        self._http: H = self._open(
            base_url=url,
            headers={"accept-encoding": "identity", **(headers or {})},
            limits=limits,
            verify=True if verify is None else verify,
            trust_env=False,
            follow_redirects=False,
        )

    def _open(self, **options: Any) -> H:
        """Make the connections' owner."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._named!r})"

    def _request(self, call: Call[Any], left_s: float) -> dict[str, Any]:
        headers = {"accept": call.form, **call.headers}
        if call.body is not None:
            headers["content-type"] = call.form
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token() if callable(self._token) else self._token}"
        left_s = max(left_s, 0.001)
        timeout = httpx.Timeout(left_s, connect=min(CONNECT_S, left_s))
        return {
            "method": call.method,
            "url": call.path,
            "content": call.body,
            "headers": headers,
            "timeout": timeout,
        }

    def _following(self, call: Call[Change]) -> tuple[str, dict[str, Any], str | None]:
        timeout = httpx.Timeout(self._timeout_s, connect=min(CONNECT_S, self._timeout_s), read=SILENCE_S)
        request = {**self._request(call, self._timeout_s), "timeout": timeout}
        return self._named, request, call.headers.get("last-event-id")

    def _settled(self, call: Call[T], outcome: Reply | Exception) -> T:
        if isinstance(outcome, Reply):
            return answer_of(call, outcome, self._named)
        raise failure(outcome, self._named, self._timeout_s) from None


class Client(_Base[httpx.Client]):
    """Asks and waits; threads may share one.  A server that drips its answer can make a call take twice `timeout_s`.

        with Client("http://localhost:8090") as client:
            answer = client.match("m", Tokens(token_ids), candidates=pods, top_k=3)

    Raises ClientError.
    """

    def _open(self, **options: Any) -> httpx.Client:
        return httpx.Client(**options)

    def send(self, call: Call[T], /) -> T:
        """Send a call; the methods do."""
        deadline = time.monotonic() + self._timeout_s
        for left in reversed(range(self._tries)):
            outcome = self._once(call, deadline)
            more = again(call, outcome, deadline - time.monotonic()) if left else None
            if more is None:
                break
            time.sleep(more.pause_s)
        return self._settled(call, outcome)

    def follow(self, call: Call[Change], /) -> Changes:
        """Follow changes; the method does."""
        return Changes(self._http, *self._following(call))

    def close(self) -> None:
        """End its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _once(self, call: Call[Any], deadline: float) -> Reply | Exception:
        body, trace = Body(self._named, self._max_answer_bytes), Trace()
        request = self._request(call, deadline - time.monotonic())
        try:
            with self._http.stream(**request, extensions={"trace": trace}) as response:
                for chunk in response.iter_raw():
                    body.add(chunk)
                    if time.monotonic() > deadline:
                        return TimeoutError()
                return body.reply(response)
        except (httpx.HTTPError, OSError) as error:
            return trace.judged(error)


class AsyncClient(_Base[httpx.AsyncClient]):
    """The same for asyncio; its methods are awaited.

    async with AsyncClient("http://localhost:8090") as client:
        answer = await client.match("m", Tokens(token_ids))
    """

    def _open(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(**options)

    async def send(self, call: Call[T], /) -> T:
        """Send a call; the methods do."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        for left in reversed(range(self._tries)):
            outcome = await self._once(call, deadline)
            more = again(call, outcome, deadline - loop.time()) if left else None
            if more is None:
                break
            await asyncio.sleep(more.pause_s)
        return self._settled(call, outcome)

    def follow(self, call: Call[Change], /) -> AsyncChanges:
        """Follow changes; the method does."""
        return AsyncChanges(self._http, *self._following(call))

    async def close(self) -> None:
        """End its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _once(self, call: Call[Any], deadline: float) -> Reply | Exception:
        body, trace = Body(self._named, self._max_answer_bytes), Trace()
        request = self._request(call, deadline - asyncio.get_running_loop().time())
        request["extensions"] = {"trace": trace.awaited}
        try:
            async with asyncio.timeout_at(deadline), self._http.stream(**request) as response:
                async for chunk in response.aiter_raw():
                    body.add(chunk)
                return body.reply(response)
        except (httpx.HTTPError, OSError) as error:
            return trace.judged(error)
