"""The HTTP servers of one model's engines: asked in turn, those that are down left out until they are well.

    up ──no connection, no answer in time, 429, 502-504──► down ──GET /health is answered──► up

A text that had to wait for its turn leaves a server little time: not answering in that is no sign of illness.

A server that is down is asked for its health after a pause that doubles with every failure; only tokens that it
delivers make it short again.  Any answer but a 5xx counts as health: not all servers have that route.

Invariant: every wait ends, every answer is bounded in bytes, and no error holds a piece of a request or answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import httpx

_log = logging.getLogger(__name__)

HEALTH: Final = "/health"
CONNECT_S: Final = 1.0
HEALTH_S: Final = 2.0
KEEPALIVE_S: Final = 2.0
"""Idle connections are closed before the servers do so (uvicorn: after 5 s), or a request could run into that."""
PAUSE_MIN_S: Final = 0.5
PAUSE_MAX_S: Final = 30.0
_SERVER_ERRORS: Final = 500
_OVERLOADED: Final = frozenset({429, 502, 503, 504})
_JSON: Final = {"content-type": "application/json", "accept-encoding": "identity"}


class EngineError(Exception):
    """This engine has no usable answer; another one may have.  `kind` is a short fixed phrase."""

    def __init__(self, kind: str, *, slow: bool = False) -> None:
        self.kind = kind
        self.slow = slow
        super().__init__(kind)


class Answer(NamedTuple):
    """What a server said."""

    status: int
    body: bytes


@dataclass(eq=False)
class Engine:
    """One server, as far as we know it."""

    url: str
    failures: int = 0
    renderless_until: float = 0.0
    """Until then (on the loop's clock) we remember that it does not render chats."""
    probe: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def up(self) -> bool:
        """Whether to ask it."""
        return self.probe is None


class Engines:
    """All servers of a model, and the connections to them."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        connections: int,
        answer_max_bytes: int,
        fair_s: float,
        api_key: str | None = None,
    ) -> None:
        """`fair_s` is the time in which a server that is well should answer."""
        self._engines = [Engine(url.rstrip("/")) for url in urls]
        self._next = random.randrange(len(urls))  # noqa: S311 - replicas needn't begin with the same one
        self._connections = connections
        self._answer_max_bytes = answer_max_bytes
        self._fair_s = fair_s
        self._headers = _JSON | ({"authorization": f"Bearer {api_key}"} if api_key else {})
        self._open: httpx.AsyncClient | None = None

    @property
    def _client(self) -> httpx.AsyncClient:
        """Made when it is first needed: that takes certificates from the disk, and a running loop."""
        if self._open is None:
            most = self._connections
            limits = httpx.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=KEEPALIVE_S)
            self._open = httpx.AsyncClient(
                limits=limits, headers=self._headers, timeout=CONNECT_S, trust_env=False, follow_redirects=False
            )
        return self._open

    def in_turn(self, most: int) -> list[Engine]:
        """The servers to try for one text, at most so many: another one is first every time."""
        first = self._next
        self._next = (first + 1) % len(self._engines)
        ordered = self._engines[first:] + self._engines[:first]
        return [engine for engine in ordered if engine.up][:most]

    async def post(self, engine: Engine, path: str, body: bytes, within_s: float) -> Answer:
        """One request.  Raises EngineError; the engine is then down if it looks like that."""
        try:
            answer = await self._request("POST", engine.url + path, body, within_s)
        except EngineError as error:
            if not error.slow or within_s >= self._fair_s:
                self._down(engine, error.kind)
            raise
        if answer.status in _OVERLOADED:
            self._down(engine, f"status {answer.status}")
            raise EngineError(f"status {answer.status}")
        return answer

    def delivered(self, engine: Engine) -> None:
        """It has made tokens: all is well."""
        engine.failures = 0

    async def close(self) -> None:
        """End probes and connections."""
        probes = [engine.probe for engine in self._engines if engine.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        if self._open is not None:
            await self._open.aclose()
            self._open = None

    async def _request(self, method: str, url: str, body: bytes | None, within_s: float) -> Answer:
        try:
            async with asyncio.timeout(within_s):
                timeout = httpx.Timeout(within_s, connect=min(CONNECT_S, within_s))
                async with self._client.stream(method, url, content=body, timeout=timeout) as response:
                    if "content-encoding" in response.headers:
                        raise EngineError("an encoding that was not asked for")
                    return Answer(response.status_code, await self._read(response))
        except (TimeoutError, httpx.TimeoutException):
            raise EngineError("no answer in time", slow=True) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise EngineError(f"no connection ({type(error).__name__})") from None

    async def _read(self, response: httpx.Response) -> bytes:
        chunks = []
        left = self._answer_max_bytes
        async for chunk in response.aiter_raw():
            left -= len(chunk)
            if left < 0:
                raise EngineError("an answer beyond tokenizer_answer_max_bytes")
            chunks.append(chunk)
        return b"".join(chunks)

    def _down(self, engine: Engine, kind: str) -> None:
        if engine.probe is None:
            _log.warning("engine %s makes no tokens: %s", engine.url, kind)
            engine.probe = asyncio.create_task(self._until_well(engine), name=f"kvindexer-engine {engine.url}")

    async def _until_well(self, engine: Engine) -> None:
        while True:
            pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0 ** min(engine.failures, 10))
            engine.failures += 1
            await asyncio.sleep(pause_s * random.uniform(0.9, 1.1))  # noqa: S311
            try:
                answer = await self._request("GET", engine.url + HEALTH, None, HEALTH_S)
            except EngineError:
                continue
            if answer.status < _SERVER_ERRORS:
                _log.info("engine %s is asked for tokens again", engine.url)
                engine.probe = None
                return
