"""Spans of requests, walks, texts and calls on Redis, sent to an OpenTelemetry collector over HTTP.

    POST /v1/match                     a request; a caller's `traceparent` makes it part of the caller's trace
      ├─ tokenize                      its text, unless the tokens were known
      └─ index.match                   who holds it; once for each block size
    store.flush, store.read, ...       calls on Redis, each a trace of its own

Needs the extra `otel`; imported only where a collector is named.  Spans are kept in a bounded queue and sent by a
thread of OpenTelemetry's SDK: a collector that is slow or away costs spans, never queries.

Invariant: spans have names of ours, figures, and the models of the settings; never a prompt, tokens, salts, names of
instances, or what an exception says.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from threading import Thread
from time import perf_counter
from typing import Any, Final, cast
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvindexer import __version__
from kvindexer.errors import RequestError, StoreError, TokenizerFailedError
from kvindexer.index.seam import HolderMatch, Index
from kvindexer.settings import Settings
from kvindexer.store.server import ShardServer
from kvindexer.tokenization.blocks import TOKEN_BYTES
from kvindexer.tokenization.tokenizer import Completion, Text, Tokenized, Tokenizer
from kvindexer.types import Keyspace
from kvindexer.watching.tracing import CountSpans, Tracing
from kvindexer.watching.work import RECEIVED_AT, TRACE, Work, present

_log = logging.getLogger(__name__)

UNTRACED: Final = frozenset({"/health", "/ready", "/metrics", "/v1/changes"})
"""Probes, which say nothing, and streams, which don't end."""
CALLS: Final = frozenset(
    ("read", "records", "memory", "flush", "stage", "switch", "sweep", "remove", "hold", "release")
) | frozenset(("examine", "beat", "lines", "register"))
"""What is asked of Redis, one method each."""
BATCH_SPANS: Final = 512
SEND_EVERY_S: Final = 1.0
TRACES: Final = "/v1/traces"
FAULT: Final = 500
_CARRIED: Final = (b"traceparent", b"tracestate")


class Spans(Tracing):
    """Traces, for as long as `running` is entered; `count` is told what became of spans, by another thread."""

    def __init__(self, settings: Settings, count: CountSpans) -> None:
        self._timeout_s = settings.otlp_timeout_s
        resource = Resource.create(
            {
                "service.name": "kvindexer",
                "service.version": __version__,
                "service.instance.id": settings.replica or socket.gethostname(),
            }
        )
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.otlp_sample_ratio)),
            resource=resource,
            shutdown_on_exit=False,
        )
        sender = OTLPSpanExporter(endpoint=_address(settings.otlp_endpoint), timeout=settings.otlp_timeout_s)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                _Counted(sender, count),
                max_queue_size=settings.otlp_max_spans,
                max_export_batch_size=min(BATCH_SPANS, settings.otlp_max_spans),
                schedule_delay_millis=1000 * SEND_EVERY_S,
            )
        )
        self._tracer = self._provider.get_tracer("kvindexer", __version__)
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)  # `_Counted` says it, once

    def requests(self, app: ASGIApp) -> ASGIApp:
        """See `Tracing.requests`."""
        return _Requests(app, self._tracer)

    def index(self, index: Index) -> Index:
        """See `Tracing.index`."""
        return cast("Index", _Index(index, self._tracer))

    def tokenizer(self, model: str, tokenizer: Tokenizer) -> Tokenizer:
        """See `Tracing.tokenizer`."""
        return _Tokenizer(model, tokenizer, self._tracer)

    def server(self, server: ShardServer) -> ShardServer:
        """See `Tracing.server`."""
        return cast("ShardServer", _Server(server, self._tracer))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """See `Tracing.running`."""
        try:
            yield
        finally:
            # its own thread: the SDK may take longer than we want to wait, and nobody is to wait for it then
            ending = Thread(target=self._provider.shutdown, name="kvindexer-last-spans", daemon=True)
            ending.start()
            await asyncio.to_thread(ending.join, self._timeout_s)


