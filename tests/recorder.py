"""Writes histories: engines, a whole service on a real socket, and a caller that note what they do and see."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import Any, Final

import httpx
import uvicorn
from xxhash import xxh3_64_intdigest

from api_server import NO_CERTIFICATES
from history import (
    Answered,
    Applied,
    Asked,
    Entry,
    Followed,
    Full,
    Gauged,
    Harmed,
    Healed,
    Logged,
    Planted,
    Published,
    Said,
    Settled,
    Shed,
    Withdrawn,
)
from kvindexer.api.app import create_app
from kvindexer.api.metrics import Metrics
from kvindexer.events.fleet import LeastTrusted, LiveFleet
from kvindexer.events.held import HeldFrames
from kvindexer.events.stream import Stream
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Index, IndexLimits
from kvindexer.settings import Settings
from kvindexer.testing import AllBlocksCleared, Event, FakeEngine, Faults, LinkFaults
from kvindexer.types import SourceSpec
from live import held, truth
from proxied import ProxiedEngine

SHED_AS: Final = {"held_full": "held_frames", "over_bound": "index"}
"""Under which reason /metrics counts what found no place in a room."""

_LOGGERS: Final = ("kvindexer", "uvicorn", "asyncio")


class RecordingEngine(ProxiedEngine):
    """Notes what it publishes, in which life, before anybody can have heard it."""

    def __init__(self, history: list[Entry], **options: Any) -> None:
        self._history = history
        self._life = 1
        self._clears = False
        super().__init__(**options)

    def publish_events(self, events: Sequence[Event]) -> int:
        """As every engine."""
        with self._lock:
            self._clears = isinstance(events[0], AllBlocksCleared)
            try:
                return super().publish_events(events)
            finally:
                self._clears = False

    def publish_raw(self, payload: bytes) -> int:
        """As every engine."""
        with self._lock:
            digest = xxh3_64_intdigest(payload)
            self._history.append(
                Published(time.monotonic(), self.endpoint, self._life, self._next_seq, digest, self._clears)
            )
            return super().publish_raw(payload)

    def restart(self, *, hash_seed: int | str | None = None, down_s: float = 0.0) -> None:
        """As every engine."""
        with self._lock:
            self._life += 1
            super().restart(hash_seed=hash_seed, down_s=down_s)

    def harmed(self, what: object) -> None:
        """What is done to it next is no good."""
        self._history.append(Harmed(time.monotonic(), self.endpoint, str(what)))

    def heal(self) -> None:
        """End all faults."""
        self.network, self.faults = LinkFaults(), Faults()
        self._history.append(Healed(time.monotonic(), self.endpoint))


class _WatchedFrames(HeldFrames):
    """Notes how many frames wait, and which found no place."""

    def __init__(self, history: list[Entry], source: str, max_frames: int, max_bytes: int) -> None:
        super().__init__(max_frames, max_bytes)
        self._history = history
        self._source = source

    def add(self, seq: int, payload: bytes, now: float) -> bool:
        """As all held frames."""
        fits = super().add(seq, payload, now)
        for room, value, limit in (
            ("held_frames", len(self._frames), self._max_frames),
            ("held_bytes", sum(len(payload) for payload, _ in self._frames.values()), self._max_bytes),
        ):
            self._history.append(Gauged(time.monotonic(), self._source, room, value, limit))
        if not fits:
            self._history.append(Full(time.monotonic(), self._source, "held_frames"))
        return fits


class RecordingFleet(LiveFleet):
    """Notes what it does with each source, what it says of it, and how full its rooms are."""

    def __init__(
        self,
        history: list[Entry],
        settings: Settings,
        open_index: Callable[[LeastTrusted], Index],
        metrics: Metrics,
        limits: IndexLimits,
    ) -> None:
        self._history = history
        self._limits = limits
        self._truncated: set[str] = set()
        super().__init__(settings, open_index, metrics)

    def _stream(self, spec: SourceSpec) -> Stream:
        deadline = self._started_at + self.settings.sync_deadline_s if spec in self.settings.sources else None
        self._history.append(Followed(time.monotonic(), spec.endpoint, spec.instance, deadline))
        stream = super()._stream(spec)
        stream._held = _WatchedFrames(
            self._history, spec.endpoint, self.settings.held_max_frames, self.settings.held_max_bytes
        )
        return stream

    def apply(self, source: str, seq: int, payload: bytes) -> None:
        """As every fleet."""
        self._history.append(Applied(time.monotonic(), source, seq, xxh3_64_intdigest(payload)))
        super().apply(source, seq, payload)
        self._gauge(source)

    def withdraw(self, source: str, reason: str, *, everything: bool) -> None:
        """As every fleet."""
        self._history.append(Withdrawn(time.monotonic(), source, reason))
        super().withdraw(source, reason, everything=everything)

    def changed(self, source: str) -> None:
        """As every fleet."""
        super().changed(source)
        known = self._sources.get(source)
        if known is not None:
            now = known.stream
            self._history.append(Said(time.monotonic(), source, now.state.value, now.sound, known.complete))

    def _gauge(self, source: str) -> None:
        assert self._subscriber is not None
        stats = self.index.stats(source)
        of_source = {
            "orphans": (stats.orphans, self._limits.max_orphans_per_source),
            "entries": (sum(stats.blocks), self._limits.max_entries_per_source),
        }
        running = len(self._subscriber._replays._running)
        self._history.append(Gauged(time.monotonic(), "", "replays", running, self.settings.max_concurrent_replays))
        for room, (value, limit) in of_source.items():
            self._history.append(Gauged(time.monotonic(), source, room, value, limit))
        if stats.truncated and source not in self._truncated:
            self._truncated.add(source)
            self._history.append(Full(time.monotonic(), source, "index"))

    def settled(self, engine: FakeEngine) -> None:
        """The end of a source's history."""
        self._history.append(Settled(time.monotonic(), engine.endpoint, held(self, engine), truth(engine)))


