"""The check of memory against Redis while everything moves: it finds what differs, and nothing else."""

from __future__ import annotations

import asyncio

from kvindexer.testing import FakeEngine
from live import spec_of, until
from proxied import SMALL, traffic
from replicas import eventually, kept, replica, stored
from servers import Server

CHECKS = 6
"""Comparisons that must come to an end, and find nothing."""
MOST_STEPS = 1_000


def test_what_changes_while_it_is_compared_is_no_divergence(redis_server: Server) -> None:
    """Blocks come and go, are flushed, and the shard gets more buckets, all in the midst of comparisons."""

    async def run() -> None:
        with FakeEngine(pool=SMALL) as busy, FakeEngine() as growing:
            specs = spec_of(busy, "busy"), spec_of(growing, "growing")
            async with replica(redis_server.url, sources=specs, store_check_interval_s=0.01) as one:
                await until("live", lambda: all(one.flags(spec.endpoint) == ("live", True, True) for spec in specs))
                steps = 0
                while one.keeper.checks.done < CHECKS and steps < MOST_STEPS:
                    traffic(busy, 3, steps)
                    growing.publish_events([stored(200 * steps, 200)])
                    steps += 1
                    await asyncio.sleep(0.02)
                assert one.keeper.checks.done >= CHECKS
                await kept(redis_server.url, one, specs[0], busy)
                assert one.keeper.checks.divergences == 0
                assert one.keeper.figures().records_written >= 200 * steps

    asyncio.run(run())


def test_a_divergence_is_found_while_everything_moves(redis_server: Server) -> None:
    """A flush that is carried out meanwhile does not hide it."""

    async def run() -> None:
        with FakeEngine() as engine:
            spec = spec_of(engine)
            async with replica(redis_server.url, sources=(spec,), store_check_interval_s=0.01) as one:
                await until("live", lambda: one.flags(spec.endpoint) == ("live", True, True))
                engine.publish_events([stored(0, 2_000)])
                await until("it is compared", lambda: one.keeper.checks.done > 1)
                key = next(key for key in redis_server.ask("KEYS", "*") if key.endswith(":1"))
                redis_server.ask("DEL", key)
                first = 2_000
                while not one.keeper.checks.divergences:
                    engine.publish_events([stored(first, 10)])
                    first += 10
                    await asyncio.sleep(0.02)
                    assert first < 50_000

                async def healed() -> bool:
                    written = one.keeper.stored(spec.endpoint)
                    return written is not None and written.entries == first and one.keeper.checks.divergences == 1

                await eventually("all records are there again", healed)

    asyncio.run(run())