def _address(endpoint: str) -> str:
    """Where spans go: what is said if it has a path, otherwise the usual one."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES


class _Counted(SpanExporter):
    """Counts what is sent, and says when that begins to fail and when it works again."""

    def __init__(self, sender: SpanExporter, count: CountSpans) -> None:
        self._sender = sender
        self._count = count
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send; whatever goes wrong is a failure, not an exception."""
        try:
            result = self._sender.export(spans)
        except Exception as error:  # noqa: BLE001 - of the SDK's thread, which has nobody to tell; it is logged
            _log.warning("spans can't be sent: %s", type(error).__name__)
            result = SpanExportResult.FAILURE
        sent = result is SpanExportResult.SUCCESS
        self._count("sent" if sent else "failed", len(spans))
        if self._failing == sent:
            self._failing = not sent
            _log.warning(
                "spans %s", "are sent again" if sent else "can't be sent: see otlp_endpoint and its collector"
            )
        return result

    def shutdown(self) -> None:
        """Hang up."""
        self._sender.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing waits here."""
        return self._sender.force_flush(timeout_millis)


@contextmanager
def _span(
    tracer: Tracer, name: str, kind: SpanKind = SpanKind.INTERNAL, attributes: Mapping[str, str] | None = None
) -> Iterator[Span]:
    """A span around what is done inside; of an exception it has our word for it, not what it says."""
    with tracer.start_as_current_span(
        name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield span
        except Exception as error:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", _word_for(error))
            raise


def _word_for(error: Exception) -> str:
    match error:
        case StoreError() | TokenizerFailedError():
            return error.reason
        case RequestError():
            return error.code
    return type(error).__name__


class _Requests:
    """Middleware, outside of everything else."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, in a span."""
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            await self._app(scope, receive, send)
            return
        carried = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CARRIED}
        span = self._tracer.start_span(scope["method"], self._propagator.extract(carried), SpanKind.SERVER)
        # of one that is not recorded too: what is done inside is part of it, and not recorded either
        with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            if span.is_recording():
                await self._recorded(span, scope, receive, send)
            else:
                await self._app(scope, receive, send)

    async def _recorded(self, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        began_at = perf_counter()
        scope[TRACE] = format_trace_id(span.get_span_context().trace_id)
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        await self._app(scope, receive, observed)
        work = present() or Work()
        span.update_name(f"{scope['method']} {work.route}")
        span.set_attributes(
            {
                "http.request.method": scope["method"],
                "http.route": work.route,
                "http.response.status_code": status,
                "kvindexer.prompts": work.prompts,
                "kvindexer.tokens": work.tokens,
                "kvindexer.hit_tokens": work.hit_tokens,
            }
        )
        if RECEIVED_AT in scope:
            span.set_attribute("kvindexer.receive_ms", round(1000 * (scope[RECEIVED_AT] - began_at), 3))
        if status >= FAULT:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", str(status))


class _Index:
    """The index, with a span for each walk."""

    def __init__(self, index: Index, tracer: Tracer) -> None:
        self._index = index
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        """Everything else is the index's own."""
        return getattr(self._index, name)

    def match(
        self,
        keyspace: Keyspace,
        keys: Sequence[int],
        prompt_tokens: int,
        candidates: Collection[str] | None = None,
    ) -> list[HolderMatch]:
        """See `Index.match`."""
        with _span(self._tracer, "index.match") as span:
            matches = self._index.match(keyspace, keys, prompt_tokens, candidates)
            span.set_attributes({"kvindexer.blocks": len(keys), "kvindexer.holders": len(matches)})
            return matches


class _Tokenizer:
    """A tokenizer, with a span for each text; that of the request which was the first to ask for its tokens."""

    def __init__(self, model: str, tokenizer: Tokenizer, tracer: Tracer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._tracer = tracer

    async def tokenize(self, text: Text) -> Tokenized:
        """See `Tokenizer.tokenize`."""
        kind = "completion" if isinstance(text, Completion) else "chat"
        attributes = {"kvindexer.model": self._model, "kvindexer.text": kind}
        with _span(self._tracer, "tokenize", attributes=attributes) as span:
            tokenized = await self._tokenizer.tokenize(text)
            span.set_attribute("kvindexer.tokens", len(tokenized.tokens) // TOKEN_BYTES)
            return tokenized

    async def close(self) -> None:
        """See `Tokenizer.close`."""
        await self._tokenizer.close()


class _Server:
    """The durable copy's server, with a span for each of `CALLS`."""

    def __init__(self, server: ShardServer, tracer: Tracer) -> None:
        self._server = server
        for name in CALLS:
            setattr(self, name, _called(name, getattr(server, name), tracer))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the server's own."""
        return getattr(self._server, name)


def _called(name: str, call: Callable[..., Awaitable[Any]], tracer: Tracer) -> Callable[..., Awaitable[Any]]:
    async def traced(*arguments: Any, **named: Any) -> Any:
        with _span(tracer, f"store.{name}", SpanKind.CLIENT, {"db.system.name": "redis"}):
            return await call(*arguments, **named)

    return traced