class Caller:
    """Asks the service over HTTP, and notes what it asks and what it hears."""

    def __init__(self, history: list[Entry], client: httpx.AsyncClient) -> None:
        self._history = history
        self._client = client
        self._numbers = count()

    async def ask(self, path: str, body: object = None, *, valid: bool = True) -> int:
        """One request, GET without a body; returns the status.  A body of bytes is sent as it is."""
        number = next(self._numbers)
        self._history.append(Asked(time.monotonic(), number, path, valid))
        if body is None:
            answer = await self._client.get(path)
        else:
            answer = await self._client.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
        self._history.append(Answered(time.monotonic(), number, answer.status_code, answer.text))
        return answer.status_code

    async def count_shed(self) -> None:
        """Note what /metrics says was refused or dropped."""
        text = (await self._client.get("/metrics")).text
        for reason, room in SHED_AS.items():
            counted = re.search(rf'kvindexer_skipped_total{{reason="{reason}"}} ([\d.]+)', text)
            self._history.append(Shed(time.monotonic(), room, round(float(counted[1])) if counted else 0))


@asynccontextmanager
async def recorded_service(
    history: list[Entry], settings: Settings, limits: IndexLimits | None = None
) -> AsyncIterator[tuple[RecordingFleet, Caller]]:
    """A whole service on a socket of its own, and a caller."""
    bounds = limits or IndexLimits()
    metrics = Metrics()
    fleet = RecordingFleet(
        history, settings, lambda least_trusted: PyIndex(bounds, None, least_trusted), metrics, bounds
    )
    app = create_app(settings, fleet.index, fleet, metrics)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="httptools", lifespan="off", log_config=None, access_log=False))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with fleet.running():
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
        try:
            async with httpx.AsyncClient(
                base_url=address, trust_env=False, timeout=30, verify=NO_CERTIFICATES
            ) as client:
                yield fleet, Caller(history, client)
        finally:
            server.should_exit = True
            await serving


class _LogHandler(logging.Handler):
    def __init__(self, history: list[Entry]) -> None:
        super().__init__(logging.DEBUG)
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        """Every line, with its traceback."""
        self._history.append(Logged(time.monotonic(), self.format(record)))


@contextmanager
def recorded_logs(history: list[Entry]) -> Iterator[None]:
    """Everything that the service and its server log meanwhile, at any level."""
    handler = _LogHandler(history)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def plant(history: list[Entry], name: bytes) -> int:
    """A token id that is told from all other numbers, in every way of writing it: its four bytes are this name."""
    token = int.from_bytes(name, "big")
    spellings = (str(token), f"{token:x}", name.decode(), name[::-1].decode())
    history.extend(Planted(time.monotonic(), text) for text in spellings)
    return token
