"""Finds silent divergence of Redis from memory.

Evicted buckets, another program's writes, a bug: none of them moves a checkpoint.  So from time to time the replica
whose turn a shard is compares it with memory, piece by piece.  What has changed since Redis' checkpoint differs
rightly, and is looked at again by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from kvindexer.errors import StoreError
from kvindexer.index.seam import Index
from kvindexer.settings import Settings
from kvindexer.store.kept import KeptSource
from kvindexer.store.layout import Meta, UnreadableError
from kvindexer.store.server import ShardServer
from kvindexer.store.shelf import Shelf
from kvindexer.store.troubles import Troubles

_log = logging.getLogger(__name__)

_BUCKETS: Final = 4
"""Buckets that are compared at once: a few hundred records, less than a millisecond."""
_HASHES: Final = 512
"""Hashes that are sorted into buckets at once."""


class Checks:
    """All shards of one replica that are its own to write, every `store_check_interval_s`."""

    def __init__(
        self, settings: Settings, server: ShardServer, shelf: Shelf, troubles: Troubles, checker: Checker
    ) -> None:
        self._interval_s = settings.store_check_interval_s
        self._server = server
        self._shelf = shelf
        self._troubles = troubles
        self._checker = checker
        self.done = 0
        self.divergences = 0

    async def loop(self) -> None:
        """Look at the server's own condition, then compare one source after the other, and so on."""
        while True:
            if self._shelf.reachable:
                await self._examine()
            await asyncio.sleep(self._interval_s)
            for kept in list(self._shelf.sources.values()):
                if (
                    self._shelf.reachable
                    and kept.dialled
                    and not kept.dropped
                    and not kept.busy
                    and kept.shard.turn == 0
                ):
                    await self._check(kept)

    async def _examine(self) -> None:
        with suppress(StoreError):  # the beat says so as well, and for how long
            self._troubles.server_is(await self._server.examine())

    async def _check(self, kept: KeptSource) -> None:
        kept.busy = True
        try:
            differing = await self._checker.compare(kept)
        except StoreError as error:
            self._troubles.begin(kept.source, error)
            if error.reason == "wrong_type":
                self._differs(kept, "a bucket is no hash")
            return
        except Exception:  # noqa: BLE001 - the next check is another try; it is logged
            _log.exception("source %s could not be compared with the store", kept.source)
            return
        finally:
            kept.busy = False
        self.done += differing is not None
        if differing and not kept.dropped:
            self._differs(kept, f"{differing} records differ")

    def _differs(self, kept: KeptSource, why: str) -> None:
        self.divergences += 1
        kept.shard.divergent = True
        _log.warning("source %s: memory and store are not the same: %s", kept.source, why)
        self._shelf.wake.set()


class Checker:
    """Compares shards with memory.  `pause` waits for a moment in which queries have had their turn."""

    def __init__(self, server: ShardServer, index: Index, pause: Callable[[], Awaitable[None]]) -> None:
        self._server = server
        self._index = index
        self._pause = pause

    async def compare(self, kept: KeptSource) -> int | None:
        """How many records of a shard that we don't write just now differ, although nothing has changed them since.

        None if it can't be told at the moment.  Raises StoreError.
        """
        life = kept.life
        meta = await self._comparable(kept)
        if meta is None:
            return None
        by_bucket = await self._by_bucket(kept, meta.buckets)
        suspects: list[int] = []
        async for numbers, hashes, records in self._server.buckets(kept.tag, meta, _BUCKETS):
            await self._pause()
            if kept.dropped or kept.life != life:
                return None
            ours = [block_hash for number in numbers for block_hash in by_bucket.pop(number, ())]
            found = dict(zip(hashes, records, strict=True))
            expected = dict(zip(ours, self._index.records(kept.source, ours), strict=True))
            if found != expected:
                suspects += _differences(found, expected)
        if suspects:
            confirmed = await self._confirm(kept, suspects)
            if confirmed is None or kept.life != life:
                return None
            suspects = confirmed
        return len(suspects)

    async def _comparable(self, kept: KeptSource) -> Meta | None:
        """The shard's meta, if it is of our life and not ahead of what we know."""
        (found,) = await self._server.read([kept.tag])
        if isinstance(found, UnreadableError) or found.meta is None or kept.dropped:
            return None
        theirs, shard = found.meta.checkpoint, kept.shard
        same = theirs.epoch == shard.epoch and tuple(theirs.coverage) == tuple(kept.stream.coverage)
        return found.meta if same and shard.base <= theirs.next <= kept.stream.next_seq else None

    async def _by_bucket(self, kept: KeptSource, buckets: int) -> dict[int, list[int]]:
        """Memory's hashes by bucket, in slices."""
        by_bucket: dict[int, list[int]] = {}
        hashes = self._index.hashes(kept.source)
        for start in range(0, len(hashes), _HASHES):
            for block_hash in hashes[start : start + _HASHES]:
                by_bucket.setdefault(block_hash & (buckets - 1), []).append(block_hash)
            await self._pause()
        return by_bucket

    async def _confirm(self, kept: KeptSource, suspects: Sequence[int]) -> list[int] | None:
        """Those of the suspects that differ, and not because something has changed them since Redis' checkpoint."""
        before = await self._comparable(kept)
        if before is None:
            return None
        there = await self._server.records(kept.tag, before, suspects)
        after = await self._comparable(kept)
        if after is None or after.checkpoint != before.checkpoint:
            return None  # it moves too fast just now; the next check is another try
        moving = set(kept.shard.changed_since(after.checkpoint.next))
        here = self._index.records(kept.source, suspects)
        return [
            block_hash
            for block_hash, ours, theirs in zip(suspects, here, there, strict=True)
            if ours != (theirs or b"") and block_hash not in moving
        ]


def _differences(found: dict[int, bytes], expected: dict[int, bytes]) -> list[int]:
    return [h for h in found.keys() | expected.keys() if found.get(h, b"") != expected.get(h, b"")]
