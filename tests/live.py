"""A real fleet (without HTTP) and real sockets, for tests of streams."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from kvindexer.events.fleet import LiveFleet
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Change
from kvindexer.settings import Settings
from kvindexer.testing import FakeEngine
from kvindexer.types import SourceSpec, Tier

PATIENCE_S = 30.0
QUICK: dict[str, Any] = {
    "probe_interval_s": 0.3,
    "replay_timeout_s": 0.5,
    "replay_retry_min_s": 0.05,
    "replay_retry_max_s": 0.5,
}


class Uncounted:
    """Counters that nobody reads."""

    def applied(self, change: Change) -> None: ...

    def skipped(self, reasons: Mapping[str, int]) -> None: ...

    def withdrawn(self, reason: str, entries: int) -> None: ...


def spec_of(engine: FakeEngine, instance: str = "pod-a", *, replay: bool = True, **changes: Any) -> SourceSpec:
    """The registration of a fake engine."""
    values: dict[str, Any] = {
        "instance": instance,
        "model": "m",
        "block_size": engine.shape.block_size,
        "endpoint": engine.endpoint,
        "replay": engine.replay_endpoint if replay else None,
        "type": engine.dialect.traits.type,
    }
    return SourceSpec(**{**values, **changes})


def free_endpoint() -> str:
    """Where somebody may listen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def with_fleet(scenario: Callable[[LiveFleet], Awaitable[None]], **settings: Any) -> None:
    """Run a scenario against a fleet of its own."""

    async def run() -> None:
        chosen = Settings(**{**QUICK, **settings})
        fleet = LiveFleet(chosen, lambda least_trusted: PyIndex(None, chosen.media, least_trusted), Uncounted())
        async with fleet.running():
            await scenario(fleet)

    asyncio.run(run())


async def until(what: str, predicate: Callable[[], bool]) -> None:
    """Wait for something that must come; no test fails for being slow."""
    for _ in range(round(PATIENCE_S / 0.01)):
        if predicate():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"did not happen in {PATIENCE_S:g} s: {what}")


async def connected(engine: FakeEngine) -> None:
    """Wait until the fleet has subscribed."""
    await asyncio.to_thread(engine.wait_for_subscribers)


def held(fleet: LiveFleet, engine: FakeEngine) -> dict[tuple[int, Any], int]:
    """What the index says the engine's GPU holds, in the shape of `FakeEngine.held`."""
    copies = fleet.index.copies(engine.endpoint)
    return {(group, value): n for (_, group, tier, _, value), n in copies.items() if tier is Tier.GPU}


def truth(engine: FakeEngine) -> dict[tuple[int, Any], int]:
    """What the engine's GPU holds; hashes as the index spells them, unsigned."""
    return {(group, int(value) & (2**64 - 1)): n for (group, value), n in engine.held().items()}


async def agrees(fleet: LiveFleet, engine: FakeEngine) -> None:
    """Wait until the index equals the engine's cache."""
    await until("index equals the engine's cache", lambda: held(fleet, engine) == truth(engine))
