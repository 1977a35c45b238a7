"""What listens: the service's own port, and the port for probes, both with uvicorn.

The headers that every answer has are added by uvicorn, also to those that no application makes:

    x-content-type-options: nosniff      nobody is to guess what an answer is
    cache-control: no-store              answers are of one moment, and somebody's
    strict-transport-security            with TLS: never plain HTTP again
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from kvindexer.access.kept import Trouble
from kvindexer.api import health
from kvindexer.api.body import BodyReader
from kvindexer.api.connection import Connection, ConnectionLimits, bounded
from kvindexer.api.fleet import Fleet
from kvindexer.api.limits import PROBES
from kvindexer.api.metrics import Metrics
from kvindexer.api.shield import Shield
from kvindexer.lull import Lull
from kvindexer.settings import Settings
from kvindexer.watching.requests import RequestLog

_log = logging.getLogger(__name__)

HANDSHAKE_S: Final = 10.0
"""For TLS to begin; asyncio's own 60 s would let idle connections pile up before anything counts them."""
PROBE_CONNECTIONS: Final = 256
PROBE_BODY_BYTES: Final = 64 * 1024
_HEADERS: Final = (("x-content-type-options", "nosniff"), ("cache-control", "no-store"))
_ONLY_TLS: Final = ("strict-transport-security", "max-age=31536000")


class Listener(uvicorn.Server):
    """Uvicorn with sockets that are there already, and a bound on TLS handshakes."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        config, loop = self.config, asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            return config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn calls it
                config=config, server_state=self.server_state, app_state={}
            )

        timeout_s = None if config.ssl is None else HANDSHAKE_S
        self.servers = [
            await loop.create_server(
                connection, sock=each, ssl=config.ssl, ssl_handshake_timeout=timeout_s, backlog=config.backlog
            )
            for each in sockets or ()
        ]
        self.started = True


class Unsignalled(Listener):
    """It ends when it is told to, not by a signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to others."""
        yield


def configured(
    app: ASGIApp, settings: Settings, context: ssl.SSLContext | None = None, lull: Lull | None = None
) -> uvicorn.Config:
    """How the service's own port is served."""
    limits = ConnectionLimits(
        receive_timeout_s=settings.receive_timeout_s,
        send_timeout_s=settings.send_timeout_s,
        max_connections=settings.max_connections,
    )
    return _config(app, settings, bounded(limits, lull), context)


def _config(
    app: ASGIApp, settings: Settings, connection: type[Connection], context: ssl.SSLContext | None = None
) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        headers=[*_HEADERS, *([] if context is None else [_ONLY_TLS])],
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
    )
    config.load()
    config.ssl = context
    return config


def create_probes(
    settings: Settings, fleet: Fleet, metrics: Metrics, access: Callable[[], Sequence[Trouble]]
) -> ASGIApp:
    """The application of the port for probes: three routes, for everybody."""
    rest = FastAPI(openapi_url=None, redirect_slashes=False)
    rest.include_router(health.routes(fleet, metrics, access))
    app = BodyReader(rest, PROBE_BODY_BYTES, settings.receive_timeout_s)
    return Shield(app, metrics, PROBES, RequestLog(settings))


@asynccontextmanager
async def probed(settings: Settings, app: ASGIApp, listener: socket.socket | None) -> AsyncIterator[None]:
    """Answer probes on a port of their own for as long as the service lives, if there is one."""
    if listener is None:
        yield
        return
    limits = ConnectionLimits(
        receive_timeout_s=settings.receive_timeout_s,
        send_timeout_s=settings.send_timeout_s,
        max_connections=PROBE_CONNECTIONS,
    )
    _log.info("probes on http://%s:%d", *listener.getsockname()[:2])
    server = Unsignalled(_config(app, settings, bounded(limits)))
    task = asyncio.create_task(server.serve(sockets=[listener]), name="kvindexer-probes")
    try:
        yield
    finally:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await task
