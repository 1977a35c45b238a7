"""The scripts on a real server: each refuses what would be wrong, and writes all or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvindexer.settings import Settings
from kvindexer.store.connect import open_client
from kvindexer.store.layout import Checkpoint, Coverage, Found, Leftover, Meta, Names, pack_records
from kvindexer.store.server import Author, Refusal, ShardServer
from servers import Server

TAG = "0123456789abcdef"
AUTHOR = Author("a", "tcp://10.0.0.1:5557", b"{}", 3)
HASHES = list(range(1000, 1200))
RECORDS = [b"%d" % value for value in HASHES]
FULL = Coverage(2, 0)


def at(epoch: int, upto: int, coverage: Coverage = FULL) -> Checkpoint:
    """A checkpoint of a life that is told by its epoch."""
    return Checkpoint(epoch, upto, b"digest %d" % upto, b"birth %d" % epoch, coverage)


class Shard:
    """One shard and the calls on it, with what a test does not care about filled in."""

    def __init__(self, server: ShardServer) -> None:
        self.server = server

    async def create(self, upto: Checkpoint, expected: int | None = None, **changes: Any) -> int | Refusal:
        """Stage all records in two pieces and switch to them."""
        generation, author = changes.get("generation", f"{upto.epoch:08x}"), changes.get("author", AUTHOR)
        for start in (0, 100):
            packed = pack_records(HASHES[start : start + 100], RECORDS[start : start + 100], 4)
            staged = await self.server.stage(TAG, author, generation, 4, packed, begin=not start)
            if isinstance(staged, Refusal):
                return staged
        return await self.switch(upto, expected, generation, author=author, accept_less=changes.get("less", False))

    async def switch(
        self,
        upto: Checkpoint,
        expected: int | None,
        generation: str,
        *,
        author: Author = AUTHOR,
        accept_less: bool = False,
    ) -> int | Refusal:
        """Put a staged generation in place."""
        return await self.server.switch(
            TAG, author, generation=generation, expected=expected, upto=upto, facts=b"facts", packed=b"",
            accept_less=accept_less,
        )  # fmt: skip

    async def flush(
        self,
        base: int,
        upto: Checkpoint,
        values: dict[int, bytes],
        author: Author = AUTHOR,
        *,
        generation: str | None = None,
    ) -> int | Refusal:
        """Write some records, into the generation that `create` makes."""
        packed = pack_records(list(values), list(values.values()), 4)
        generation = generation or f"{upto.epoch:08x}"
        return await self.server.flush(
            TAG, author, generation=generation, base=base, upto=upto, facts=b"facts", packed=packed
        )

    async def found(self) -> Found:
        """The meta hash."""
        (found,) = await self.server.read([TAG])
        assert isinstance(found, Found)
        return found

    async def meta(self) -> Meta:
        """The content's description; there must be some."""
        meta = (await self.found()).meta
        assert meta is not None
        return meta

    async def records(self) -> dict[int, bytes]:
        """Everything in the content's buckets."""
        records: dict[int, bytes] = {}
        async for _, hashes, values in self.server.buckets(TAG, await self.meta()):
            records.update(zip(hashes, values, strict=True))
        return records


def with_shard(redis: Server, scenario: Callable[[Shard], Awaitable[None]]) -> None:
    """Run a scenario on an empty server."""

    async def run() -> None:
        values: dict[str, Any] = {"store": redis.url}
        server = ShardServer(open_client(Settings(**values)), Names("kvindexer"), 5)
        try:
            await scenario(Shard(server))
        finally:
            await server.close()

    asyncio.run(run())


