"""A service behind its own listeners, as `kvindexer serve` puts them up, in a thread of the test."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvloop

from api_server import Api
from kvindexer.api.listeners import Unsignalled, configured, create_probes, probed

HOST = "127.0.0.1"


class Listening:
    """What listens, and where."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.socket = socket.create_server((HOST, 0))
        self.probes = None if api.settings.probe_port is None else socket.create_server((HOST, 0))
        self.port: int = self.socket.getsockname()[1]
        self.probe_port: int = 0 if self.probes is None else self.probes.getsockname()[1]
        self.config = configured(api.app, api.settings, api.access.context)
        self.server = Unsignalled(self.config)
        self.started = threading.Event()

    async def serve(self) -> None:
        """Until told to end."""
        api = self.api
        app = create_probes(api.settings, api.fleet, api.metrics, api.access.problems)
        async with api.access.watched(), probed(api.settings, app, self.probes):
            asyncio.get_running_loop().call_soon(self.started.set)
            await self.server.serve(sockets=[self.socket])

    def client(self, trust: ssl.SSLContext | None = None, **options: Any) -> httpx.Client:
        """Somebody who asks; with `trust` over TLS."""
        scheme = "http" if trust is None else "https"
        return httpx.Client(
            base_url=f"{scheme}://{HOST}:{self.port}", verify=trust or True, trust_env=False, timeout=20, **options
        )

    def dial(self) -> socket.socket:
        """A connection on which a test says what it likes."""
        return socket.create_connection((HOST, self.port), timeout=20)


@contextmanager
def listening(loop: str = "uvloop", **settings: Any) -> Iterator[Listening]:
    """A service that listens while it is entered."""
    found = Listening(Api(**settings))
    run = uvloop.run if loop == "uvloop" else asyncio.run
    thread = threading.Thread(target=run, args=(found.serve(),), name="listening")
    thread.start()
    try:
        assert found.started.wait(20)
        yield found
    finally:
        found.server.should_exit = True
        thread.join()


def heard(connection: socket.socket) -> bytes:
    """Everything that comes until the other side hangs up."""
    said = b""
    while piece := connection.recv(65536):
        said += piece
    return said
