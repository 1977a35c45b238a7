"""The composition root: the only module that knows everybody.

    settings ─► LiveFleet ─┬─► Registry      which sources exist
                           ├─► Subscriber    their sockets ─► Stream machines ─► ordered payloads
                           ├─► index         payloads ─► who holds what
                           └─► Keeper        a copy of all that in Redis, if there is one
             Texts             prompts as text ─► tokens
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn
import uvloop

from kvindexer.api.app import create_app
from kvindexer.api.metrics import Metrics
from kvindexer.errors import KvIndexerError, SettingsError
from kvindexer.events.fleet import LeastTrusted, LiveFleet
from kvindexer.events.keeping import Keeper, Nobody
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Index, IndexLimits
from kvindexer.reload import Reloads
from kvindexer.settings import Settings
from kvindexer.settings.tokenizer import key_of
from kvindexer.store.connect import open_client
from kvindexer.store.keeper import RedisKeeper
from kvindexer.store.layout import Names
from kvindexer.store.replica import replica_name
from kvindexer.store.server import ShardServer
from kvindexer.tiering.speculative import Speculation
from kvindexer.tokenization.engines import Engines
from kvindexer.tokenization.local import LocalTokenizer, UnusableTokenizerError
from kvindexer.tokenization.remote import FAIR_SHARE, RemoteTokenizer
from kvindexer.tokenization.texts import TextLimits, Texts
from kvindexer.tokenization.tokenizer import Tokenizer
from kvindexer.watching.logs import loop_fault, set_up

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


def open_texts(settings: Settings, count: Callable[[str], None] = lambda _: None) -> Texts:
    """What makes tokens of texts.  Raises SettingsError for files that can't be used."""
    limits = TextLimits(
        max_text_bytes=settings.max_text_bytes,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_concurrent_texts=min(settings.max_concurrent_texts, max(1, settings.max_concurrent_requests // 2)),
        tokenizer_timeout_s=settings.tokenizer_timeout_s,
        tokenizer_cache_bytes=settings.tokenizer_cache_bytes,
        tokenizer_cache_ttl_s=settings.tokenizer_cache_ttl_s,
    )
    return Texts({model: _tokenizer(settings, model) for model in settings.tokenizers}, limits, count)


def _tokenizer(settings: Settings, model: str) -> Tokenizer:
    spec = settings.tokenizers[model]
    if spec.path:
        template = Path(spec.chat_template) if spec.chat_template else None
        try:
            return LocalTokenizer(Path(spec.path), template, threads=settings.tokenizer_threads)
        except UnusableTokenizerError as error:
            raise SettingsError(key_of(model), spec.path, error.expected) from None
    key = settings.tokenizer_api_key
    connections = settings.tokenizer_connections
    engines = Engines(
        spec.engines,
        connections=connections,
        answer_max_bytes=settings.tokenizer_answer_max_bytes,
        fair_s=settings.tokenizer_timeout_s * FAIR_SHARE,
        api_key=key.get_secret_value() if key else None,
    )
    return RemoteTokenizer(
        engines, spec.model or model, timeout_s=settings.tokenizer_timeout_s, connections=connections
    )


class _Server(uvicorn.Server):
    """Uvicorn, with signals left to us: a stop by signal is a normal end."""

    def __init__(self, config: uvicorn.Config, fleet: LiveFleet) -> None:
        super().__init__(config)
        self._fleet = fleet

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End after a farewell at SIGTERM, gracefully at SIGINT or the next signal, at once at one SIGINT more."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._farewell)
        loop.add_signal_handler(signal.SIGINT, self.handle_exit, signal.SIGINT, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End gracefully: streams hear of it, and don't hold the end up."""
        self._fleet.leaving = True
        super().handle_exit(sig, frame)

    def _farewell(self) -> None:
        """Serve on until load balancers have seen that we leave, and end each connection with its next answer."""
        delay_s = 0.0 if self._fleet.leaving else self._fleet.settings.drain_s
        if delay_s:
            _log.info("leaving in %g s", delay_s)
            for headers in (self.config.encoded_headers, self.server_state.default_headers):
                headers.append((b"connection", b"close"))
        self._fleet.leaving = True
        asyncio.get_running_loop().call_later(delay_s, self.handle_exit, signal.SIGTERM, None)


async def _serve(settings: Settings, listener: socket.socket, reloads: Reloads) -> None:
    asyncio.get_running_loop().set_exception_handler(loop_fault)
    metrics = Metrics()
    speculation = Speculation(settings.max_speculative_blocks)
    fleet = LiveFleet(settings, partial(open_index, settings), metrics, open_keeper(settings), speculation)
    metrics.watch(fleet)
    texts = open_texts(settings, metrics.text)
    app = create_app(settings, fleet.index, fleet, metrics, texts, speculation=speculation)
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
    async with fleet.running(), reloads.running(settings, fleet, metrics.reloaded):
        host, port = listener.getsockname()[:2]
        _log.info("serving on http://%s:%d with %d sources", host, port, len(settings.sources))
        try:
            await _Server(config, fleet).serve(sockets=[listener])
        finally:
            await texts.close()


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


def run(settings: Settings, reloads: Reloads) -> int:
    """Serve until a signal; returns the exit status.  `reloads` reads the settings again when it is asked to."""
    set_up(settings, settings.log_level)
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
        uvloop.run(_serve(settings, listener, reloads))
    except KvIndexerError as error:
        sys.stderr.write(f"kvindexer: {error}\n")
        return 2
    return 0