def test_a_staged_generation_becomes_the_content_at_once(redis_server: Server) -> None:
    """Until the switch there is no content; after it there is all of it, with the checkpoint that belongs to it."""

    async def scenario(shard: Shard) -> None:
        packed = pack_records(HASHES, RECORDS, 4)
        await shard.server.stage(TAG, AUTHOR, "00000001", 4, packed, begin=True)
        found = await shard.found()
        assert found.meta is None
        assert [(one.generation, one.buckets) for one in found.leftovers] == [("00000001", 4)]
        assert await shard.switch(at(1, 7), None, "00000001") == len(HASHES)
        meta = await shard.meta()
        assert meta.checkpoint == at(1, 7)
        assert (meta.buckets, meta.entries, meta.writer, meta.facts) == (4, len(HASHES), "a", b"facts")
        assert await shard.records() == dict(zip(HASHES, RECORDS, strict=True))
        assert (await shard.found()).leftovers == ()

    with_shard(redis_server, scenario)


def test_of_two_records_of_a_hash_in_one_flush_the_later_one_counts(redis_server: Server) -> None:
    """What changes while a flush is made ready is packed again behind it."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        early = pack_records([1, 2, 3], [b"1", b"2", b"3"], 4)
        late = pack_records([2, 3, 4], [b"two", b"", b"4"], 4)
        entries = await shard.server.flush(
            TAG, AUTHOR, generation="00000001", base=7, upto=at(1, 8), facts=b"facts", packed=early + late
        )
        assert await shard.records() == dict(zip(HASHES, RECORDS, strict=True)) | {1: b"1", 2: b"two", 4: b"4"}
        assert entries == len(await shard.records())

    with_shard(redis_server, scenario)


def test_a_replica_that_leaves_is_forgotten_at_once(redis_server: Server) -> None:
    async def scenario(shard: Shard) -> None:
        for name in "ab":
            beat = await shard.server.beat(name, 5)
        assert beat.replicas == ("a", "b")
        await shard.server.beat("a", 5, leaving=True)
        assert (await shard.server.beat("b", 5)).replicas == ("b",)
        assert (await shard.server.beat("a", 5)).replicas == ("a", "b")

    with_shard(redis_server, scenario)


def test_a_flush_is_absolute_and_idempotent(redis_server: Server) -> None:
    """The same flush twice, or by two replicas with different boundaries, leaves what one would have left."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        assert await shard.flush(7, at(1, 9), {1000: b"", 1001: b"new", 5000: b"more"}) == len(HASHES)
        assert await shard.flush(7, at(1, 9), {1000: b"", 1001: b"new", 5000: b"more"}) == len(HASHES)
        assert await shard.flush(5, at(1, 10), {1000: b"", 1001: b"new", 5000: b"", 5001: b"x"}) == len(HASHES)
        expected = {**dict(zip(HASHES, RECORDS, strict=True)), 1001: b"new", 5001: b"x"}
        del expected[1000]
        assert await shard.records() == expected
        assert (await shard.meta()).checkpoint == at(1, 10)

    with_shard(redis_server, scenario)


@pytest.mark.parametrize(
    ("base", "upto", "author", "refusal"),
    [
        (8, at(1, 9), AUTHOR, Refusal.BEHIND),
        (3, at(1, 6), AUTHOR, Refusal.AHEAD),
        (7, at(2, 9), AUTHOR, Refusal.EPOCH),
        (7, at(1, 9, Coverage(1, 0)), AUTHOR, Refusal.COVERAGE),
        (7, at(1, 9, Coverage(2, 1)), AUTHOR, Refusal.COVERAGE),
    ],
)
def test_a_flush_is_refused(
    redis_server: Server, base: int, upto: Checkpoint, author: Author, refusal: Refusal
) -> None:
    """Behind a hole, backwards, onto another life, with another coverage: nothing is written."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        before = await shard.meta(), await shard.records()
        assert await shard.flush(base, upto, {1000: b"wrong"}, author) is refusal
        assert (await shard.meta(), await shard.records()) == before

    with_shard(redis_server, scenario)


def test_a_flush_never_makes_a_less_covered_shard_look_better(redis_server: Server) -> None:
    """What was lost before is not in a flush: only a rewrite brings it."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7, Coverage(0, 5)))
        assert await shard.flush(7, at(1, 9), {1000: b"new"}) is Refusal.COVERAGE
        assert await shard.flush(7, at(1, 9, Coverage(0, 5)), {1000: b"new"}) == len(HASHES)

    with_shard(redis_server, scenario)


