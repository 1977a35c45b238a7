"""Replicas that share a real Redis: fleets with keepers in the test's process, and what is in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from kvindexer.events.fleet import LiveFleet
from kvindexer.index.engine import PyIndex
from kvindexer.lull import Lull
from kvindexer.service import open_finder
from kvindexer.settings import Settings
from kvindexer.store.connect import open_client
from kvindexer.store.keeper import RedisKeeper
from kvindexer.store.layout import Found, Meta, Names, shard_tag
from kvindexer.store.server import ShardServer
from kvindexer.testing import BlockStored, FakeEngine
from kvindexer.types import SourceSpec
from live import QUICK, Uncounted, held, truth

KEEP_QUICK: dict[str, Any] = {
    "store_flush_interval_s": 0.05,
    "store_poll_interval_s": 0.1,
    "store_takeover_s": 0.3,
    "store_check_interval_s": 0.5,
    "store_timeout_s": 0.5,
}


class Replica:
    """One replica, running."""

    def __init__(self, name: str, fleet: LiveFleet, keeper: RedisKeeper) -> None:
        self.name = name
        self.fleet = fleet
        self.keeper = keeper

    def holds(self, engine: FakeEngine) -> bool:
        """Whether its index equals the engine's cache."""
        return held(self.fleet, engine) == truth(engine)

    def flags(self, source: str) -> tuple[str, bool, bool]:
        """State, sound and complete of a source."""
        report = next(report for report in self.fleet.reports() if report.source == source)
        return report.state, report.sound, report.complete


@asynccontextmanager
async def replica(url: str, name: str = "a", **settings: Any) -> AsyncIterator[Replica]:
    """Run a replica with its own index; `sources` among the settings are followed from the start.

    `lull` says when its store goes on.
    """
    lull: Lull = settings.pop("lull", None) or Lull()
    chosen = Settings(**{**QUICK, **KEEP_QUICK, "store": url, "replica": name, **settings})
    keeper = RedisKeeper(chosen, _server(chosen), name, lull)
    finder = open_finder(chosen)
    fleet = LiveFleet(chosen, lambda least: PyIndex(None, chosen.media, least), Uncounted(), keeper, finder=finder)
    async with fleet.running():
        yield Replica(name, fleet, keeper)


def _server(settings: Settings) -> ShardServer:
    return ShardServer(open_client(settings), Names(settings.store_namespace), settings.store_timeout_s)


async def contents(url: str, spec: SourceSpec, **settings: Any) -> tuple[Found, dict[int, bytes]]:
    """What Redis holds of a source."""
    server = _server(Settings(**{"store": url, **settings}))
    try:
        tag = shard_tag(spec.endpoint, spec)
        (found,) = await server.read([tag])
        assert isinstance(found, Found), found
        records: dict[int, bytes] = {}
        if found.meta is not None:
            async for _, hashes, values in server.buckets(tag, found.meta):
                records.update(zip(hashes, values, strict=True))
        return found, records
    finally:
        await server.close()


def memory(one: Replica, source: str) -> dict[int, bytes]:
    """What the replica would write of a source."""
    hashes = one.fleet.index.hashes(source)
    return dict(zip(hashes, one.fleet.index.records(source, hashes), strict=True))


def stored(first: int, count: int) -> BlockStored:
    """Blocks that the engine's own pool knows nothing of, behind each other from the start of a prompt."""
    return BlockStored(
        block_hashes=tuple(number.to_bytes(8, "big") * 4 for number in range(first, first + count)),
        parent_block_hash=None,
        token_ids=tuple(number % 50_000 for number in range(4 * first, 4 * (first + count))),
        block_size=4,
        base_block_idx=0,
        extra_keys=(None,) * count,
    )


async def eventually(what: str, predicate: Callable[[], Awaitable[bool]], patience_s: float = 30.0) -> None:
    """Wait for something that must come and can only be found out by asking."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if await predicate():
            return
        await asyncio.sleep(0.03)
    raise AssertionError(f"did not happen in {patience_s:g} s: {what}")


async def kept(url: str, one: Replica, spec: SourceSpec, engine: FakeEngine) -> Meta:
    """Wait until replica, Redis and engine agree exactly; returns what Redis says of the shard."""
    last: list[Meta] = []

    async def agree() -> bool:
        found, records = await contents(url, spec)
        if found.meta is None or found.meta.entries != len(records):
            return False
        last[:] = [found.meta]
        return one.holds(engine) and records == memory(one, spec.endpoint) and (
            found.meta.checkpoint.next == (-1 if engine.last_seq is None else engine.last_seq) + 1
        )  # fmt: skip

    await eventually(f"replica {one.name}, Redis and engine agree on {spec.endpoint}", agree)
    return last[0]
