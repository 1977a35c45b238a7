"""The service's own listener on a real socket for HTTP tests, with the real index and a fleet that only remembers."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from time import monotonic, sleep
from typing import Any

import httpx
import msgpack  # type: ignore[import-untyped]
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send
from xxhash import xxh3_128_digest

from kvindexer.access.opening import open_access
from kvindexer.api.app import create_app
from kvindexer.api.fleet import FindingFigures, InstanceStatus, SourceReport, StoreFigures, StoreProblem
from kvindexer.api.listeners import Unsignalled, configured
from kvindexer.api.metrics import Metrics
from kvindexer.events.sources import Registry
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Change
from kvindexer.service import open_texts
from kvindexer.settings import Settings
from kvindexer.tiering.changes import ChangeLog
from kvindexer.tiering.feedback import Accuracy, FeedbackRule, Report
from kvindexer.types import SourceSpec, SourceType

NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""The tests speak plain HTTP; loading certificates for each of them would take most of their time."""

LIVE = InstanceStatus("live", sound=True, complete=True, lag_ms=0.0, verified_ms=12.5)


@dataclass
class FakeLife:
    """A stream that loses nothing."""

    epoch: int = 1
    last_seq: int | None = None
    sound: bool = True
    complete: bool = True
    digests: dict[int, bytes] = field(default_factory=dict)

    def applied_digest(self, seq: int) -> bytes | None:
        return self.digests.get(seq)

    def take(self, payload: bytes) -> int:
        """The seq of the next message."""
        self.last_seq = 0 if self.last_seq is None else self.last_seq + 1
        self.digests[self.last_seq] = xxh3_128_digest(payload)
        return self.last_seq


