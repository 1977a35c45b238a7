"""The calls on Redis that replicas and readers make: one method each, bounded in time, with our errors.

Every method raises StoreError and nothing else; what a script refuses is an answer (`Refusal`), not an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, cast

from redis.exceptions import ResponseError

from kvindexer.errors import StoreError
from kvindexer.store import scripts
from kvindexer.store.condition import Problem, examine
from kvindexer.store.connect import MAX_CONNECTIONS, Client
from kvindexer.store.failures import HINTS, asking
from kvindexer.store.layout import (
    LAYOUT,
    Checkpoint,
    Found,
    Leftover,
    Meta,
    Names,
    UnreadableError,
    read_meta,
)

_READ_BUCKETS: Final = 32
"""Buckets a round trip, at most: some 2,000 records."""
_SWEEP_BUCKETS: Final = 512
_HASH_BYTES: Final = 8
_METAS: Final = 256
_METAS_IN_PASSING: Final = 32
"""Of which a reply is understood in less than a millisecond: replicas ask for all of them all the time."""
_STEPS: Final = 3
"""Timeouts that one call may take: a new connection needs several answers."""
_HOLD_MS: Final = 5_000
_REMEMBER_REMOVED_S: Final = 86_400


class Refusal(StrEnum):
    """Why a script has written nothing."""

    LAYOUT = "layout"  # another program's, or a newer one's
    REMOVED = "removed"  # unregistered
    ABSENT = "absent"  # flushed away
    EPOCH = "epoch"  # another life
    GENERATION = "generation"  # written anew meanwhile, into other buckets
    BEHIND = "behind"  # older than the flush begins
    AHEAD = "ahead"  # somebody else was faster
    COVERAGE = "coverage"  # somebody knows more
    LOST = "lost"  # what was staged is gone
    HELD = "held"  # somebody reads all of it just now
    IN_USE = "in_use"
    NEWER = "newer"  # registered again


class Beat(NamedTuple):
    """What comes back with a sign of life."""

    server_s: int
    version: bytes
    """Of the directory of sources; another one: it has changed."""
    replicas: tuple[str, ...]


class Author(NamedTuple):
    """Who writes a shard, and of what source."""

    writer: str
    source: str
    spec: bytes
    registration: int


class ShardServer:
    """Shards and the directory of one deployment, on one Redis or cluster."""

    def __init__(self, client: Client, names: Names, timeout_s: float) -> None:
        self.names = names
        self._client = client
        self._budget_s = _STEPS * timeout_s
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS - 1)

    async def close(self) -> None:
        """Hang up."""
        await self._client.aclose()

    # Shards

    async def read(self, tags: Sequence[str]) -> list[Found | UnreadableError]:
        """The meta hashes of these shards; an error in the place of one that can't be understood."""
        found: list[Found | UnreadableError] = []
        for start in range(0, len(tags), _METAS_IN_PASSING):
            keys = [self.names.meta(tag) for tag in tags[start : start + _METAS_IN_PASSING]]
            for answer in await self._hashes(keys):
                try:
                    found.append(read_meta(answer) if isinstance(answer, Mapping) else _foreign(answer))
                except UnreadableError as error:
                    found.append(error)
        return found

    async def buckets(
        self, tag: str, meta: Meta, at_once: int = _READ_BUCKETS
    ) -> AsyncIterator[tuple[range, list[int], list[bytes]]]:
        """All records of a shard: numbers of buckets, hashes and their records, so many buckets at a time.

        They are of one moment only if the meta hash is the same before and after.
        """
        a_trip = min(2 * at_once, _READ_BUCKETS)
        for start in range(0, meta.buckets, a_trip):
            asked = range(start, min(start + a_trip, meta.buckets))
            keys = [self.names.bucket(tag, meta.generation, number) for number in asked]
            answers = await self._hashes(keys)
            for first in range(0, len(asked), at_once):
                piece = slice(first, first + at_once)
                hashes: list[int] = []
                records: list[bytes] = []
                for key, answer in zip(keys[piece], answers[piece], strict=True):
                    if not isinstance(answer, Mapping):
                        raise StoreError("wrong_type", f"{key}: {answer}", HINTS["wrong_type"])
                    ours = answer if set(map(len, answer)) <= {_HASH_BYTES} else _fields_of_ours(answer)
                    hashes += [int.from_bytes(field, "little") for field in ours]
                    records += ours.values()
                yield asked[piece], hashes, records

    async def records(self, tag: str, meta: Meta, hashes: Sequence[int]) -> list[bytes | None]:
        """The records of these hashes."""
        asked = [(self.names.bucket(tag, meta.generation, h & (meta.buckets - 1)), h) for h in hashes]
        async with self._slots, asking(self._budget_s):
            pipeline = self._client.pipeline(transaction=False)
            for key, block_hash in asked:
                pipeline.hget(key, cast("str", block_hash.to_bytes(8, "little")))
            return cast("list[bytes | None]", await pipeline.execute())

    async def memory(self, tag: str, meta: Meta) -> int | None:
        """Bytes that a shard takes in Redis; None if it doesn't let us ask."""
        keys = [self.names.meta(tag), *(self.names.bucket(tag, meta.generation, n) for n in range(meta.buckets))]
        total = 0
        for start in range(0, len(keys), _METAS):
            async with self._slots, asking(self._budget_s):
                pipeline = self._client.pipeline(transaction=False)
                for key in keys[start : start + _METAS]:
                    pipeline.memory_usage(key)
                answers = await pipeline.execute(raise_on_error=False)
            if any(isinstance(answer, ResponseError) for answer in answers):
                return None
            total += sum(answer or 0 for answer in answers)
        return total

    async def flush(
        self,
        tag: str,
        author: Author,
        *,
        generation: str,
        base: int,
        upto: Checkpoint,
        facts: bytes,
        packed: bytes,
    ) -> int | Refusal:
        """Bring a shard from `base`, or anything between, to the checkpoint; returns its entries."""
        level, first = upto.coverage
        return await self._write(
            scripts.FLUSH, tag, author.registration, upto.epoch, base, upto.next, upto.digest, level, first, facts,
            author.writer, generation, packed,
        )  # fmt: skip

    async def stage(
        self, tag: str, author: Author, generation: str, buckets: int, packed: bytes, *, begin: bool
    ) -> int | Refusal:
        """Add records to a generation that is not the content yet."""
        return await self._write(
            scripts.STAGE, tag, author.registration, generation, buckets, "1" if begin else "0", packed
        )

    async def switch(
        self,
        tag: str,
        author: Author,
        *,
        generation: str,
        expected: int | None,
        upto: Checkpoint,
        facts: bytes,
        packed: bytes,
        accept_less: bool,
    ) -> int | Refusal:
        """Make a staged generation the content, if the epoch is still the expected one; returns its entries."""
        level, first = upto.coverage
        return await self._write(
            scripts.SWITCH, tag, author.registration, generation, "" if expected is None else expected, upto.epoch,
            upto.next, upto.digest, upto.birth, level, first, facts, author.writer, author.source, author.spec,
            "1" if accept_less else "0", packed,
        )  # fmt: skip

    async def grow(self, tag: str, registration: int, meta: Meta, wider: Meta, numbers: range) -> int | Refusal:
        """Copy these buckets of a shard into those of `wider`, which with the last ones becomes the content."""
        epoch, upto, *_ = meta.checkpoint
        return await self._write(
            scripts.GROW, tag, registration, epoch, upto, meta.generation, wider.generation, wider.buckets,
            numbers.start, numbers.stop,
        )  # fmt: skip

    async def sweep(self, tag: str, leftover: Leftover) -> None:
        """Give back the buckets of a generation that is no content, in pieces that block nobody."""
        for start in range(0, leftover.buckets, _SWEEP_BUCKETS):
            behind = min(start + _SWEEP_BUCKETS, leftover.buckets)
            last = "1" if behind == leftover.buckets else "0"
            await self._script(scripts.SWEEP, [self.names.meta(tag)], leftover.generation, start, behind, last)

    async def remove(self, tag: str, registration: int) -> Refusal | None:
        """End a shard: its source was unregistered.  What it held is swept by the caller."""
        answer = await self._script(scripts.REMOVE, [self.names.meta(tag)], LAYOUT, registration, _REMEMBER_REMOVED_S)
        word = _words(answer)[0]
        return None if word == b"ok" else Refusal(word.decode())

    async def hold(self, tag: str) -> None:
        """Ask writers of a shard to wait, for a few seconds at most: somebody reads all of it."""
        async with self._slots, asking(self._budget_s):
            await self._client.set(self.names.hold(tag), b"1", px=_HOLD_MS)

    async def release(self, tag: str) -> None:
        """Let writers go on."""
        async with self._slots, asking(self._budget_s):
            await self._client.delete(self.names.hold(tag))

    # All of the deployment

    async def examine(self) -> list[Problem]:
        """What of the server's own condition is a danger to our keys."""
        async with self._slots, asking(self._budget_s):
            return await examine(self._client)

    async def beat(self, replica: str, forget_after_s: int, *, leaving: bool = False) -> Beat:
        """Say that we are alive, or not much longer; learn who else is, and whether the directory has changed."""
        keys = [self.names.replicas, self.names.sources]
        try:
            answer = await self._script(scripts.BEAT, keys, replica, forget_after_s, "1" if leaving else "0")
        except StoreError as error:
            if error.reason != "wrong_type":
                raise
            raise StoreError(error.reason, f"{' or '.join(keys)}: {error.message}", error.hint) from error
        server_s, version, *replicas = _words(answer)
        return Beat(int(server_s), version, tuple(name.decode(errors="replace") for name in replicas))

    async def lines(self) -> Mapping[bytes, bytes]:
        """The directory of sources, line by line."""
        (answer,) = await self._hashes([self.names.sources])
        if isinstance(answer, Mapping):
            return answer
        raise StoreError("wrong_type", f"{self.names.sources}: {answer}", HINTS["wrong_type"])

    async def register(self, source: str, kind: str, spec: bytes, generation: int | None, known: int) -> int:
        """Write a line of the directory; returns the generation of what stands there now.

        Without a generation it gets one above all that are there, and above the one that is known.
        """
        again = "" if generation is None else generation
        answer = await self._script(scripts.REGISTER, [self.names.sources], source, kind, spec, again, known)
        return int(cast("bytes", answer))

    async def _hashes(self, keys: Sequence[str]) -> list[Mapping[bytes, bytes] | BaseException]:
        async with self._slots, asking(self._budget_s):
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.hgetall(key)
            answers = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception) and "WRONGTYPE" not in str(answer):
                async with asking(self._budget_s):
                    raise answer
        return cast("list[Mapping[bytes, bytes] | BaseException]", answers)

    async def _write(
        self, script: scripts.Script, tag: str, registration: int, *arguments: bytes | str | int
    ) -> int | Refusal:
        answer = _words(await self._script(script, [self.names.meta(tag)], LAYOUT, registration, *arguments))
        if answer[0] == b"ok":
            return int(answer[1]) if len(answer) > 1 else 0
        return Refusal(answer[0].decode())

    async def _script(self, script: scripts.Script, keys: list[str], *arguments: bytes | str | int) -> object:
        async with self._slots, asking(self._budget_s):
            return await scripts.call(self._client, script, keys, *arguments)


def _words(answer: object) -> list[bytes]:
    words = answer if isinstance(answer, list) else []
    return [b"%d" % word if isinstance(word, int) else word for word in words] or [b""]


def _fields_of_ours(answer: Mapping[bytes, bytes]) -> Mapping[bytes, bytes]:
    """Without those that can't be hashes: nobody of us has written them, and nobody reads them."""
    return {field: record for field, record in answer.items() if len(field) == _HASH_BYTES}


def _foreign(error: BaseException) -> Found:
    raise UnreadableError(f"it is no hash ({error})")
