"""Finds silent divergence of Redis from memory.

Evicted buckets, another program's writes, a bug: none of them moves a checkpoint.  So from time to time the replica
whose turn a shard is compares digests, piece by piece.  What has changed since Redis' checkpoint differs rightly, and
is looked at again by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvindexer.index.seam import Index
from kvindexer.store.digest import Digest, digest_of
from kvindexer.store.kept import KeptSource
from kvindexer.store.layout import Meta, UnreadableError
from kvindexer.store.server import ShardServer

_SLICE: Final = 2_048


class Verdict(NamedTuple):
    """What a comparison found."""

    memory: Digest
    redis: Digest
    differing: int
    """Records that differ although nothing has changed them since Redis' checkpoint."""


class Checker:
    """Compares shards of one replica."""

    def __init__(self, server: ShardServer, index: Index) -> None:
        self._server = server
        self._index = index

    async def compare(self, kept: KeptSource) -> Verdict | None:
        """Compare a shard that is not being written by us; None if it can't be told just now.  Raises StoreError."""
        life = kept.life
        meta = await self._comparable(kept)
        if meta is None:
            return None
        by_bucket = await self._by_bucket(kept, meta.buckets)
        memory = redis = Digest()
        suspects: list[int] = []
        async for numbers, hashes, records in self._server.buckets(kept.tag, meta):
            if kept.dropped or kept.life != life:
                return None
            ours = [block_hash for number in numbers for block_hash in by_bucket.pop(number, ())]
            held = self._index.records(kept.source, ours)
            found = digest_of(zip(hashes, records, strict=True))
            expected = digest_of(zip(ours, held, strict=True))
            memory, redis = memory + expected, redis + found
            if found != expected:
                suspects += _differences(dict(zip(hashes, records, strict=True)), dict(zip(ours, held, strict=True)))
        if suspects:
            confirmed = await self._confirm(kept, suspects)
            if confirmed is None or kept.life != life:
                return None
            suspects = confirmed
        return Verdict(memory, redis, len(suspects))

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
        for start in range(0, len(hashes), _SLICE):
            for block_hash in hashes[start : start + _SLICE]:
                by_bucket.setdefault(block_hash & (buckets - 1), []).append(block_hash)
            await asyncio.sleep(0)
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
