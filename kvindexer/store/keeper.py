"""Keeps the durable, shared copy of the index in Redis; `Keeper` of a fleet.

    fleet ── applied, withdrawn ──► Shard (what to do?) ──► Jobs ──► Writing ──► Redis
    Beat, every store_poll_interval_s: turns, the directory of sources, what Redis holds of each
    Checks, every store_check_interval_s: memory against Redis, the server's own condition

Nothing of it is in the way of a query or of an engine: with Redis slow, gone or wrong, changes wait in bounded
journals, past whose bound a shard is later written as a whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

from xxhash import xxh3_128_digest

from kvindexer.errors import KvIndexerError, StoreError
from kvindexer.events.keeping import Kept, Stored, StoreFigures, StoreProblem
from kvindexer.events.stream import Stream
from kvindexer.index.seam import Change
from kvindexer.lull import Lull
from kvindexer.settings import Settings
from kvindexer.store.beat import Beat
from kvindexer.store.check import Checker, Checks
from kvindexer.store.figures import shards, stored
from kvindexer.store.jobs import Jobs
from kvindexer.store.kept import KeptSource
from kvindexer.store.server import ShardServer
from kvindexer.store.shard import Shard
from kvindexer.store.shelf import Shelf
from kvindexer.store.troubles import Troubles
from kvindexer.store.writing import Writing
from kvindexer.types import SourceSpec

_log = logging.getLogger(__name__)

_QUESTIONS: Final = 3
"""So often an engine was asked, at least, before a life that it did not confirm may take the place of another one."""


class RedisKeeper:
    """The copy in Redis of everything that one replica follows."""

    def __init__(self, settings: Settings, server: ShardServer, replica: str, lull: Lull) -> None:
        self._settings = settings
        self._server = server
        self.replica = replica
        self.shelf = Shelf(settings, replica, lull)
        self._troubles = Troubles()
        self._beat = Beat(settings, server, self.shelf, self._troubles)
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self, fleet: Kept) -> AsyncIterator[Sequence[SourceSpec]]:
        """See `Keeper.running`."""
        settings, server, shelf, troubles = self._settings, self._server, self.shelf, self._troubles
        self.writing = Writing(server, fleet.index, self.replica, shelf.lull)
        self.jobs = Jobs(
            settings, server, shelf, troubles, self.writing, spawn=self._spawn, follow_anew=fleet.follow_anew
        )
        self.checks = Checks(settings, server, shelf, troubles, Checker(server, fleet.index, shelf.lull))
        known = await self._beat.first()
        loops = [
            self._spawn(self._beat.loop(fleet), "beat"),
            self._spawn(self.jobs.loop(), "write"),
            self._spawn(self.checks.loop(), "check"),
        ]
        try:
            yield known
            await _cancelled(loops)  # a beat that comes after our farewell would take it back
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.shutdown_grace_s):
                    await self._finish()
        finally:
            await _cancelled(self._tasks)
            await server.close()

    async def _finish(self) -> None:
        """What was registered last, and the last changes, if Redis takes them: whoever starts next begins there."""
        if not self.shelf.reachable:
            return
        with suppress(StoreError):
            await self._beat.publish()
        await self.jobs.finish()
        await self._beat.farewell()

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"kvindexer-store-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def informed(self) -> bool:
        """See `Keeper.informed`."""
        return self._beat.informed

    def follow(self, source: str, spec: SourceSpec, stream: Stream, dial: Callable[[], None]) -> None:
        """See `Keeper.follow`."""
        settings = self._settings
        question_s = settings.replay_retry_max_s + settings.replay_timeout_s
        shard = Shard(
            stream,
            flush_interval_s=settings.store_flush_interval_s,
            takeover_s=settings.store_takeover_s,
            proof_patience_s=_QUESTIONS * question_s if spec.replay else 0.0,
        )
        before = self.shelf.sources.get(source)
        if before is not None:
            before.dropped = True
            shard.load_tried(time.monotonic())
        kept = KeptSource(source, spec, stream, shard, dial)
        self.shelf.put(kept)
        self._beat.followed(kept)
        if not self.shelf.reachable:
            _dial(kept)
            return
        stream.warming()
        kept.busy = True
        self._spawn(self._warm(kept), "warm")

    async def _warm(self, kept: KeptSource) -> None:
        await self.jobs.warm(kept)
        _dial(kept)

    def applied(self, source: str, seq: int, payload: bytes, change: Change) -> None:
        """See `Keeper.applied`."""
        kept = self.shelf.sources.get(source)
        if kept is None:
            return
        now = time.monotonic()
        kept.shard.applied(seq, xxh3_128_digest(payload), change.touched, now)
        kept.changed(change.touched)
        for other, touched in change.touched_of.items():
            self._amended(other, touched, now)
        if kept.shard.eager and not kept.busy:
            self.shelf.wake.set()

    def _amended(self, source: str, touched: array[int], now: float) -> None:
        kept = self.shelf.sources.get(source)
        if kept is not None:
            kept.shard.amended(touched, now)
            kept.changed(touched)

    def withdrawn(self, source: str, reason: str) -> None:
        """See `Keeper.withdrawn`."""
        kept = self.shelf.sources.get(source)
        if kept is None:
            return
        kept.withdrawn()
        match reason:
            case "rebuild":
                kept.shard.rebuilt()
            case "gone":
                kept.shard.left()
            case _:
                kept.shard.new_life()

    def forget(self, source: str) -> None:
        """See `Keeper.forget`."""
        if self.shelf.take(source) is not None:
            self._troubles.forget(source)

    def ended(self, source: str) -> None:
        """See `Keeper.ended`."""
        kept = self.shelf.sources.get(source)
        if kept is not None:
            self._beat.ended(kept)

    def registered(self, source: str, spec: SourceSpec) -> None:
        """See `Keeper.registered`."""
        self._beat.registered(source, spec)

    def unregistered(self, source: str) -> None:
        """See `Keeper.unregistered`."""
        self._beat.unregistered(source, self.shelf.sources.get(source))

    def problems(self) -> Sequence[StoreProblem]:
        """See `Keeper.problems`."""
        return self._troubles.all()

    def figures(self) -> StoreFigures:
        """See `Keeper.figures`."""
        return StoreFigures(
            str(self._settings.store).partition("://")[0],
            self.shelf.reachable,
            len(self.shelf.replicas),
            self.jobs.writes,
            self.writing.records,
            self.jobs.refusals,
            self.checks.done,
            self.checks.divergences,
            *shards(self.shelf.sources.values(), time.monotonic()),
        )

    def stored(self, source: str) -> Stored | None:
        """See `Keeper.stored`."""
        kept = self.shelf.sources.get(source)
        return None if kept is None else stored(kept)


def _dial(kept: KeptSource) -> None:
    if kept.dropped:
        return
    kept.dialled = True
    try:
        kept.dial()
    except KvIndexerError as error:
        _log.warning("source %s can't be followed: %s", kept.source, error)


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
