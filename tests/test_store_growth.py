"""A shard that outgrows its buckets: Redis copies it by itself, while its source goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from kvindexer.lull import Lull
from kvindexer.store.layout import BUCKET_ENTRIES, Meta, Names, overfull, shard_tag
from kvindexer.testing import FakeEngine
from kvindexer.types import SourceSpec
from live import held, spec_of, until
from replicas import Replica, contents, eventually, memory, replica, stored
from servers import Server

FIRST = 1_000
"""Blocks with which a shard begins: enough for a few dozens of buckets."""


@asynccontextmanager
async def one_following(url: str, engine: FakeEngine, **settings: Any) -> AsyncIterator[tuple[Replica, SourceSpec]]:
    """A replica whose shard holds the first blocks."""
    spec = spec_of(engine)
    async with replica(url, sources=(spec,), **settings) as one:
        await until("live", lambda: one.flags(spec.endpoint) == ("live", True, True))
        engine.publish_events([stored(0, FIRST)])
        await same(url, one, spec, FIRST)
        yield one, spec


async def same(url: str, one: Replica, spec: SourceSpec, entries: int) -> Meta:
    """Wait until memory and Redis hold the same, so many records."""
    last: list[Meta] = []

    async def equal() -> bool:
        found, records = await contents(url, spec)
        if found.meta is None or not entries == found.meta.entries == len(records):
            return False
        last[:] = [found.meta]
        return records == memory(one, spec.endpoint)

    await eventually("memory and Redis hold the same", equal)
    return last[0]


def test_a_shard_grows_while_its_source_goes_on(redis_server: Server) -> None:
    """It ends exact, and no record was sent twice for it; what is replaced is given back."""

    async def run() -> None:
        with FakeEngine() as engine:
            async with one_following(redis_server.url, engine) as (one, spec):
                small = (await same(redis_server.url, one, spec, FIRST)).buckets
                total = 40 * small * BUCKET_ENTRIES // 10
                step = total // 40
                for first in range(FIRST, total, step):
                    engine.publish_events([stored(first, min(step, total - first))])
                    await asyncio.sleep(0.01)

                async def roomy() -> bool:
                    found, _ = await contents(redis_server.url, spec)
                    return found.meta is not None and not overfull(total, found.meta.buckets)

                await eventually("it has enough buckets", roomy)
                meta = await same(redis_server.url, one, spec, total)
                assert meta.buckets > small
                assert one.keeper.figures().records_written == total
                assert one.keeper.checks.divergences == 0
                await until("given back", lambda: redis_server.ask("DBSIZE") <= meta.buckets + 3)

    asyncio.run(run())


def test_a_shard_that_has_lost_records_is_written_anew_instead(redis_server: Server) -> None:
    """Copied, the loss would look like the truth to whoever starts warm next."""

    async def run() -> None:
        with FakeEngine() as engine:
            quiet = {"store_check_interval_s": 3600.0}
            async with one_following(redis_server.url, engine, **quiet) as (one, spec):
                meta = await same(redis_server.url, one, spec, FIRST)
                tag = shard_tag(spec.endpoint, spec)
                assert redis_server.ask("DEL", Names("kvindexer").bucket(tag, meta.generation, 3)) == 1
                total = 2 * meta.buckets * BUCKET_ENTRIES
                engine.publish_events([stored(FIRST, total - FIRST)])
                grown = await same(redis_server.url, one, spec, total)
                assert grown.buckets > meta.buckets
                assert one.keeper.figures().records_written > total

    asyncio.run(run())


def test_what_arrives_whenever_a_write_gives_way_is_written_too(redis_server: Server) -> None:
    """Also while it is still being told what has changed: the checkpoint says that all of it is there."""
    total, few = 3 * FIRST, 10

    class Interrupted(Lull):
        armed = False

        async def wait(self) -> float:
            nonlocal total
            if self.armed and total < 4 * FIRST:
                first, total = total, total + few
                engine.publish_events([stored(first, few)])
                await until("applied", lambda: len(held(followers[0].fleet, engine)) == total)
            return await super().wait()

    async def run() -> None:
        async with one_following(redis_server.url, engine, lull=lull) as (one, spec):
            followers.append(one)
            lull.armed = True
            for first in range(FIRST, 3 * FIRST, 500):
                engine.publish_events([stored(first, 500)])
            await until("all has come", lambda: total == 4 * FIRST)
            await same(redis_server.url, one, spec, total)
            assert one.keeper.checks.divergences == 0

    lull, followers = Interrupted(), list[Replica]()
    with FakeEngine() as engine:
        asyncio.run(run())
