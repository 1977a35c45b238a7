"""Carrying out what a shard decides: flush, rewrite, load.

The index is read and its checkpoint taken without an await between them, so what is written as (epoch, next) is what
was held there.  A shard that is written anew is staged in pieces beside the old content; what changes meanwhile
is collected, and goes in with the last piece, which puts the new content in place of the old.  A flush is made ready
in pieces too, and sent as one.
"""

from __future__ import annotations

import logging
import secrets
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Final

from kvindexer.errors import StoreError
from kvindexer.index.seam import Index
from kvindexer.lull import Lull
from kvindexer.store.kept import KeptSource
from kvindexer.store.layout import (
    MAX_RECORD_BYTES,
    Coverage,
    Leftover,
    Meta,
    Packing,
    UnreadableError,
    buckets_for,
    more_buckets,
    overfull,
    pack_records,
)
from kvindexer.store.server import Refusal, ShardServer
from kvindexer.store.shard import Flush, Rewrite
from kvindexer.types import Epoch
from kvindexer.watching.logs import tell

_log = logging.getLogger(__name__)

PIECE_RECORDS: Final = 128
"""Records that are packed at once: 0.2 ms, between which queries get their turn."""
_LEAST_RECORDS_A_S: Final = 100_000
"""Where queries leave little of the loop, pieces are larger, so that this is kept up."""
_REST_PIECES: Final = 16
"""What changed while all else was made ready may be so much, and is made in one go: slices of ingest lie between."""
_COMMAND_PIECES: Final = 8
"""Pieces of one command, which costs as much as hundreds of records; the more, the more share a bucket."""
_MOST_BEHIND: Final = 2_000_000
"""Records that a rewrite may still need after the first pass; a source that changes faster can't be caught."""
_HASHES_A_RECORD: Final = 4
"""Hashes that are told apart in the time in which one record is packed."""
_LOAD_TRIES: Final = 4
_LARGEST: Final = 0xFFFFFFFF