def test_a_flush_into_another_generation_is_refused(redis_server: Server) -> None:
    """Its records are packed for other buckets: new ones would never be found there, and old ones never removed."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        await shard.create(at(1, 8), 1, generation="rewrite")
        before = await shard.meta(), await shard.records()
        assert await shard.flush(7, at(1, 9), {1000: b"", 5000: b"x"}) is Refusal.GENERATION
        assert (await shard.meta(), await shard.records()) == before
        assert await shard.flush(7, at(1, 9), {1000: b"", 5000: b"x"}, generation="rewrite") == len(HASHES)

    with_shard(redis_server, scenario)


def test_a_flush_needs_content(redis_server: Server) -> None:
    """After FLUSHALL, or before the first rewrite, there is nothing that a flush could bring up to date."""

    async def scenario(shard: Shard) -> None:
        assert await shard.flush(0, at(1, 1), {1: b"x"}) is Refusal.ABSENT
        assert redis_server.ask("DBSIZE") == 0

    with_shard(redis_server, scenario)


def test_of_two_that_mint_an_epoch_one_wins(redis_server: Server) -> None:
    """Compare and set: who expected the epoch that was there goes first, the other is told."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        assert await shard.create(at(2, 3), 1, generation="aaaaaaaa") == len(HASHES)
        assert await shard.create(at(2, 4), 1, generation="bbbbbbbb") is Refusal.EPOCH
        assert (await shard.meta()).generation == "aaaaaaaa"
        assert await shard.create(at(1, 9), None, generation="cccccccc") is Refusal.EPOCH

    with_shard(redis_server, scenario)


def test_a_rewrite_of_the_same_life_goes_neither_back_nor_to_less_coverage(redis_server: Server) -> None:
    """Unless it says that it knows: nobody better is writing any more."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        assert await shard.create(at(1, 6), 1, generation="aaaaaaaa") is Refusal.AHEAD
        less = at(1, 8, Coverage(1, 5))
        assert await shard.create(less, 1, generation="bbbbbbbb") is Refusal.COVERAGE
        assert await shard.create(less, 1, generation="cccccccc", less=True) == len(HASHES)
        assert (await shard.meta()).checkpoint == less

    with_shard(redis_server, scenario)


def test_seqs_beyond_doubles_are_told_apart(redis_server: Server) -> None:
    """Lua's numbers end at 2^53; epochs and seqs do not."""

    async def scenario(shard: Shard) -> None:
        large = 2**60
        await shard.create(at(large, large + 1))
        assert await shard.flush(large + 2, at(large, large + 3), {1: b"x"}) is Refusal.BEHIND
        assert await shard.flush(large, at(large, large), {1: b"x"}) is Refusal.AHEAD
        assert await shard.flush(large + 1, at(large + 1, large + 2), {1: b"x"}) is Refusal.EPOCH
        assert await shard.flush(9, at(large, large + 2), {1: b"x"}) == len(HASHES) + 1
        assert (await shard.meta()).checkpoint.next == large + 2

    with_shard(redis_server, scenario)


def test_what_was_staged_and_lost_is_not_switched_to(redis_server: Server) -> None:
    """A FLUSHALL, or a sweep, between two pieces."""

    async def scenario(shard: Shard) -> None:
        piece = pack_records(HASHES, RECORDS, 4)
        await shard.server.stage(TAG, AUTHOR, "aaaaaaaa", 4, piece, begin=True)
        redis_server.ask("FLUSHALL")
        assert await shard.server.stage(TAG, AUTHOR, "aaaaaaaa", 4, piece, begin=False) is Refusal.LOST
        assert await shard.switch(at(1, 7), None, "aaaaaaaa") is Refusal.LOST
        assert redis_server.ask("DBSIZE") == 0

    with_shard(redis_server, scenario)


