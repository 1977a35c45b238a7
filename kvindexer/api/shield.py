"""The outermost layer: every request gets an answer in the one error shape, is counted, and may get a line.

What goes wrong inside is logged with its place in the code, without the text of the exception: that could hold
tokens.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Collection
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvindexer.access.identity import caller
from kvindexer.api.body import DisconnectedError
from kvindexer.api.errors import internal_error, send_error
from kvindexer.api.metrics import Metrics
from kvindexer.errors import RequestError
from kvindexer.watching.requests import RequestLog
from kvindexer.watching.work import RECEIVED_AT, TRACE, begin

_log = logging.getLogger(__name__)


class Shield:
    """Middleware: turns exceptions into answers; `routes` are the paths that exist."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str], lines: RequestLog) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0
        work = begin()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except DisconnectedError:
            return
        except RequestError as error:
            await send_error(observed, error)
        except Exception as error:  # noqa: BLE001 - the last place that can answer; it is logged
            self._log(scope, error)
            if not status:
                await send_error(observed, internal_error())
        work.route = scope["path"] if scope["path"] in self._routes else "other"
        received_at = scope.get(RECEIVED_AT)
        seconds = None if received_at is None else perf_counter() - received_at
        self._metrics.answered(work.route, status, seconds)
        known = caller()
        name = None if known is None else known.name
        self._lines.answered(scope["method"], status, seconds, work=work, caller=name, trace=scope.get(TRACE))

    def _log(self, scope: Scope, error: Exception) -> None:
        place = "".join(traceback.format_tb(error.__traceback__))
        route = scope["path"] if scope["path"] in self._routes else "a route that does not exist"
        _log.error("%s %s failed: %s at\n%s", scope["method"], route, type(error).__name__, place)
