"""Finds silent divergence of Redis from memory.

Evicted buckets, another program's writes, a bug: none of them moves a checkpoint.  So from time to time the replica
whose turn a shard is compares it with memory, piece by piece.  What has changed since Redis' checkpoint differs
rightly, and is looked at again by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from kvindexer.errors import StoreError
from kvindexer.index.seam import Index
from kvindexer.lull import Lull
from kvindexer.settings import Settings
from kvindexer.store.kept import KeptSource
from kvindexer.store.layout import Meta, UnreadableError
from kvindexer.store.server import ShardServer
from kvindexer.store.shelf import Shelf
from kvindexer.store.troubles import Troubles

_log = logging.getLogger(__name__)

_BUCKETS: Final = 4
"""Buckets that are compared at once: a few hundred records, less than a millisecond."""
_REST: Final = 10
"""Rest after work, to work."""
_MOST_REST_S: Final = 0.02
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
                if self._shelf.reachable and kept.dialled and not kept.dropped and kept.shard.turn == 0:
                    await self._check(kept)

    async def _examine(self) -> None:
        with suppress(StoreError):  # the beat says so as well, and for how long
            self._troubles.server_is(await self._server.examine())

    async def _check(self, kept: KeptSource) -> None:
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
        self.done += differing is not None
        if differing and not kept.dropped:
            self._differs(kept, f"{differing} records differ")

    def _differs(self, kept: KeptSource, why: str) -> None:
        self.divergences += 1
        kept.shard.divergent = True
        _log.warning("source %s: memory and store are not the same: %s", kept.source, why)
        self._shelf.wake.set()


class Checker:
    """Compares shards with memory, and rests in between: it is in no hurry, and others are."""

    def __init__(self, server: ShardServer, index: Index, lull: Lull) -> None:
        self._server = server
        self._index = index
        self._lull = lull
        self._rested_at = 0.0

    async def compare(self, kept: KeptSource) -> int | None:
        """How many records of a shard differ, although nothing has changed them since Redis' checkpoint.

        None if it can't be told at the moment, for instance as the shard has been written anew.  Raises StoreError.
        """
        life = kept.life
        meta = await self._comparable(kept)
        if meta is None:
            return None
        by_bucket = await self._by_bucket(kept, meta.buckets)
        suspects: list[int] = []
        async for numbers, hashes, records in self._server.buckets(kept.tag, meta, _BUCKETS):
            await self._rest()
            if kept.dropped or kept.life != life:
                return None
            found = dict(zip(hashes, records, strict=True))
            # also what has come since the hashes were sorted, and was written already
            ours = list(found.keys() | {block_hash for number in numbers for block_hash in by_bucket.pop(number, ())})
            expected = dict(zip(ours, self._index.records(kept.source, ours), strict=True))
            if found != expected:
                suspects += _differences(found, expected)
        if suspects:
            confirmed = await self._confirm(kept, meta.generation, suspects)
            if confirmed is None or kept.life != life:
                return None
            suspects = confirmed
        return len(suspects)

    async def _rest(self) -> None:
        """Stay away for many times as long as was worked: all of a check is a few percent of a core."""
        worked_s = time.monotonic() - self._rested_at
        await asyncio.sleep(min(_REST * worked_s, _MOST_REST_S))
        await self._lull.wait()
        self._rested_at = time.monotonic()

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
            await self._rest()
        return by_bucket

    async def _confirm(self, kept: KeptSource, generation: str, suspects: Sequence[int]) -> list[int] | None:
        """Those of the suspects that differ, and not because something has changed them since Redis' checkpoint."""
        before = await self._comparable(kept)
        if before is None or before.generation != generation:
            return None
        there: list[bytes | None] = []
        for start in range(0, len(suspects), _HASHES):
            there += await self._server.records(kept.tag, before, suspects[start : start + _HASHES])
        after = await self._comparable(kept)
        if after is None or after.checkpoint != before.checkpoint:
            return None  # it moves too fast just now; the next check is another try
        here: list[bytes] = []
        for start in range(0, len(suspects), _HASHES):
            await self._lull.wait()
            here += self._index.records(kept.source, suspects[start : start + _HASHES])
        upto = after.checkpoint.next
        if kept.dropped or kept.shard.base > upto:
            return None  # written meanwhile: what changed before that is not known any more
        moving = set().union(*kept.shard.changed_since(upto))
        return [
            block_hash
            for block_hash, ours, theirs in zip(suspects, here, there, strict=True)
            if ours != (theirs or b"") and block_hash not in moving
        ]


def _differences(found: dict[int, bytes], expected: dict[int, bytes]) -> list[int]:
    return [h for h in found.keys() | expected.keys() if found.get(h, b"") != expected.get(h, b"")]
