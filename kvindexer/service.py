"""The composition root: the only module that knows everybody.

    settings ─► LiveFleet ─┬─► Registry      which sources exist
                           ├─► Subscriber    their sockets ─► Stream machines ─► ordered payloads
                           ├─► index         payloads ─► who holds what
                           ├─► Keeper        a copy of all that in Redis, if there is one
             Finder ───────┘                 sources that nobody names: pods
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
from typing import TYPE_CHECKING, Final, NamedTuple

import uvloop

from kvindexer.access.opening import open_access
from kvindexer.api.app import create_app
from kvindexer.api.listeners import Listener, configured, create_probes, probed
from kvindexer.api.metrics import Metrics
from kvindexer.errors import KvIndexerError, SettingsError
from kvindexer.events.descriptors import room_in, shortage, wanted_descriptors
from kvindexer.events.discovery.finder import KubernetesFinder
from kvindexer.events.finding import Finder, Nowhere
from kvindexer.events.fleet import LeastTrusted, LiveFleet
from kvindexer.events.keeping import Keeper, Nobody
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Index, IndexLimits
from kvindexer.lull import Lull
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
from kvindexer.watching.tracing import CountSpans, Tracing

if TYPE_CHECKING:
    from uvicorn import Config

_log = logging.getLogger(__name__)

NO_TRACER: Final = "OpenTelemetry to be installed: pip install 'kvindexer[otel]'"
NO_CLIENT: Final = "a client of Kubernetes to be installed: pip install 'kvindexer[kubernetes]'"
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


def open_finder(settings: Settings) -> Finder:
    """Who finds sources; the one place where one is chosen.  Raises SettingsError if that can't begin."""
    if settings.discovery == "none":
        return Nowhere()
    try:
        from kvindexer.events.discovery.cluster import open_cluster  # noqa: PLC0415 - needs an extra
    except ImportError:
        raise SettingsError("discovery", settings.discovery, NO_CLIENT) from None
    return KubernetesFinder(settings, open_cluster(settings))


def open_tracing(settings: Settings, count: CountSpans = lambda _, __: None) -> Tracing:
    """Who is told where the time goes; the one place where one is chosen.  Raises SettingsError."""
    if not settings.otlp_endpoint:
        return Tracing()
    try:
        from kvindexer.watching.spans import Spans  # noqa: PLC0415 - needs an extra
    except ImportError:
        raise SettingsError("otlp_endpoint", settings.otlp_endpoint, NO_TRACER) from None
    return Spans(settings, count)


def open_keeper(settings: Settings, lull: Lull, tracing: Tracing | None = None) -> Keeper:
    """Who keeps a copy of the index; the one place where one is chosen."""
    if settings.store.kind == "memory":
        return Nobody()
    server = ShardServer(open_client(settings), Names(settings.store_namespace), settings.store_timeout_s)
    return RedisKeeper(settings, (tracing or Tracing()).server(server), replica_name(settings), lull)


def open_texts(
    settings: Settings, count: Callable[[str], None] = lambda _: None, tracing: Tracing | None = None
) -> Texts:
    """What makes tokens of texts.  Raises SettingsError for files that can't be used."""
    limits = TextLimits(
        max_text_bytes=settings.max_text_bytes,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_concurrent_texts=min(settings.max_concurrent_texts, max(1, settings.max_concurrent_requests // 2)),
        tokenizer_timeout_s=settings.tokenizer_timeout_s,
        tokenizer_cache_bytes=settings.tokenizer_cache_bytes,
        tokenizer_cache_ttl_s=settings.tokenizer_cache_ttl_s,
    )
    traced = tracing or Tracing()
    tokenizers = {model: traced.tokenizer(model, _tokenizer(settings, model)) for model in settings.tokenizers}
    return Texts(tokenizers, limits, count)


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


class _Server(Listener):
    """With signals left to us: a stop by signal is a normal end."""

    def __init__(self, config: Config, fleet: LiveFleet) -> None:
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


class _Sockets(NamedTuple):
    """What a service listens on."""

    service: socket.socket
    probes: socket.socket | None


async def _serve(settings: Settings, sockets: _Sockets, reloads: Reloads) -> None:
    asyncio.get_running_loop().set_exception_handler(loop_fault)
    metrics = Metrics()
    speculation = Speculation(settings.max_speculative_blocks)
    tracing = open_tracing(settings, metrics.spans)
    lull = Lull()
    keeper, finder = open_keeper(settings, lull, tracing), open_finder(settings)
    fleet = LiveFleet(settings, partial(open_index, settings), metrics, keeper, speculation, finder=finder)
    metrics.watch(fleet)
    texts = open_texts(settings, metrics.text, tracing)
    access = open_access(settings)
    index = tracing.index(fleet.index)
    app = create_app(settings, index, fleet, metrics, texts, speculation=speculation, access=access)
    config = configured(tracing.requests(app), settings, access.context, lull)
    probes = create_probes(settings, fleet, metrics, access.problems)
    async with (
        tracing.running(),
        fleet.running(),
        access.watched(),
        reloads.running(settings, fleet, metrics.reloaded, access.reload),
        probed(settings, probes, sockets.probes),
    ):
        scheme, (host, port) = "http" if access.context is None else "https", sockets.service.getsockname()[:2]
        _log.info("serving on %s://%s:%d with %d sources", scheme, host, port, len(settings.sources))
        try:
            await _Server(config, fleet).serve(sockets=[sockets.service])
        finally:
            await texts.close()


def _raise_descriptor_limit(settings: Settings) -> None:
    """Room for every source's sockets, as far as the operating system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = wanted_descriptors(settings)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if message := shortage(settings, allowed):
        _log.warning("%s", message)
    elif allowed < wanted:
        _log.info("%d open files are allowed: enough for about %d sources", allowed, room_in(allowed, settings))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def run(settings: Settings, reloads: Reloads) -> int:
    """Serve until a signal; returns the exit status.  `reloads` reads the settings again when it is asked to."""
    set_up(settings, settings.log_level)
    _raise_descriptor_limit(settings)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    listening: list[socket.socket] = []
    for host, port in ((settings.host, settings.port), (settings.probe_host or settings.host, settings.probe_port)):
        if port is None:
            continue
        try:
            listening.append(_listen(host, port))
        except OSError as error:
            names = "probe_host or probe_port" if listening else "--host or --port"
            why = (error.strerror or str(error)).partition(" (while ")[0]  # create_server adds the address again
            sys.stderr.write(f"kvindexer: can't listen on {host}:{port}: {why}; choose another {names}\n")
            return 1
    probes = (*listening, None)[1]
    try:
        uvloop.run(_serve(settings, _Sockets(listening[0], probes), reloads))
    except KvIndexerError as error:
        sys.stderr.write(f"kvindexer: {error}\n")
        return 2
    return 0