@dataclass
class FakeFleet:
    """Registered sources and states that tests set by hand; what is registered is attached to the index."""

    index: PyIndex
    ready: bool = True
    statuses: dict[str, InstanceStatus] = field(default_factory=dict)
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    figures: StoreFigures = field(default_factory=StoreFigures)
    found: FindingFigures = field(default_factory=FindingFigures)
    troubles: list[StoreProblem] = field(default_factory=list)
    accuracies: dict[str, Accuracy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registry = Registry()
        self.leaving = False
        self.changes = ChangeLog(self.index, 2**20, "fake")
        self.lives: dict[str, FakeLife] = {}

    @property
    def generation(self) -> int:
        return self.registry.generation

    def specs(self) -> list[SourceSpec]:
        return [spec for _, spec in self.registry]

    def sources(self) -> dict[str, SourceSpec]:
        return dict(self.registry)

    def register(self, spec: SourceSpec) -> bool:
        source = self.registry.register(spec)
        if source is None:
            return False
        self.index.attach(source, spec)
        self.lives[source] = FakeLife()
        self.changes.attached(source, spec, self.lives[source])
        return True

    def apply(self, source: str, payload: bytes) -> Change:
        """A message has come."""
        life = self.lives[source]
        change = self.index.apply(source, payload)
        self.changes.applied(source, life.take(payload), change)
        return change

    def unregister(
        self,
        instance: str,
        *,
        model: str | None = None,
        tenant: str | None = None,
        rank: int | None = None,
        source_type: SourceType | None = None,
    ) -> list[SourceSpec]:
        removed = self.registry.unregister(instance, model=model, tenant=tenant, rank=rank, source_type=source_type)
        for source, _ in removed:
            self.changes.forgotten(source)
            self.index.detach(source)
        return [spec for _, spec in removed]

    def status(self, instance: str) -> InstanceStatus:
        return self.statuses.get(instance, LIVE)

    def each_status(self, instances: Sequence[str]) -> list[InstanceStatus]:
        return [self.status(instance) for instance in instances]

    def reports(self) -> list[SourceReport]:
        return [self._report(source, spec) for source, spec in self.registry]

    def problems(self) -> Sequence[StoreProblem]:
        return self.troubles

    def store(self) -> StoreFigures:
        return self.figures

    def finding(self) -> FindingFigures:
        return self.found

    def feedback(
        self,
        instance: str,
        predicted_tokens: int,
        cached_tokens: int,
        *,
        tenant: str,
        model: str | None = None,
        rank: int | None = None,
    ) -> list[Report]:
        return [
            self.accuracies.setdefault(source, Accuracy(FeedbackRule())).add(
                predicted_tokens, cached_tokens, spec.block_size, monotonic()
            )
            for source, spec in self.registry
            if (spec.instance, spec.tenant) == (instance, tenant)
            and model in (None, spec.model)
            and rank in (None, spec.rank)
        ]

    def _report(self, source: str, spec: SourceSpec) -> SourceReport:
        status, stats = self.status(spec.instance), self.index.stats(source)
        values: dict[str, Any] = {"batches": 0, "gaps": 0, "replays": 0, "poison": 0}
        values |= self.counters.get(source, {})
        return SourceReport(
            spec=spec,
            source=source,
            state=status.state,
            why="" if status.state == "live" else "set by the test",
            sound=status.sound,
            complete=status.complete,
            epoch=1,
            seq=None,
            lag_ms=status.lag_ms,
            last_event_s=None,
            orphans=stats.orphans,
            blocks=stats.blocks,
            accuracy=self.accuracies.get(source, Accuracy(FeedbackRule())).figures,
            **values,
        )


class Api:
    """A running service: its parts, and a client that talks to it."""

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.index = PyIndex()
        self.fleet = FakeFleet(self.index)
        self.metrics = Metrics()
        self.texts = open_texts(self.settings, self.metrics.text)
        self.access = open_access(self.settings)
        self.app = create_app(self.settings, self.index, self.fleet, self.metrics, self.texts, access=self.access)
        self.address = ("", 0)
        self.client: httpx.Client

    def add(self, instance: str, port: int = 5557, **fields: Any) -> str:
        """Register a source, blocks of 4 tokens unless told otherwise; returns its identity."""
        endpoint = f"tcp://{instance}:{port}"
        values: dict[str, Any] = {"model": "m", "block_size": 4, **fields}
        self.fleet.register(SourceSpec(instance=instance, endpoint=endpoint, **values))
        return endpoint

    def store(self, source: str, tokens: Sequence[int], **fields: Any) -> None:
        """The source has stored the blocks of a prompt."""
        self.metrics.applied(self.fleet.apply(source, batch(stored(tokens, **fields))))

    def post(self, path: str, body: Any) -> Any:
        """The answer to a body, which must be 200 or 201."""
        response = self.client.post(path, json=body)
        assert response.status_code in (200, 201), response.text
        return response.json()

    def refused(self, path: str, body: Any, **options: Any) -> tuple[int, str, str]:
        """Status, code and hint of an answer that must be an error of the one shape."""
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return error(self.client.post(path, **content, **options))


def error(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and hint of an error of the one shape."""
    assert response.status_code >= 400, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["code", "message", "hint"]
    assert all(isinstance(value, str) for value in body["error"].values())
    assert body["error"]["message"]
    return response.status_code, body["error"]["code"], body["error"]["hint"]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    for _ in range(1000):
        if condition():
            return
        sleep(0.01)
    raise AssertionError("it did not come true")


@contextmanager
def serving(**settings: Any) -> Iterator[Api]:
    """A service of its own, reached through the one server that all tests share."""
    host = _host()
    api = Api(**settings)
    api.address = host.address
    api.client = httpx.Client(
        base_url=f"http://127.0.0.1:{api.address[1]}", trust_env=False, timeout=30, verify=NO_CERTIFICATES
    )
    host.serve(api)
    with api.client:
        yield api
        if host.loop is not None:
            asyncio.run_coroutine_threadsafe(api.texts.close(), host.loop).result(10)


class _Host:
    """A listener in a thread that ends with the process: its start and stop cost more than a test."""

    def __init__(self) -> None:
        self.app: ASGIApp
        self.loop: asyncio.AbstractEventLoop | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._config = configured(self, Settings())
        self._config.timeout_keep_alive = 600  # else it hangs up just when httpx does: after 5 idle seconds, both
        serve = Unsignalled(self._config).serve(sockets=[self._listener])
        threading.Thread(target=uvloop.run, args=(serve,), daemon=True).start()

    def serve(self, api: Api) -> None:
        """From the next connection on it is this service that answers, with the bounds of its settings."""
        self.app = api.app
        self._config.http_protocol_class = configured(self, api.settings).http_protocol_class

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.loop = asyncio.get_running_loop()
        await self.app(scope, receive, send)


_host = cache(_Host)


def stored(tokens: Sequence[int], *, block_size: int = 4, first: int = 1, **fields: Any) -> dict[str, Any]:
    """A vLLM 0.32 event: the full blocks of a prompt; hashes are made of `first` and the block's number."""
    blocks = len(tokens) // block_size
    event = {
        "type": "BlockStored",
        "block_hashes": [first * 1000 + block for block in range(blocks)],
        "parent_block_hash": None,
        "token_ids": list(tokens[: blocks * block_size]),
        "block_size": block_size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * blocks,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return {**event, **fields}


def batch(*events: dict[str, Any], rank: int | None = None) -> bytes:
    """A published payload."""
    packed: bytes = msgpack.packb([1.5, list(events), rank])
    return packed