class Writing:
    """Flushes, rewrites and loads of all shards of one replica."""

    def __init__(
        self,
        server: ShardServer,
        index: Index,
        replica: str,
        lull: Lull,
        *,
        clock: Callable[[], float] = time.monotonic,
        piece_records: int = PIECE_RECORDS,
    ) -> None:
        self._server = server
        self._index = index
        self._replica = replica
        self._lull = lull
        self._clock = clock
        self._piece_records = piece_records
        self.records = 0
        """Sent to the store so far."""

    async def _commands(
        self, kept: KeptSource, hashes: Sequence[int], buckets: int, most: int
    ) -> AsyncGenerator[bytes]:
        """Pack records in pieces, then those that changed meanwhile, and so on, until it is so many or more.

        What is in `kept.collected` in the end is not in them, or has changed since; it is a few pieces' worth unless
        the source has outrun us.
        """
        life, size, count = kept.life, self._piece_records, 0
        enough = size
        room = await self._give_way()  # finding out what has changed was a piece of work itself
        while len(hashes) > enough:
            for begin in range(0, len(hashes), _COMMAND_PIECES * size):
                command, packing = hashes[begin : begin + _COMMAND_PIECES * size], Packing(buckets)
                while command:
                    piece, command = command[:room], command[room:]
                    packing.add(piece, self._records(kept, piece))
                    count += len(piece)
                    room = await self._give_way()
                    if kept.dropped or kept.life != life:
                        return
                yield packing.packed()
                room = await self._give_way()
            hashes = sorted(kept.collected or ())
            if count >= most:
                return
            kept.collected, enough = set(), size * _REST_PIECES
        kept.changed(hashes)

    async def _give_way(self) -> int:
        """Let queries pass; returns how many records may be packed then."""
        waited_s = await self._lull.wait()
        return max(self._piece_records, int(waited_s * _LEAST_RECORDS_A_S))

    async def flush(self, kept: KeptSource, step: Flush) -> Refusal | None:
        """Write what has changed; to be called in the same breath as the decision.  Raises StoreError."""
        changes = kept.shard.changed_since(step.base)
        return await self._amending(kept, self._flush(kept, step, changes))

    async def rewrite(self, kept: KeptSource, step: Rewrite) -> Refusal | None:
        """Write everything anew and put it in the place of what is there.  Raises StoreError."""
        return await self._amending(kept, self._rewrite(kept, step))

    async def _amending(self, kept: KeptSource, write: Awaitable[Refusal | None]) -> Refusal | None:
        """Amendments are in what is written, or still to be written if that fails."""
        amended = kept.shard.take_amendments()
        kept.collected = set()
        refusal: Refusal | None = Refusal.LOST
        try:
            refusal = await write
        finally:
            kept.collected = None
            if refusal is not None:
                kept.shard.amended(amended, self._clock())
        return refusal

    async def _flush(self, kept: KeptSource, step: Flush, changes: Sequence[array[int]]) -> Refusal | None:
        """A record that has changed since it was packed is packed again behind it: the later one counts."""
        shard, life, meta = kept.shard, kept.life, _content(kept)
        hashes = await self._each_once(changes)
        if kept.dropped or kept.life != life:
            return Refusal.LOST
        pieces = [packed async for packed in self._commands(kept, hashes, meta.buckets, len(hashes))]
        if kept.dropped or kept.life != life:
            return Refusal.LOST
        pieces.append(self._rest(kept, sorted(kept.collected or ()), meta.buckets))
        upto = shard.checkpoint(meta.checkpoint.epoch)
        facts = self._index.facts(kept.source)
        author, generation = kept.author(self._replica), meta.generation
        answer = await self._server.flush(
            kept.tag, author, generation=generation, base=step.base, upto=upto, facts=facts, packed=b"".join(pieces)
        )
        if isinstance(answer, Refusal):
            return answer
        if not kept.dropped:
            written = meta._replace(
                checkpoint=upto._replace(birth=meta.checkpoint.birth), entries=answer, facts=facts
            )
            shard.stored(written, self._clock())
        return None

    async def _each_once(self, changes: Sequence[array[int]]) -> list[int]:
        """Thousands of them have gathered where Redis is slow: that is a piece of work too."""
        hashes: set[int] = set()
        looked_at = 0
        for part in changes:
            hashes.update(part)
            looked_at += len(part)
            if looked_at >= _HASHES_A_RECORD * self._piece_records:
                await self._lull.wait()
                looked_at = 0
        return list(hashes)

    async def _rewrite(self, kept: KeptSource, step: Rewrite) -> Refusal | None:
        shard, index, server, life = kept.shard, self._index, self._server, kept.life
        author = kept.author(self._replica)
        before = shard.remote.meta if shard.remote is not None else None
        hashes = index.hashes(kept.source)
        generation, buckets = secrets.token_hex(4), buckets_for(len(hashes))
        if before is not None and overfull(len(hashes), before.buckets):
            buckets = more_buckets(len(hashes), before.buckets)
        most = len(hashes) + _MOST_BEHIND
        begin = True
        async with aclosing(self._commands(kept, hashes, buckets, most)) as commands:
            async for packed in commands:
                staged = await server.stage(kept.tag, author, generation, buckets, packed, begin=begin)
                begin = False
                if isinstance(staged, Refusal):
                    return staged
        if begin:
            staged = await server.stage(kept.tag, author, generation, buckets, b"", begin=True)
            if isinstance(staged, Refusal):
                return staged
        rest = sorted(kept.collected or ())
        if kept.dropped or kept.life != life or len(rest) > self._piece_records * _REST_PIECES:
            return Refusal.LOST
        upto = shard.checkpoint(step.epoch)
        facts = index.facts(kept.source)
        answer = await server.switch(
            kept.tag,
            author,
            generation=generation,
            expected=step.expected,
            upto=upto,
            facts=facts,
            packed=self._rest(kept, rest, buckets),
            accept_less=step.accept_less,
        )
        if isinstance(answer, Refusal):
            return answer
        if not kept.dropped and kept.life == life:
            written = Meta(
                upto, generation, buckets, answer, facts, self._replica, kept.source, kept.packed_spec,
                shard.registration,
            )  # fmt: skip
            shard.stored(written, self._clock(), anew=True)
            kept.stream.epoch = Epoch(step.epoch)
        tell(_log, logging.INFO, "shard written", source=kept.source, records=answer, why=step.why)
        if before is not None:
            await server.sweep(kept.tag, Leftover(before.generation, before.buckets, 0))
        return None

    def _rest(self, kept: KeptSource, hashes: Sequence[int], buckets: int) -> bytes:
        return pack_records(hashes, self._records(kept, hashes), buckets)

    def _records(self, kept: KeptSource, hashes: Sequence[int]) -> list[bytes]:
        records = self._index.records(kept.source, hashes)
        self.records += len(records)
        if any(len(record) > MAX_RECORD_BYTES for record in records):  # thousands of places of one block
            return [record if len(record) <= MAX_RECORD_BYTES else b"" for record in records]
        return records

    async def load(self, kept: KeptSource) -> bool:
        """Fill a freshly attached share from its shard and let its stream resume there; False: there is nothing.

        Raises StoreError; whatever it raises or returns but True, the share is empty.
        """
        loaded = False
        try:
            loaded = await self._load(kept)
        except UnreadableError as error:
            raise StoreError(
                "foreign", f"{self._server.names.meta(kept.tag)}: {error}", "choose another store_namespace"
            ) from None
        finally:
            if not loaded and not kept.dropped:
                self._index.attach(kept.source, kept.spec)
        return loaded

    async def _load(self, kept: KeptSource) -> bool:
        for attempt in range(_LOAD_TRIES):
            last = attempt == _LOAD_TRIES - 1
            if attempt:
                await self._server.hold(kept.tag)
            try:
                meta = await self._read(kept)
                if meta is None or kept.dropped:
                    return False
                count = await self._fill(kept, meta, hold=bool(attempt))
                after = await self._read(kept)
            finally:
                if attempt:
                    await self._server.release(kept.tag)
            if kept.dropped or after is None:
                return False
            if after[:4] == meta[:4]:
                self._resume(kept, meta, count)
                return True
            if last:
                break
            self._index.attach(kept.source, kept.spec)
        _log.warning("source %s: its shard changes faster than it can be read", kept.source)
        return False

    async def _read(self, kept: KeptSource) -> Meta | None:
        (found,) = await self._server.read([kept.tag])
        if isinstance(found, UnreadableError):
            raise found
        kept.shard.read(found, self._clock())
        return found.meta

    async def _fill(self, kept: KeptSource, meta: Meta, *, hold: bool) -> int:
        count = 0
        async for _, hashes, records in self._server.buckets(kept.tag, meta):
            await self._lull.wait()
            if kept.dropped:
                break
            count += self._load_good(kept.source, hashes, records)
            if hold:
                await self._server.hold(kept.tag)
        return count

    def _load_good(self, source: str, hashes: Sequence[int], records: Sequence[bytes]) -> int:
        """Load what can be read; returns how many records that were.  One that can't counts as missing."""
        try:
            self._index.load(source, hashes, records)
        except ValueError:
            if len(hashes) == 1:
                return 0
            middle = len(hashes) // 2
            parts = (slice(middle), slice(middle, None))
            return sum(self._load_good(source, hashes[part], records[part]) for part in parts)
        return len(hashes)

    def _resume(self, kept: KeptSource, meta: Meta, count: int) -> None:
        """All records are in; one that is missing is no reason to forget the others, but to say so."""
        self._index.loaded(kept.source, meta.facts)
        checkpoint = meta.checkpoint
        if count != meta.entries:
            _log.warning("source %s: %d of %d records of its shard are there", kept.source, count, meta.entries)
            checkpoint = checkpoint._replace(coverage=Coverage(0, _LARGEST))
        epoch, next_seq, digest, birth, coverage = checkpoint
        kept.stream.resume(Epoch(epoch), next_seq, digest, birth, coverage)
        kept.shard.loaded(checkpoint, self._clock())
        kept.shard.divergent = count != meta.entries
        tell(_log, logging.INFO, "shard loaded", source=kept.source, records=count, seq=next_seq - 1)


def _content(kept: KeptSource) -> Meta:
    """What Redis holds; a flush is only decided on where there is something."""
    if kept.shard.remote is None or kept.shard.remote.meta is None:
        raise RuntimeError("nothing to flush onto")
    return kept.shard.remote.meta
