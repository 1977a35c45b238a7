"""The router of this directory beside others: how many prompt tokens engines found in their caches.

    kvindexer serve &
    python examples/compare.py --index http://localhost:8090

All get the same seeded chats and engines of the same size (`kvindexer.testing`).  No clock decides anything: a number
of requests is always in flight, and the next one comes when the index has heard of the one before.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from typing import NamedTuple

from kvindexer.client import AsyncClient, ClientError, SourceSpec, Tokens
from kvindexer.testing import (
    ChatShape,
    ChatTraffic,
    FakeEngine,
    PoolShape,
    SimulatedFleet,
    StickyRouter,
    TrafficRequest,
)
from router import Router, Sent

MODEL = "compared"
POLL_S = 0.001
PATIENCE_S = 60


class Shape(NamedTuple):
    """How much there is of everything."""

    requests: int = 1000
    engines: int = 4
    blocks: int = 512
    chats: int = 16
    in_flight: int = 8
    seed: int = 0


class Share(NamedTuple):
    """What became of the prompts."""

    prompt_tokens: int
    cached_tokens: int
    busiest: float
    """What the busiest engine had to compute, as a multiple of the mean."""


class Tally:
    """Counts what becomes of the prompts."""

    def __init__(self, engines: Iterable[FakeEngine]) -> None:
        self._computed = dict.fromkeys(engines, 0)
        self._prompt_tokens = 0

    def run(self, fleet: SimulatedFleet, request: TrafficRequest, engine: FakeEngine) -> int:
        """Run a request on an engine; returns what was cached."""
        result = engine.run_request(request.tokens, max_tokens=request.max_tokens)
        fleet.traffic.answered(request, result.output_tokens)
        self._prompt_tokens += len(request.tokens)
        self._computed[engine] += len(request.tokens) - result.cached_tokens
        return result.cached_tokens

    @property
    def share(self) -> Share:
        """What has become of them so far."""
        computed = sum(self._computed.values())
        busiest = max(self._computed.values()) * len(self._computed) / computed
        return Share(self._prompt_tokens, self._prompt_tokens - computed, busiest)


def fleet_of(shape: Shape) -> SimulatedFleet:
    """Engines with empty caches, and chats that begin."""
    chats = ChatTraffic(shape.seed, ChatShape(concurrent_chats=shape.chats))
    return SimulatedFleet(
        shape.engines, model=MODEL, pool=PoolShape(num_blocks=shape.blocks), traffic=chats, seed=shape.seed
    )


def unasked(shape: Shape, choose: Callable[[TrafficRequest, int], int]) -> Share:
    """Each request where a rule sends it that knows nothing of caches."""
    fleet = fleet_of(shape)
    try:
        tally = Tally(fleet.engines)
        for _ in range(shape.requests):
            request = fleet.traffic.next_request()
            tally.run(fleet, request, fleet.engines[choose(request, shape.engines)])
        return tally.share
    finally:
        fleet.stop()


def round_robin(shape: Shape) -> Share:
    """Each engine in its turn."""
    turn = count()
    return unasked(shape, lambda _, engines: next(turn) % engines)


def by_session(shape: Shape) -> Share:
    """A chat always to the same engine."""
    return unasked(shape, StickyRouter(shape.seed, random_share=0))


async def routed(shape: Shape, index_url: str) -> Share:
    """Each request where the router sends it."""
    fleet = fleet_of(shape)
    engines = dict(zip(map(fleet.instance, range(shape.engines)), fleet.engines, strict=True))
    async with AsyncClient(index_url) as index:
        try:
            for name, engine in engines.items():
                await index.register(source_of(name, engine))
                await asyncio.to_thread(engine.wait_for_subscribers)
            router = Router(index, list(engines))
            flying: deque[tuple[Sent, int]] = deque()
            tally = Tally(fleet.engines)
            for _ in range(shape.requests):
                request = fleet.traffic.next_request()
                sent = await router.send(MODEL, Tokens(request.tokens))
                flying.append((sent, tally.run(fleet, request, engines[sent.engine])))
                await heard(index, sent.engine, engines[sent.engine])
                if len(flying) > shape.in_flight:
                    await router.done(*flying.popleft())
            return tally.share
        finally:
            for name in engines:
                with suppress(ClientError):
                    await index.unregister(name, model=MODEL)
            fleet.stop()


def source_of(name: str, engine: FakeEngine) -> SourceSpec:
    """What the index has to be told of an engine."""
    return SourceSpec(
        instance=name,
        model=MODEL,
        block_size=engine.shape.block_size,
        endpoint=engine.endpoint,
        replay=engine.replay_endpoint,
    )


async def heard(index: AsyncClient, name: str, engine: FakeEngine) -> None:
    """Wait until the index has the engine's last message."""
    async with asyncio.timeout(PATIENCE_S):
        while (await index.sources(model=MODEL, instance=name)).sources[0].seq != engine.last_seq:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--index", default="http://localhost:8090", help="kvindexer's address")
    for name, default in Shape()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args())
    index_url = options.pop("index")
    shape = Shape(**options)
    shares = {
        "round-robin": round_robin(shape),
        "by session": by_session(shape),
        "router": asyncio.run(routed(shape, index_url)),
    }
    for name, (prompt_tokens, cached_tokens, busiest) in shares.items():
        percent = 100 * cached_tokens / prompt_tokens
        print(
            f"{name:12} {cached_tokens:10,} of {prompt_tokens:10,} prompt tokens cached: {percent:.1f} %, "
            f"the busiest engine computes {busiest:.2f} times the mean"
        )


if __name__ == "__main__":
    main()
