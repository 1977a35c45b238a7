"""TLS before a server whose binary may have been built without it: real certificates, real handshakes."""

from __future__ import annotations

import asyncio
import ssl
import threading
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

import trustme

_HOST: Final = "127.0.0.1"
_CHUNK_BYTES: Final = 64 * 1024


class TlsFront:
    """Ends TLS on a port of its own and passes everything on; runs in a thread, so that any test can use it.

    `name` is whom the certificate is for; with `client_certificates` the client needs one as well.
    """

    def __init__(self, port: int, *, name: str = _HOST, client_certificates: bool = False) -> None:
        self._upstream = port
        self._files = TemporaryDirectory(prefix="kvindexer-tls-")
        authority = trustme.CA()
        self.ca_certs = self._file("ca.pem")
        authority.cert_pem.write_to_path(str(self.ca_certs))
        own = authority.issue_cert("kvindexer.example")
        self.certfile, self.keyfile = self._file("client.pem"), self._file("client.key")
        own.cert_chain_pems[0].write_to_path(str(self.certfile))
        own.private_key_pem.write_to_path(str(self.keyfile))
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name).configure_cert(self._context)
        if client_certificates:
            authority.configure_trust(self._context)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="TLS front")
        self._thread.start()
        self.port = started.result()

    def url(self, *, trust: bool = True, **options: str) -> str:
        """As the setting `store` takes it; with `trust` the certificate's authority is among the options."""
        chosen = {"ca_certs": str(self.ca_certs), **options} if trust else options
        return f"rediss://{_HOST}:{self.port}?" + "&".join(f"{key}={value}" for key, value in chosen.items())

    def _file(self, name: str) -> Path:
        return Path(self._files.name) / name

    def _run(self, started: Future[int]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(started))
        finally:
            self._loop.close()

    async def _serve(self, started: Future[int]) -> None:
        links: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            link = asyncio.ensure_future(self._carry(reader, writer))
            links.add(link)
            link.add_done_callback(links.discard)

        # the handshakes that a test lets fail are none of the event loop's worries
        self._loop.set_exception_handler(lambda _loop, _context: None)
        server = await asyncio.start_server(accept, _HOST, 0, ssl=self._context)
        started.set_result(server.sockets[0].getsockname()[1])
        await self._end.wait()
        server.close()
        for link in list(links):
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection(_HOST, self._upstream)
        ways = [asyncio.ensure_future(_pipe(reader, forth)), asyncio.ensure_future(_pipe(back, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (forth, writer):
                end.transport.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._files.cleanup()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
