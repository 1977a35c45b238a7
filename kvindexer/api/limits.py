"""A bound on the requests that are open at once; one more is told to come back, quickly and cheaply.

Probes are let through: a service that is busy is alive, and Prometheus should see how busy.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from kvindexer.api.errors import CLOSE, RefusedError
from kvindexer.errors import RequestError

PROBES: Final = frozenset({"/health", "/ready", "/metrics"})
RETRY_AFTER_S: Final = 1


class ConcurrencyLimit:
    """Middleware: counts the requests inside."""

    def __init__(self, app: ASGIApp, max_concurrent_requests: int) -> None:
        self._app = app
        self._most = max_concurrent_requests
        self._open = 0

    @property
    def figures(self) -> tuple[int, int]:
        """Requests that are open, and the most that may be."""
        return self._open, self._most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or raise RefusedError."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._open >= self._most:
            raise RefusedError(
                RequestError(
                    "overloaded",
                    f"{self._open} requests are being answered, the limit is {self._most}",
                    "try again later, or raise max_concurrent_requests",
                    status=503,
                ),
                (b"retry-after", b"%d" % RETRY_AFTER_S),
                CLOSE,
            )
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
