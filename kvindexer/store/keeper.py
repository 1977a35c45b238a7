"""Keeps the durable, shared copy of the index in Redis; `Keeper` of a fleet.

    fleet ── applied, withdrawn ──► Shard (what to do?) ──► Writing ──► Redis
    beat, every store_poll_interval_s:
        alive? who else?      ──► turns
        directory changed?    ──► register, unregister with the fleet
        meta hashes           ──► Shard: what Redis holds of each source
    check, every store_check_interval_s (`store.check`): digests of memory and Redis, the server's own condition

Nothing of it is in the way of a query or of an engine: with Redis slow, gone or wrong, changes wait in bounded
journals, past whose bound a shard is later written as a whole.  The beat is the gate: without one, nothing is tried.
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
from kvindexer.settings import Settings
from kvindexer.store.check import Checker
from kvindexer.store.directory import Directory, Kind, Line, read_lines
from kvindexer.store.figures import shards, stored
from kvindexer.store.growing import grow
from kvindexer.store.kept import KeptSource
from kvindexer.store.layout import Found, UnreadableError, pack_spec, shard_tag, unpack_spec
from kvindexer.store.server import Refusal, ShardServer
from kvindexer.store.shard import IN_STEP, Flush, Grow, Load, Rewrite, Shard, Step, Wait
from kvindexer.store.turns import turn
from kvindexer.store.writing import Writing
from kvindexer.types import Epoch, SourceSpec

_log = logging.getLogger(__name__)

_LEAST_PENDING_BYTES: Final = 64 * 1024
_FORGET_REPLICA_BEATS: Final = 5
_STALE_STAGE_S: Final = 60
"""After so many seconds nobody is going on with what was staged."""
_JOBS: Final = 4
"""Shards that are written or loaded at once."""
_AT_A_TIME: Final = 16
"""Shards that are looked at between two turns of queries."""
_SOON_S: Final = 3600.0
"""At the end nothing waits for more to come."""
_WRITE_PAUSE_S: Final = 0.02
"""Time between writes, of whatever source, unless a source has much to write."""
_REASON_FOREIGN: Final = "foreign"
_HINT: Final = "docs/redis.md says what the server needs"


class RedisKeeper:
    """The copy in Redis of everything that one replica follows."""

    def __init__(self, settings: Settings, server: ShardServer, replica: str) -> None:
        self._settings = settings
        self._server = server
        self.replica = replica
        self._directory = Directory()
        self._kept: dict[str, KeptSource] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs = asyncio.Semaphore(_JOBS)
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        """Something was registered here: the beat need not wait."""
        self._problems: dict[str, StoreProblem] = {}
        """By what they are problems of: the connection, a shard, the server's condition."""
        self._unfit: list[StoreProblem] = []
        """The server's own condition."""
        self._replicas: tuple[str, ...] = (replica,)
        self._version: bytes | None = None
        self._changed = b""
        self._ending: dict[str, str] = {}
        """Shards of sources that were unregistered here, by tag."""
        self._buried: dict[str, int] = {}
        """Tombstones whose shards are ended, by source."""
        self._forget_after_s = max(2, round(_FORGET_REPLICA_BEATS * settings.store_poll_interval_s))
        self._server_s = 0
        self._reachable = False
        self.writes = 0
        self.refusals = 0
        self.checks = 0
        self.divergences = 0

    @asynccontextmanager
    async def running(self, fleet: Kept) -> AsyncIterator[Sequence[SourceSpec]]:
        """See `Keeper.running`."""
        self._fleet = fleet
        self._writing = Writing(self._server, fleet.index, self.replica)
        self._checker = Checker(self._server, fleet.index, self._writing.slice)
        known = await self._first_beat()
        loops = [
            self._spawn(loop(), name)
            for name, loop in (("beat", self._beat_loop), ("write", self._write_loop), ("check", self._check_loop))
        ]
        try:
            yield known
            await _cancelled(loops)  # a beat that comes after our farewell would take it back
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.shutdown_grace_s):
                    await self._finish()
        finally:
            await _cancelled(self._tasks)
            await self._server.close()

    async def _first_beat(self) -> Sequence[SourceSpec]:
        """The sources that are registered already; none if Redis can't be asked, which is made up for later."""
        try:
            await self._beat()
            return [spec for _, spec in self._specs(await self._news()) if spec is not None]
        except StoreError as error:
            self._trouble("connection", error)
            return ()

    async def _finish(self) -> None:
        """What was registered last, and the last changes, if Redis takes them: whoever starts next begins there."""
        if not self._reachable:
            return
        with suppress(StoreError):
            await self._publish()
        jobs = [self._last_flush(kept) for kept in self._kept.values() if not kept.busy and kept.shard.turn == 0]
        await asyncio.gather(*jobs)
        with suppress(StoreError):
            await self._server.beat(self.replica, self._forget_after_s, leaving=True)

    async def _last_flush(self, kept: KeptSource) -> None:
        step = kept.shard.decide(time.monotonic() + _SOON_S)
        if isinstance(step, Flush):
            await self._do(kept, step)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"kvindexer-store-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Keeper

    @property
    def informed(self) -> bool:
        """See `Keeper.informed`."""
        return self._version is not None

    def follow(self, source: str, spec: SourceSpec, stream: Stream, dial: Callable[[], None]) -> None:
        """See `Keeper.follow`."""
        settings = self._settings
        shard = Shard(
            stream,
            registration=self._directory.generation(source),
            flush_interval_s=settings.store_flush_interval_s,
            takeover_s=settings.store_takeover_s,
        )
        before = self._kept.get(source)
        if before is not None:
            before.dropped = True
            shard.load_tried(time.monotonic())
        self._kept[source] = kept = KeptSource(source, spec, stream, shard, dial)
        self._share_out()
        note = self._directory.note_found if spec.life else self._directory.note_local
        note(source, kept.packed_spec)
        if not self._reachable:
            self._dial(kept)
            return
        stream.warming()
        kept.busy = True
        self._spawn(self._warm(kept), "warm")

    async def _warm(self, kept: KeptSource) -> None:
        async with self._jobs:
            try:
                await self._writing.load(kept)
            except StoreError as error:
                self._trouble(kept.source, error)
            except Exception:  # noqa: BLE001 - a source that can't be warmed is followed all the same
                _log.exception("source %s could not be loaded from the store", kept.source)
                failed = f"{kept.source}: a load failed"
                self._problems[kept.source] = StoreProblem("unexpected", failed, "see the log")
            finally:
                kept.busy = False
        self._dial(kept)

    def _dial(self, kept: KeptSource) -> None:
        if kept.dropped:
            return
        kept.dialled = True
        try:
            kept.dial()
        except KvIndexerError as error:
            _log.warning("source %s can't be followed: %s", kept.source, error)

    def applied(self, source: str, seq: int, payload: bytes, change: Change) -> None:
        """See `Keeper.applied`."""
        kept = self._kept.get(source)
        if kept is None:
            return
        now = time.monotonic()
        kept.shard.applied(seq, xxh3_128_digest(payload), change.touched, now)
        kept.changed(change.touched)
        for other, touched in change.touched_of.items():
            self._amended(other, touched, now)
        if kept.shard.eager and not kept.busy:
            self._wake.set()

    def _amended(self, source: str, touched: array[int], now: float) -> None:
        kept = self._kept.get(source)
        if kept is not None:
            kept.shard.amended(touched, now)
            kept.changed(touched)

    def withdrawn(self, source: str, reason: str) -> None:
        """See `Keeper.withdrawn`."""
        kept = self._kept.get(source)
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
        kept = self._kept.pop(source, None)
        if kept is not None:
            kept.dropped = True
            self._problems.pop(source, None)
            self._share_out()

    def ended(self, source: str) -> None:
        """See `Keeper.ended`."""
        kept = self._kept.get(source)
        if kept is not None:
            self._ending[kept.tag] = source
            self._directory.drop(source, kept.packed_spec)
            self._hurry.set()

    def registered(self, source: str, spec: SourceSpec) -> None:
        """See `Keeper.registered`."""
        self._directory.want(source, Kind.REGISTERED, pack_spec(spec))
        self._hurry.set()

    def unregistered(self, source: str) -> None:
        """See `Keeper.unregistered`."""
        kept = self._kept.get(source)
        if kept is not None:
            self._ending[kept.tag] = source
        self._directory.want(source, Kind.REMOVED, kept.packed_spec if kept is not None else b"")
        self._hurry.set()

    def problems(self) -> Sequence[StoreProblem]:
        """See `Keeper.problems`."""
        return [*self._problems.values(), *self._unfit]

    def figures(self) -> StoreFigures:
        """See `Keeper.figures`."""
        return StoreFigures(
            str(self._settings.store).partition("://")[0],
            self._reachable,
            len(self._replicas),
            self.writes,
            self._writing.records,
            self.refusals,
            self.checks,
            self.divergences,
            *shards(self._kept.values(), time.monotonic()),
        )

    def stored(self, source: str) -> Stored | None:
        """See `Keeper.stored`."""
        kept = self._kept.get(source)
        return None if kept is None else stored(kept)

    def _share_out(self) -> None:
        """Divide the room for what waits among the sources, and the turns among the replicas."""
        share = max(_LEAST_PENDING_BYTES, self._settings.store_pending_max_bytes // max(1, len(self._kept)))
        for kept in self._kept.values():
            kept.shard.max_pending_bytes = share
            kept.shard.turn = turn(self.replica, self._replicas, kept.tag)

    # The beat

    async def _beat_loop(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.store_poll_interval_s):
                    await self._hurry.wait()
            self._hurry.clear()
            try:
                await self._beat()
                await self._publish()
                self._take_in(await self._news())
                await self._read_shards()
                await self._bury()
            except StoreError as error:
                self._reachable = False
                self._trouble("connection", error)
            except Exception:  # noqa: BLE001 - the next beat is another try; it is logged and shows in health
                self._reachable = False
                _log.exception("the store: a beat failed")
                self._problems["connection"] = StoreProblem("unexpected", "a beat failed", "see the log")

    async def _beat(self) -> None:
        beat = await self._server.beat(self.replica, self._forget_after_s)
        self._server_s = beat.server_s
        self._reachable = True
        self._relief("connection")
        if beat.version != self._version:
            self._changed = beat.version
        replicas = tuple(sorted({*beat.replicas, self.replica}))
        if replicas != self._replicas:
            _log.info("the store: replicas are %s", ", ".join(replicas))
            self._replicas = replicas
            self._share_out()

    async def _publish(self) -> None:
        """Write what was registered and unregistered here."""
        for wanted in self._directory.wanted():
            known = self._directory.generation(wanted.source)
            generation = await self._server.register(
                wanted.source, wanted.kind, wanted.spec, wanted.generation, known
            )
            self._directory.written(wanted, generation)
            kept = self._kept.get(wanted.source)
            if kept is not None and wanted.kind is not Kind.REMOVED and generation:
                kept.shard.registration = generation

    async def _news(self) -> list[tuple[str, Line]]:
        """Lines of the directory that this replica did not know."""
        if self._changed and self._changed == self._version:
            return []  # an empty directory has no version: flushed twice in a row, it would look unchanged
        version = self._changed
        found: dict[str, Line] = {}
        names, strange = self._server.names, False
        for source, line in read_lines(await self._server.lines()):
            if isinstance(line, Line):
                found[source] = line
            else:
                strange = True
                self._trouble(names.sources, _foreign(names.sources, line))
        if not strange:
            self._relief(names.sources)
        self._version = version
        return self._directory.merge(found)

    def _take_in(self, news: Iterable[tuple[str, Line]]) -> None:
        for source, spec in self._specs(news):
            kept = self._kept.get(source)
            if kept is not None:
                kept.shard.registration = self._directory.generation(source)
            if spec is None or (kept is not None and kept.spec != spec):
                if kept is not None:
                    self._ending[kept.tag] = source  # ended already, but we may have written since
                self._fleet.unregister_shared(source)
            if spec is None:
                continue
            try:
                self._fleet.register_shared(spec)
            except KvIndexerError as error:
                _log.warning("source %s, registered with another replica, is not followed: %s", source, error)

    def _specs(self, news: Iterable[tuple[str, Line]]) -> list[tuple[str, SourceSpec | None]]:
        """What to register (or, None, unregister) here because of these lines."""
        specs: list[tuple[str, SourceSpec | None]] = []
        for source, line in news:
            if line.kind is Kind.REMOVED:
                specs.append((source, None))
            elif line.kind is Kind.REGISTERED:
                try:
                    specs.append((source, unpack_spec(line.spec)))
                except UnreadableError as error:
                    _log.warning("source %s of the store is not followed: %s", source, error)
        return specs

    async def _read_shards(self) -> None:
        """See what Redis holds of each source, and give back what nobody needs."""
        followed = [kept for kept in self._kept.values() if not kept.busy]
        read_at = time.monotonic()
        answers = await self._server.read([kept.tag for kept in followed])
        for looked_at, (kept, found) in enumerate(zip(followed, answers, strict=True)):
            if looked_at % _AT_A_TIME == _AT_A_TIME - 1:
                await self._writing.slice()
            if kept.dropped or kept.busy:
                continue
            if isinstance(found, UnreadableError):
                self._trouble(kept.source, _foreign(self._server.names.meta(kept.tag), found))
                kept.shard.remote = None
                continue
            if self._problems.get(kept.source, _NONE).reason == _REASON_FOREIGN:
                self._relief(kept.source)
            kept.shard.read(found, read_at)
            if kept.shard.turn == 0:
                await self._sweep(kept.tag, found)
        self._wake.set()

    async def _sweep(self, tag: str, found: Found) -> None:
        for leftover in found.leftovers:
            if leftover.since_s + _STALE_STAGE_S < self._server_s:
                await self._server.sweep(tag, leftover)

    async def _bury(self) -> None:
        """End the shards of sources that were unregistered: ours, and those that another replica left unfinished."""
        waiting = {wanted.source for wanted in self._directory.wanted()}
        for tag, source in list(self._ending.items()):
            kept = self._kept.get(source)
            if source not in waiting:
                if kept is None or kept.tag != tag:
                    await self._end(tag, self._directory.generation(source))
                del self._ending[tag]
        for source, line in list(self._directory.removed()):
            if not line.spec or self._buried.get(source) == line.generation:
                continue
            try:
                tag = shard_tag(source, unpack_spec(line.spec))
            except UnreadableError:
                continue  # nobody can tell which shard it was
            if turn(self.replica, self._replicas, tag) == 0:
                await self._end(tag, line.generation)
                self._buried[source] = line.generation

    async def _end(self, tag: str, generation: int) -> None:
        await self._server.remove(tag, generation)
        (found,) = await self._server.read([tag])
        if isinstance(found, Found) and found.meta is None:
            for leftover in found.leftovers:  # nobody can go on with what was staged, however fresh it is
                await self._server.sweep(tag, leftover)

    # Writing

    async def _write_loop(self) -> None:
        pause_s = min(self._settings.store_flush_interval_s, self._settings.store_poll_interval_s) / 2
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            if self._reachable:
                await self._decide()

    async def _decide(self) -> None:
        now, interval_s = time.monotonic(), self._interval_s()
        for looked_at, kept in enumerate(list(self._kept.values())):
            if looked_at % _AT_A_TIME == _AT_A_TIME - 1:
                await self._writing.slice()
            kept.shard.flush_interval_s = interval_s
            if kept.busy or kept.dropped or not kept.dialled:
                continue
            step = kept.shard.decide(now)
            if kept.shard.epoch is not None:
                kept.stream.epoch = Epoch(kept.shard.epoch)
            if isinstance(step, Wait):
                if step is IN_STEP:
                    self._relief(kept.source)
                continue
            kept.busy = True
            self._spawn(self._work(kept), "write")

    def _interval_s(self) -> float:
        """Longer with many sources at work, for a write costs as much as hundreds of records; others mustn't wait."""
        settings = self._settings
        waiting = sum(kept.shard.pending_records > 0 for kept in self._kept.values())
        return max(settings.store_flush_interval_s, min(_WRITE_PAUSE_S * waiting, settings.store_takeover_s / 2))

    async def _work(self, kept: KeptSource) -> None:
        """Decide again when it is our turn, for what is written must be what is decided on."""
        async with self._jobs:
            try:
                await self._writing.slice()
                await self._do(kept, kept.shard.decide(time.monotonic()))
            finally:
                kept.busy = False
        if kept.shard.eager:
            self._wake.set()

    async def _do(self, kept: KeptSource, step: Step) -> None:
        if kept.dropped or not self._reachable or isinstance(step, Wait):
            return
        if isinstance(step, Load):
            _log.info("source %s: its shard is loaded (%s)", kept.source, step.why)
            self._fleet.follow_anew(kept.source)
            return
        try:
            refusal = await self._written(kept, step)
        except StoreError as error:
            self._trouble(kept.source, error)
            return
        except Exception:  # noqa: BLE001 - one bad shard must not stop the others; it is logged and shows in health
            _log.exception("source %s could not be written to the store", kept.source)
            self._problems[kept.source] = StoreProblem("unexpected", f"{kept.source}: a write failed", "see the log")
            return
        self.writes += 1
        if refusal is None:
            self._relief(kept.source)
            return
        self.refusals += 1
        if refusal is not Refusal.HELD:
            kept.shard.remote = None  # what was decided on is not there any more: the next beat reads it

    async def _written(self, kept: KeptSource, step: Flush | Rewrite | Grow) -> Refusal | None:
        match step:
            case Flush():
                return await self._writing.flush(kept, step)
            case Rewrite():
                return await self._writing.rewrite(kept, step)
            case Grow():
                return await grow(self._server, kept, step)

    # The check

    async def _check_loop(self) -> None:
        while True:
            if self._reachable:
                await self._examine()
            await asyncio.sleep(self._settings.store_check_interval_s)
            for kept in list(self._kept.values()):
                if self._reachable and kept.dialled and not kept.dropped and not kept.busy and kept.shard.turn == 0:
                    try:
                        await self._check(kept)
                    except Exception:  # noqa: BLE001 - the next check is another try; it is logged
                        _log.exception("source %s could not be compared with the store", kept.source)

    async def _examine(self) -> None:
        """Look at the server's own condition."""
        try:
            found = await self._server.examine()
        except StoreError:
            return  # the beat says so as well, and for how long
        unfit = [StoreProblem(problem.reason, problem.message, _HINT) for problem in found]
        if unfit != self._unfit:
            self._unfit = unfit
            _log.warning("the store: %s", "; ".join(one.message for one in unfit) or "the server is fit again")

    async def _check(self, kept: KeptSource) -> None:
        kept.busy = True
        try:
            differing = await self._checker.compare(kept)
        except StoreError as error:
            self._trouble(kept.source, error)
            if error.reason == "wrong_type":
                self._differs(kept, "a bucket is no hash")
            return
        finally:
            kept.busy = False
        self.checks += differing is not None
        if differing and not kept.dropped:
            self._differs(kept, f"{differing} records differ")

    def _differs(self, kept: KeptSource, why: str) -> None:
        self.divergences += 1
        kept.shard.divergent = True
        _log.warning("source %s: memory and store are not the same: %s", kept.source, why)
        self._wake.set()

    # Problems

    def _trouble(self, where: str, error: StoreError) -> None:
        if where not in self._problems:
            _log.warning("the store: %s: %s", where, error)
        self._problems[where] = StoreProblem(error.reason, f"{where}: {error.message}", error.hint)

    def _relief(self, where: str) -> None:
        if self._problems.pop(where, None) is not None:
            _log.info("the store: %s: all is well again", where)


_NONE: Final = StoreProblem("", "", "")


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


def _foreign(key: str, error: UnreadableError) -> StoreError:
    return StoreError(
        _REASON_FOREIGN, f"{key} is not ours to write: {error}", "choose another store_namespace, or remove that key"
    )
