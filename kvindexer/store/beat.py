"""The beat of a replica: every `store_poll_interval_s`, or at once when something was registered here.

    alive? who else?      ──► turns
    directory changed?    ──► register, unregister with the fleet
    meta hashes           ──► Shard: what Redis holds of each source
    unregistered?         ──► their shards end

It is the gate: where a beat fails, nothing else is tried until one comes through.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

from kvindexer.errors import KvIndexerError, StoreError
from kvindexer.events.keeping import Kept
from kvindexer.settings import Settings
from kvindexer.store.directory import Directory, Kind, Line, read_lines
from kvindexer.store.kept import KeptSource
from kvindexer.store.layout import Found, UnreadableError, pack_spec, shard_tag, unpack_spec
from kvindexer.store.server import ShardServer
from kvindexer.store.shelf import AT_A_TIME, Shelf
from kvindexer.store.troubles import CONNECTION, Troubles
from kvindexer.types import SourceSpec

_log = logging.getLogger(__name__)

_FORGET_REPLICA_BEATS: Final = 5
_STALE_STAGE_S: Final = 60
"""After so many seconds nobody is going on with what was staged."""


class Beat:
    """Signs of life, and what is learned with them."""

    def __init__(self, settings: Settings, server: ShardServer, shelf: Shelf, troubles: Troubles) -> None:
        self._interval_s = settings.store_poll_interval_s
        self._server = server
        self._shelf = shelf
        self._troubles = troubles
        self._hurry = asyncio.Event()
        """Something was registered here: the beat need not wait."""
        self._directory = Directory()
        self._version: bytes | None = None
        self._changed = b""
        self._ending: dict[str, tuple[str, int | None]] = {}
        """Shards of sources that were unregistered, by tag: the source, and of which generation that was; None: it is
        the one that is known once it is written."""
        self._buried: dict[str, int] = {}
        """Tombstones whose shards are ended, by source."""
        self._forget_after_s = max(2, round(_FORGET_REPLICA_BEATS * self._interval_s))
        self._server_s = 0

    @property
    def informed(self) -> bool:
        """Whether the directory has been read."""
        return self._version is not None

    # What happens here

    def followed(self, kept: KeptSource) -> None:
        """A source is followed, registered or found."""
        kept.shard.registration = self._directory.generation(kept.source)
        note = self._directory.note_found if kept.spec.life else self._directory.note_local
        note(kept.source, kept.packed_spec)

    def ended(self, kept: KeptSource) -> None:
        """The life of a source that was found is over, for all replicas."""
        self._ending[kept.tag] = kept.source, None
        self._directory.drop(kept.source, kept.packed_spec)
        self._hurry.set()

    def registered(self, source: str, spec: SourceSpec) -> None:
        """Somebody has registered a source here, for all replicas."""
        self._directory.want(source, Kind.REGISTERED, pack_spec(spec))
        self._hurry.set()

    def unregistered(self, source: str, kept: KeptSource | None) -> None:
        """Somebody has unregistered a source here, for all replicas."""
        if kept is not None:
            self._ending[kept.tag] = source, None
        self._directory.want(source, Kind.REMOVED, kept.packed_spec if kept is not None else b"")
        self._hurry.set()

    # Beating

    async def first(self) -> Sequence[SourceSpec]:
        """The sources that are registered already; none if Redis can't be asked, which is made up for later."""
        try:
            await self._beat()
            return [spec for _, _, spec in self._specs(await self._news()) if spec is not None]
        except StoreError as error:
            self._troubles.begin(CONNECTION, error)
            return ()

    async def farewell(self) -> None:
        """Say that we are gone."""
        with suppress(StoreError):
            await self._server.beat(self._shelf.replica, self._forget_after_s, leaving=True)

    async def loop(self, fleet: Kept) -> None:
        """Beat until it is cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._hurry.wait()
            self._hurry.clear()
            try:
                await self._beat()
                await self.publish()
                self._take_in(fleet, await self._news())
                await self._read_shards()
                await self._bury()
            except StoreError as error:
                self._shelf.reachable = False
                self._troubles.begin(CONNECTION, error)
            except Exception:  # noqa: BLE001 - the next beat is another try; it is logged and shows in health
                self._shelf.reachable = False
                self._troubles.unexpected(CONNECTION, "a beat failed")

    async def _beat(self) -> None:
        beat = await self._server.beat(self._shelf.replica, self._forget_after_s)
        self._server_s = beat.server_s
        self._shelf.reachable = True
        self._troubles.end(CONNECTION)
        if beat.version != self._version:
            self._changed = beat.version
        self._shelf.heard(beat.replicas)

    async def publish(self) -> None:
        """Write what was registered and unregistered here.  Raises StoreError."""
        for wanted in self._directory.wanted():
            known = self._directory.generation(wanted.source)
            generation = await self._server.register(
                wanted.source, wanted.kind, wanted.spec, wanted.generation, known
            )
            self._directory.written(wanted, generation)
            kept = self._shelf.sources.get(wanted.source)
            if kept is not None and wanted.kind is not Kind.REMOVED and generation:
                kept.shard.registration = self._directory.generation(wanted.source)

    async def _news(self) -> list[tuple[str, Line]]:
        """Lines of the directory that this replica did not know."""
        if self._changed and self._changed == self._version:
            return []  # an empty directory has no version: flushed twice in a row, it would look unchanged
        version = self._changed
        found: dict[str, Line] = {}
        key, strange = self._server.names.sources, False
        for source, line in read_lines(await self._server.lines()):
            if isinstance(line, Line):
                found[source] = line
            else:
                strange = True
                self._troubles.foreign(key, key, line)
        if not strange:
            self._troubles.end(key)
        self._version = version
        return self._directory.merge(found)

    def _take_in(self, fleet: Kept, news: Iterable[tuple[str, Line]]) -> None:
        for source, generation, spec in self._specs(news):
            kept = self._shelf.sources.get(source)
            if kept is not None:
                kept.shard.registration = generation
            if spec is None or (kept is not None and kept.spec != spec):
                if kept is not None:
                    self._ending[kept.tag] = source, generation  # ended already, but we may have written since
                fleet.unregister_shared(source)
            if spec is None:
                continue
            try:
                fleet.register_shared(spec)
            except KvIndexerError as error:
                _log.warning("source %s, registered with another replica, is not followed: %s", source, error)

    def _specs(self, news: Iterable[tuple[str, Line]]) -> list[tuple[str, int, SourceSpec | None]]:
        """What to register (or, None, unregister) here because of these lines, with their generations."""
        specs: list[tuple[str, int, SourceSpec | None]] = []
        for source, line in news:
            if line.kind is Kind.REMOVED:
                specs.append((source, line.generation, None))
            elif line.kind is Kind.REGISTERED:
                try:
                    specs.append((source, line.generation, unpack_spec(line.spec)))
                except UnreadableError as error:
                    _log.warning("source %s of the store is not followed: %s", source, error)
        return specs

    async def _read_shards(self) -> None:
        """See what Redis holds of each source, and give back what nobody needs."""
        followed = [kept for kept in self._shelf.sources.values() if not kept.busy]
        asked_at = time.monotonic()
        answers = await self._server.read([kept.tag for kept in followed])
        for looked_at, (kept, found) in enumerate(zip(followed, answers, strict=True)):
            if looked_at % AT_A_TIME == AT_A_TIME - 1:
                await self._shelf.lull.wait()
            if kept.dropped or kept.busy:
                continue
            if isinstance(found, UnreadableError):
                self._troubles.foreign(kept.source, self._server.names.meta(kept.tag), found)
                kept.shard.remote = None
                continue
            self._troubles.end_foreign(kept.source)
            kept.shard.read(found, time.monotonic(), asked_at)
            if kept.shard.turn == 0:
                await self._sweep(kept.tag, found)
        self._shelf.wake.set()

    async def _sweep(self, tag: str, found: Found) -> None:
        for leftover in found.leftovers:
            if leftover.since_s + _STALE_STAGE_S < self._server_s:
                await self._server.sweep(tag, leftover)

    async def _bury(self) -> None:
        """End the shards of sources that were unregistered: ours, and those that another replica left unfinished."""
        waiting = {wanted.source for wanted in self._directory.wanted()}
        for tag, (source, generation) in list(self._ending.items()):
            kept = self._shelf.sources.get(source)
            if source not in waiting:
                if kept is None or kept.tag != tag:
                    await self._end(tag, generation or self._directory.generation(source))
                del self._ending[tag]
        for source, line in list(self._directory.removed()):
            if not line.spec or self._buried.get(source) == line.generation:
                continue
            try:
                tag = shard_tag(source, unpack_spec(line.spec))
            except UnreadableError:
                continue  # nobody can tell which shard it was
            if self._shelf.mine(tag):
                await self._end(tag, line.generation)
                self._buried[source] = line.generation

    async def _end(self, tag: str, generation: int) -> None:
        await self._server.remove(tag, generation)
        (found,) = await self._server.read([tag])
        if isinstance(found, Found) and found.meta is None:
            for leftover in found.leftovers:  # nobody can go on with what was staged, however fresh it is
                await self._server.sweep(tag, leftover)
