"""Traces: what a collector is told, what it is never told, and that nobody waits for one that is slow or away."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from gzip import decompress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from kvindexer.api.metrics import Metrics
from kvindexer.errors import SettingsError
from kvindexer.lull import Lull
from kvindexer.service import open_keeper, open_texts, open_tracing
from kvindexer.settings import Settings, load_settings
from kvindexer.testing import FakeEngine
from kvindexer.watching.tracing import Tracing
from servers import Server
from test_logs import MARKED_DEPLOYMENT, MARKED_SALT, MARKED_TEXT, MARKED_TOKENS, MARKS
from tokenizing import fake_engine, reply
from watched import Watched, eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER = "1af7651916cd43dd8448eb211c80319d"
PARENT = "b7ad6b7169203331"


class Collector:
    """An OTLP collector over HTTP; `answer` and `delay` may be changed while it runs."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.paths: set[str] = set()
        self.status = 200
        self.hangs = False
        self.released = threading.Event()
        self.url = ""

    @property
    def spans(self) -> list[Span]:
        """All that came in so far."""
        return [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        """Wait for a span."""
        eventually(f"a span {name}", lambda: bool(self.named(name)))
        return self.named(name)[0]

    @property
    def text(self) -> str:
        return "".join(map(str, self.requests))


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = decompress(body)
            if collector.hangs:
                collector.released.wait(60)
            if collector.status == 200:
                collector.paths.add(self.path)
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
            content = ExportTraceServiceResponse().SerializeToString()
            self.send_response(collector.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.released.set()
        server.shutdown()
        server.server_close()


def told(span: Span) -> dict[str, Any]:
    """The attributes of a span."""
    values = {}
    for attribute in span.attributes:
        kind = attribute.value.WhichOneof("value")
        values[attribute.key] = getattr(attribute.value, kind)
    return values


def traced(collector: Collector, **settings: str) -> dict[str, str]:
    return {"otlp_endpoint": collector.url, "otlp_sample_ratio": "1", "otlp_timeout_s": "1", **settings}


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as one:
        yield one


def followed(service: Watched, engine: FakeEngine, **fields: Any) -> dict[str, Any]:
    """An engine is followed, and holds a prompt; returns the question about it."""
    service.follow(engine, **fields)
    engine.run_request(MARKED_TOKENS, salt=MARKED_SALT)
    asked = {"model": "m", "tokens": MARKED_TOKENS, "cache_salt": MARKED_SALT}
    eventually("the blocks are found", lambda: service.post("/v1/match", asked)["matches"] != [])
    return asked


# On


def test_a_query_its_text_and_the_store_are_traced_and_no_secret_is_in_any_span(
    tmp_path: Path, redis_server: Server, engine: FakeEngine
) -> None:
    with collecting() as collector, fake_engine() as tokenizer:
        settings = traced(
            collector,
            store=redis_server.url,
            tokenizers=json.dumps({"m": {"engines": [tokenizer.url]}}),
        )
        with Watched(tmp_path, **settings) as service:
            asked = followed(service, engine, additional_salt=MARKED_DEPLOYMENT)
            service.client.get("/health")
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            service.post("/v1/match", {"model": "m", "prompt": MARKED_TEXT}, headers=headers)
            service.post("/query", {"model": "m", "token_ids": MARKED_TOKENS, "cache_salt": MARKED_SALT})
            tokenizer.says["/tokenize"] = lambda _: reply({"error": MARKED_TEXT}, 500)
            for path, body in (
                ("/v1/match", {"model": "m", "prompt": f"{MARKED_TEXT} again"}),
                ("/v1/match", {"model": MARKED_TEXT, "tokens": [MARKED_TEXT]}),
                (f"/{MARKED_SALT}", asked),
            ):
                assert service.client.post(path, json=body, headers=headers).status_code >= 400
            (ours,) = [span for span in [collector.one("tokenize")] if span.trace_id.hex() == TRACE]
            eventually("the store is traced", lambda: {"store.beat"} <= {span.name for span in collector.spans})
            eventually("unknown routes are, too", lambda: bool(collector.named("POST other")))
            assert service.value("kvindexer_trace_spans_total", outcome="sent") >= len(collector.spans) - 50
        spans = collector.spans
    assert collector.paths == {"/v1/traces"}
    (request,) = [span for span in spans if span.span_id == ours.parent_span_id]
    assert (request.name, request.trace_id.hex(), request.parent_span_id.hex()) == ("POST /v1/match", TRACE, PARENT)
    assert request.kind == Span.SPAN_KIND_SERVER
    figures = told(request)
    assert figures.pop("kvindexer.receive_ms") >= 0
    assert figures == {
        "http.request.method": "POST",
        "http.route": "/v1/match",
        "http.response.status_code": 200,
        "kvindexer.prompts": 1,
        "kvindexer.tokens": 5,
        "kvindexer.hit_tokens": 0,
    }
    assert told(ours) == {"kvindexer.model": "m", "kvindexer.text": "completion", "kvindexer.tokens": 5}
    walk = next(span for span in spans if span.name == "index.match" and span.parent_span_id == request.span_id)
    assert told(walk) == {"kvindexer.blocks": 0, "kvindexer.holders": 0}
    failed = [span for span in spans if span.name == "tokenize" and told(span).get("error.type")]
    assert [told(span)["error.type"] for span in failed] == ["engines"]
    assert {span.name for span in spans} >= {
        "POST /query",
        "POST other",
        "POST /register",
        "store.beat",
        "store.read",
    }
    assert not any(span.events for span in spans), "no exception is attached"
    assert not {"GET /health", "GET /metrics"} & {span.name for span in spans}
    resource = {
        pair.key: pair.value.string_value for pair in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert (resource["service.name"], resource["service.instance.id"]) == ("kvindexer", "a")
    for mark in (*MARKS, "pod-a", engine.endpoint):
        assert mark not in collector.text, mark


@pytest.mark.proof
def test_at_ratio_0_only_what_callers_sample_is_traced(tmp_path: Path, engine: FakeEngine) -> None:
    with collecting() as collector, Watched(tmp_path, **traced(collector, otlp_sample_ratio="0")) as service:
        asked = followed(service, engine)
        service.post("/v1/match", asked, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert collector.one("POST /v1/match").trace_id.hex() == TRACE
        assert {span.trace_id.hex() for span in collector.spans} == {TRACE}


def test_at_ratio_1_callers_may_leave_theirs_out_and_the_line_of_a_request_names_its_trace(
    tmp_path: Path, engine: FakeEngine
) -> None:
    """A `traceparent` that can't be read is none."""
    with (
        collecting() as collector,
        Watched(tmp_path, log_requests="all", log_format="json", **traced(collector)) as service,
    ):
        asked = followed(service, engine)
        service.post("/v1/match", asked, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        service.post("/v1/match", asked, headers={"traceparent": f"00-{OTHER}-{PARENT}-00"})
        known = len(collector.named("POST /v1/match"))
        for broken in ("", "00-zz-b7ad6b7169203331-01", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000):
            service.post("/v1/match", asked, headers={"traceparent": broken})
        eventually("the others are traced", lambda: len(collector.named("POST /v1/match")) >= known + 4)
        assert OTHER not in {span.trace_id.hex() for span in collector.spans}
        lines = [json.loads(line) for line in service.process.log.splitlines()]
        assert [line["route"] for line in lines if line.get("trace") == TRACE] == ["/v1/match"]


# A collector in trouble


@pytest.mark.parametrize(
    "trouble", ["refuses", *(pytest.param(trouble, marks=pytest.mark.proof) for trouble in ("hangs", "is away"))]
)
def test_queries_go_on_whatever_the_collector_does_and_the_end_does_not_wait_for_it(
    tmp_path: Path, engine: FakeEngine, trouble: str
) -> None:
    """More spans than there is room for: they are dropped; one line says that they can't be sent."""
    with collecting() as collector:
        collector.status = 400 if trouble == "refuses" else 200
        collector.hangs = trouble == "hangs"
        settings = traced(collector, otlp_max_spans="16")
        if trouble == "is away":
            settings["otlp_endpoint"] = "http://127.0.0.1:1"
        with Watched(tmp_path, **settings) as service:
            asked = followed(service, engine)
            for _ in range(100):
                assert service.post("/v1/match", asked)["matches"] != []
            eventually(
                "failures are counted", lambda: service.value("kvindexer_trace_spans_total", outcome="failed") > 0
            )
            if trouble == "refuses":
                collector.status = 200
                service.post("/v1/match", asked)
                eventually("spans are sent again", lambda: "spans are sent again" in service.process.log)
            before = monotonic()
            service.process.end(signal.SIGINT)
            assert monotonic() - before < 10
            log = service.process.log
    assert log.count("spans can't be sent: see otlp_endpoint") == 1
    assert "Traceback" not in log
    assert "127.0.0.1:1/" not in log


# Off


def test_without_a_collector_nothing_is_wrapped_and_nothing_of_opentelemetry_is_there() -> None:
    """What goes in comes out; the SDK is not even imported."""
    tracing = open_tracing(Settings(), Metrics().spans)
    assert type(tracing) is Tracing
    hands: list[Any] = [tracing.requests, tracing.index, partial(tracing.tokenizer, "m"), tracing.server]
    for hand in hands:
        anything = object()
        assert hand(anything) is anything


def test_a_service_without_a_collector_does_not_import_the_sdk(tmp_path: Path) -> None:
    """redis-py brings the API, and parts of the SDK where they are installed; neither makes a span."""
    code = (
        "import sys, kvindexer.service; print({'opentelemetry.sdk.trace', 'opentelemetry.exporter'} & {*sys.modules})"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_one_module_knows_opentelemetry() -> None:
    """So that leaving the module out leaves all of it out."""
    root = Path(__file__).parent.parent / "kvindexer"
    knowing = {
        str(path.relative_to(root)) for path in root.rglob("*.py") if "import opentelemetry" in path.read_text()
    }
    knowing |= {
        str(path.relative_to(root)) for path in root.rglob("*.py") if "from opentelemetry" in path.read_text()
    }
    assert knowing == {"watching/spans.py"}


def test_a_missing_extra_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvindexer.watching.spans", None)
    with pytest.raises(SettingsError, match=r"otlp_endpoint.*pip install 'kvindexer\[otel\]'"):
        open_tracing(Settings(otlp_endpoint="http://127.0.0.1:4318"))
    assert open_texts(Settings()) is not None
    assert open_keeper(Settings(), Lull()) is not None


@pytest.mark.parametrize(
    "wrong", ["collector:4317", "grpc://collector:4317", "http://", "http://u:sesame@collector:4318"]
)
def test_an_endpoint_that_can_not_be_one_is_refused_without_its_password(wrong: str) -> None:
    with pytest.raises(SettingsError, match=r"otlp_endpoint.*http://HOST:PORT") as refused:
        load_settings(None, {"otlp_endpoint": wrong}, {})
    assert "sesame" not in str(refused.value)
