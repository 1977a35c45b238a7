"""Engines that list their publishers: registered by their HTTP address alone (vLLM 0.31 and newer).

    GET http://host:port/kv_event_sources
    {"0": {"endpoint": "tcp://10.0.0.7:5557", "replay_endpoint": "tcp://10.0.0.7:5657", "topic": ""}, "1": ...}

One entry a data-parallel rank.  The listing is asked for until the engine answers, and from time to time after that,
since an engine that restarts may publish on other ports.  A wildcard in place of a host means the engine's own.

Invariant: the sources of a listing are those of its last good answer; while it does not answer they stay.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import urllib.parse
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Final

import httpx
import msgspec

from kvindexer.errors import RequestError
from kvindexer.types import SourceSpec

_log = logging.getLogger(__name__)

PATH: Final = "/kv_event_sources"
SCHEMES: Final = ("http://", "https://")
RETRY_S: Final = 2.0
REFRESH_S: Final = 15.0
_TIMEOUT_S: Final = 5.0
_MAX_BYTES: Final = 1 << 20
_MAX_RANKS: Final = 1024
_OK: Final = 200
_NONE: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For engines that are asked in clear."""
_WILDCARDS: Final = ("*", "0.0.0.0", "[::]", "::")  # noqa: S104 - read from answers, not bound


class _Publisher(msgspec.Struct):
    endpoint: str
    replay_endpoint: str | None = None
    topic: str | None = None


_decode = msgspec.json.Decoder(dict[str, _Publisher]).decode


def is_listing(endpoint: str) -> bool:
    """Whether an endpoint is the address of an engine's HTTP server."""
    return endpoint.startswith(SCHEMES)


def publishers(spec: SourceSpec, body: bytes) -> list[SourceSpec]:
    """The sources that an engine's answer describes.  Raises ValueError if it can't be read."""
    try:
        listed = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a list of publishers: {error}") from None
    if len(listed) > _MAX_RANKS or not all(rank.isascii() and rank.isdigit() for rank in listed):
        raise ValueError("not a list of publishers by rank")
    host = urllib.parse.urlsplit(spec.endpoint).hostname or ""
    return [
        replace(
            spec,
            endpoint=_at_host(publisher.endpoint, host),
            replay=_at_host(publisher.replay_endpoint, host) if publisher.replay_endpoint else None,
            topic=spec.topic or publisher.topic or "",
            rank=int(rank),
        )
        for rank, publisher in sorted(listed.items())
    ]


def _at_host(endpoint: str, host: str) -> str:
    scheme, _, rest = endpoint.partition("://")
    name, _, port = rest.rpartition(":")
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}" if name in _WILDCARDS else endpoint


async def _fetch(url: str) -> bytes:
    """One GET, bounded in time and size, that ends at once when it is cancelled.  Raises OSError or ValueError."""
    certificates = _certificates() if url.startswith("https://") else _NONE
    try:
        async with (
            asyncio.timeout(_TIMEOUT_S),
            httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, verify=certificates) as client,
            client.stream("GET", url.rstrip("/") + PATH) as answer,
        ):
            if answer.status_code != _OK:
                raise ValueError(f"HTTP status {answer.status_code}")
            body = bytearray()
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > _MAX_BYTES:
                    raise ValueError(f"more than {_MAX_BYTES} bytes")
            return bytes(body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(str(error) or type(error).__name__) from None
    except TimeoutError:
        raise OSError(f"no answer within {_TIMEOUT_S:g} s") from None


@cache
def _certificates() -> ssl.SSLContext:
    """Those of the operating system; reading them takes a while."""
    return ssl.create_default_context()


class Listing:
    """One engine's list, kept up to date by a task of its own."""

    def __init__(
        self, spec: SourceSpec, register: Callable[[SourceSpec], object], forget: Callable[[SourceSpec], object]
    ) -> None:
        self.spec = spec
        self.why = f"waiting for {spec.endpoint}{PATH}"
        self.sources: list[SourceSpec] = []
        """What was registered by the last good answer."""
        self._register = register
        self._forget = forget
        self._task = asyncio.create_task(self._keep(), name=f"kvindexer-listing {spec.endpoint}")

    async def _keep(self) -> None:
        while True:
            try:
                self._adopt(publishers(self.spec, await _fetch(self.spec.endpoint)))
                pause_s = REFRESH_S if self.sources else RETRY_S
            except (OSError, ValueError, RequestError) as error:
                self._say(f"{self.spec.endpoint}{PATH}: {error}")
                pause_s = RETRY_S
            await asyncio.sleep(pause_s)

    def _adopt(self, listed: list[SourceSpec]) -> None:
        """Make the registered sources those of the list, the gone ones first, since a rank has one publisher."""
        for spec in [spec for spec in self.sources if spec not in listed]:
            self.sources.remove(spec)
            self._forget(spec)
        for spec in [spec for spec in listed if spec not in self.sources]:
            self._register(spec)
            self.sources.append(spec)
        self._say("listed" if listed else "the engine lists no publishers; is enable_kv_cache_events set?")

    def _say(self, why: str) -> None:
        if why != self.why:
            _log.info("listing of instance %s: %s", self.spec.instance, why)
        self.why = why

    async def close(self) -> None:
        """Ask no more; the sources are the caller's to forget."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def cancel(self) -> None:
        """Ask no more, without waiting for the end of a question under way."""
        self._task.cancel()