def test_a_replaced_generation_is_left_over_until_it_is_swept(redis_server: Server) -> None:
    """And a sweep never takes the content."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        await shard.create(at(2, 1), 1)
        (leftover,) = (await shard.found()).leftovers
        assert leftover == Leftover("00000001", 4, 0)
        await shard.server.sweep(TAG, leftover)
        assert (await shard.found()).leftovers == ()
        await shard.server.sweep(TAG, Leftover("00000002", 4, 0))
        assert await shard.records() == dict(zip(HASHES, RECORDS, strict=True))
        assert redis_server.ask("DBSIZE") == 1 + 4

    with_shard(redis_server, scenario)


WIDER = "ffffffff"


async def grown(shard: Shard, *pieces: range, registration: int = 3, of: Meta | None = None) -> int | Refusal:
    """Copy the 4 buckets into 16, in pieces; the answer to the last call, or to the first that is refused."""
    meta = of or await shard.meta()
    answer: int | Refusal = 0
    for piece in pieces:
        answer = await shard.server.grow(TAG, registration, meta, meta._replace(generation=WIDER, buckets=16), piece)
        if isinstance(answer, Refusal):
            break
    return answer


def test_a_shard_gets_more_buckets_without_its_records_being_sent(redis_server: Server) -> None:
    """Until the last piece nothing has changed; then each record lies where its hash says, in the new generation."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        before = await shard.meta()
        assert await grown(shard, range(3)) == 150
        assert await shard.meta() == before
        assert await grown(shard, range(3, 4), of=before) == len(HASHES)
        assert await shard.meta() == before._replace(generation=WIDER, buckets=16)
        assert await shard.records() == dict(zip(HASHES, RECORDS, strict=True))
        found = await shard.server.records(TAG, await shard.meta(), HASHES)
        assert found == RECORDS
        (leftover,) = (await shard.found()).leftovers
        assert leftover == Leftover(before.generation, 4, 0)
        await shard.server.sweep(TAG, leftover)
        assert redis_server.ask("DBSIZE") == 1 + 16
        assert (
            await shard.flush(7, at(1, 8), {1000: b"", 5000: b"x"}, generation=before.generation)
            is Refusal.GENERATION
        )

    with_shard(redis_server, scenario)


def test_a_large_bucket_can_be_moved(redis_server: Server) -> None:
    """Hashes need not be spread well: Lua passes only so many values to a call."""

    async def scenario(shard: Shard) -> None:
        hashes = [number << 24 for number in range(20_000)]
        packed = pack_records(hashes, [b"x"] * len(hashes), 4)
        await shard.server.stage(TAG, AUTHOR, "00000001", 4, packed, begin=True)
        await shard.switch(at(1, 7), None, "00000001")
        assert await grown(shard, range(4)) == len(hashes)
        assert len(await shard.records()) == len(hashes)

    with_shard(redis_server, scenario)


