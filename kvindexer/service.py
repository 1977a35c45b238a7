"""The composition root: the only module that knows everybody.

    settings ─► LiveFleet ─┬─► Registry      which sources exist
                           ├─► Subscriber    their sockets ─► Stream machines ─► ordered payloads
                           ├─► index         payloads ─► who holds what
                           └─► Keeper        a copy of all that in Redis, if there is one
                api.app ──────► index        questions ─► answers

Everything runs on one event loop in one thread: ingest in bounded slices, queries between them.  So no answer ever
sees half a batch, and nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import uvicorn
import uvloop

from kvindexer.api.app import create_app
from kvindexer.api.metrics import Metrics
from kvindexer.errors import KvIndexerError
from kvindexer.events.fleet import LeastTrusted, LiveFleet
from kvindexer.events.keeping import Keeper, Nobody
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Index, IndexLimits
from kvindexer.settings import Settings
from kvindexer.store.connect import open_client
from kvindexer.store.keeper import RedisKeeper
from kvindexer.store.layout import Names
from kvindexer.store.replica import replica_name
from kvindexer.store.server import ShardServer

_log = logging.getLogger(__name__)

DESCRIPTORS_A_SOURCE: Final = 8
"""SUB, its monitor's two ends, the TCP connection, a replay with its own, and room for its successor."""
SPARE_DESCRIPTORS: Final = 1024
GC_THRESHOLDS: Final = (50_000, 20, 100)
"""The index is dictionaries of integers, which hold no cycles: looking for some every 700 objects costs a fifth of
the ingest and stretches the slowest queries (docs/benchmarks.md)."""


def open_index(settings: Settings, least_trusted: LeastTrusted) -> Index:
    """The index engine; the one place where one is chosen."""
    limits = IndexLimits(
        max_entries=settings.max_entries,
        max_entries_per_source=settings.max_entries_per_source,
        max_orphans_per_source=settings.max_orphans_per_source,
        max_dead_bindings_per_source=settings.max_dead_bindings_per_source,
    )
    return PyIndex(limits, settings.media, least_trusted)


def open_keeper(settings: Settings) -> Keeper:
    """Who keeps a copy of the index; the one place where one is chosen."""
    if settings.store.kind == "memory":
        return Nobody()
    server = ShardServer(open_client(settings), Names(settings.store_namespace), settings.store_timeout_s)
    return RedisKeeper(settings, server, replica_name(settings))


class _Server(uvicorn.Server):
    """Uvicorn, with signals left to us: a stop by signal is a normal end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop gracefully at the first SIGTERM or SIGINT, at once at the second."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def _serve(settings: Settings, listener: socket.socket) -> None:
    metrics = Metrics()
    fleet = LiveFleet(settings, partial(open_index, settings), metrics, open_keeper(settings))
    metrics.watch(fleet)
    app = create_app(settings, fleet.index, fleet, metrics)
    config = uvicorn.Config(
        app,
        http="httptools",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
    )
    async with fleet.running():
        host, port = listener.getsockname()[:2]
        _log.info("serving on http://%s:%d with %d sources", host, port, len(settings.sources))
        await _Server(config).serve(sockets=[listener])


def _raise_descriptor_limit(settings: Settings) -> None:
    """Room for every source's sockets, as far as the operating system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_A_SOURCE * settings.max_sources + SPARE_DESCRIPTORS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        _log.warning(
            "only %d open files are allowed (RLIMIT_NOFILE): enough for about %d sources, not for max_sources=%d",
            allowed,
            max(0, allowed - SPARE_DESCRIPTORS) // DESCRIPTORS_A_SOURCE,
            settings.max_sources,
        )


def run(settings: Settings) -> int:
    """Serve until a signal; returns the exit status."""
    logging.basicConfig(
        stream=sys.stderr, level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    _raise_descriptor_limit(settings)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        sys.stderr.write(f"kvindexer: can't listen on {where}: {error.strerror}; choose another --host or --port\n")
        return 1
    try:
        uvloop.run(_serve(settings, listener))
    except KvIndexerError as error:
        sys.stderr.write(f"kvindexer: {error}\n")
        return 2
    return 0