def test_another_program_s_fields_are_not_moved(redis_server: Server) -> None:
    """Nor are they counted: our records are all there."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        redis_server.ask("HSET", Names("kvindexer").bucket(TAG, "00000001", 0), "theirs", "x")
        assert await grown(shard, range(4)) == len(HASHES)
        assert await shard.records() == dict(zip(HASHES, RECORDS, strict=True))

    with_shard(redis_server, scenario)


META, BUCKET = Names("kvindexer").meta(TAG), Names("kvindexer").bucket(TAG, "00000001", 3)


def told(*words: str | bytes) -> Callable[[Shard, Server], Awaitable[object]]:
    """What a Redis command does that comes between."""

    async def happens(_: Shard, server: Server) -> None:
        server.ask(*words)

    return happens


@pytest.mark.parametrize(
    ("between", "refusal"),
    [
        pytest.param(lambda shard, _: shard.flush(7, at(1, 8), {1000: b"new"}), Refusal.AHEAD, id="flush"),
        pytest.param(told("HSET", META, "next", "6"), Refusal.BEHIND, id="older state"),
        pytest.param(lambda shard, _: shard.create(at(2, 7), 1), Refusal.EPOCH, id="next life"),
        pytest.param(
            lambda shard, _: shard.create(at(1, 7), 1, generation="aaaaaaaa"), Refusal.GENERATION, id="written anew"
        ),
        pytest.param(told("FLUSHALL"), Refusal.ABSENT, id="flushed away"),
        pytest.param(lambda shard, _: shard.server.remove(TAG, 3), Refusal.REMOVED, id="unregistered"),
        pytest.param(lambda shard, _: shard.server.sweep(TAG, Leftover(WIDER, 16, 1)), Refusal.LOST, id="swept"),
        pytest.param(told("DEL", BUCKET), Refusal.LOST, id="evicted bucket"),
        pytest.param(told("HDEL", BUCKET, HASHES[3].to_bytes(8, "little")), Refusal.LOST, id="evicted record"),
        pytest.param(told("SET", BUCKET, "mine"), Refusal.LOST, id="another program's key"),
        pytest.param(lambda shard, _: shard.server.hold(TAG), Refusal.HELD, id="reader of everything"),
    ],
)
def test_growth_is_refused_when_the_content_is_not_what_was_decided_on(
    redis_server: Server, between: Callable[[Shard, Server], Awaitable[object]], refusal: Refusal
) -> None:
    """Whatever happens between two pieces, the content stays what it was, and what was copied is left over."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        before = await shard.meta()
        assert await grown(shard, range(2)) == 100
        await between(shard, redis_server)
        found = await shard.found()
        assert await grown(shard, range(2, 4), of=before) is refusal
        assert (await shard.found()).meta == found.meta

    with_shard(redis_server, scenario)


def test_an_unregistered_source_is_refused_until_it_is_registered_again(redis_server: Server) -> None:
    """Late writers of the old registration add nothing; a newer registration starts afresh."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(4, 7))
        assert await shard.server.remove(TAG, 2) is Refusal.NEWER
        assert await shard.server.remove(TAG, 4) is None
        found = await shard.found()
        assert (found.meta, found.removed) == (None, 4)
        assert await shard.flush(7, at(4, 8), {1: b"x"}) is Refusal.REMOVED
        assert await shard.create(at(4, 8), generation="aaaaaaaa") is Refusal.REMOVED
        for leftover in found.leftovers:
            await shard.server.sweep(TAG, leftover)
        assert redis_server.ask("DBSIZE") == 1
        assert 0 < redis_server.ask("TTL", Names("kvindexer").meta(TAG)) <= 86_400
        newer = AUTHOR._replace(registration=5)
        assert await shard.create(at(1, 1), author=newer) == len(HASHES)
        assert (await shard.found()).removed is None
        assert redis_server.ask("TTL", Names("kvindexer").meta(TAG)) == -1

    with_shard(redis_server, scenario)


def test_a_reader_of_everything_can_hold_the_writers(redis_server: Server) -> None:
    """For a few seconds at most: a reader that dies holds nobody for long."""

    async def scenario(shard: Shard) -> None:
        await shard.create(at(1, 7))
        await shard.server.hold(TAG)
        assert await shard.flush(7, at(1, 8), {1: b"x"}) is Refusal.HELD
        assert await shard.create(at(2, 1), 1) is Refusal.HELD
        assert 0 < redis_server.ask("PTTL", Names("kvindexer").hold(TAG)) <= 5_000
        await shard.server.release(TAG)
        assert await shard.flush(7, at(1, 8), {1: b"x"}) == len(HASHES) + 1

    with_shard(redis_server, scenario)


def test_another_layout_is_left_alone(redis_server: Server) -> None:
    """Whatever it is: a newer program's shard is not ours to write."""

    async def scenario(shard: Shard) -> None:
        key = Names("kvindexer").meta(TAG)
        redis_server.ask("HSET", key, "layout", "2", "generation", "g")
        assert await shard.flush(0, at(1, 1), {1: b"x"}) is Refusal.LAYOUT
        assert await shard.create(at(1, 1)) is Refusal.LAYOUT
        assert await shard.server.remove(TAG, 9) is Refusal.LAYOUT
        assert redis_server.ask("HGETALL", key) == {"layout": "2", "generation": "g"}

    with_shard(redis_server, scenario)
