"""Ingest in slices: how long they are, and who comes between them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from kvindexer.events.fleet import LiveFleet
from kvindexer.events.pump import Pumps
from kvindexer.index.engine import PyIndex
from kvindexer.index.seam import Change
from kvindexer.settings import Settings
from kvindexer.testing import FakeEngine, PoolShape
from live import QUICK, Uncounted, connected, free_endpoint, spec_of, until

SLICE_S = 0.002
MESSAGE_S = 0.003


class Backlog:
    """A pump with so many messages, each of which takes its time."""

    def __init__(self, messages: int, told: list[str], name: str = "message") -> None:
        self.messages = messages
        self.told = told
        self.name = name
        self.empty = asyncio.Event()
        self.during: dict[int, Callable[[], None]] = {}
        """What happens while so many messages are left."""

    def pump(self, limit: int, until: float) -> bool:
        """See `Pump.pump`."""
        for _ in range(limit):
            if not self.messages:
                self.empty.set()
                return False
            self.messages -= 1
            self.told.append(self.name)
            self.during.get(self.messages, lambda: None)()
            time.sleep(MESSAGE_S)
            if time.monotonic() >= until:
                break
        return True


def test_slow_messages_of_several_sources_take_turns() -> None:
    told: list[str] = []

    async def scenario() -> None:
        pumps = Pumps(asyncio.get_running_loop(), SLICE_S)
        backlogs = [Backlog(4, told, name) for name in "ab"]
        for backlog in backlogs:
            pumps.wake(backlog)
        await asyncio.gather(*(backlog.empty.wait() for backlog in backlogs))

    uvloop.run(scenario())
    assert told == ["a", "b"] * 4


def test_a_query_that_comes_during_a_slice_is_answered_before_the_next_one() -> None:
    """It is read behind the slice and answered a turn of the loop later: once the next slice came before that."""
    told: list[str] = []

    class Service(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            told.append(data.decode())
            asyncio.get_running_loop().call_soon(told.append, "answered")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        pumps, backlog = Pumps(loop, SLICE_S), Backlog(10, told)
        transport, _ = await loop.create_connection(Service, sock=to_service)
        backlog.during[7] = lambda: from_client.sendall(b"read")
        pumps.wake(backlog)
        await backlog.empty.wait()
        transport.close()

    from_client, to_service = socket.socketpair()
    with from_client:
        uvloop.run(scenario())
    read = told.index("read")
    assert 0 < read < len(told) - 2
    assert told[read + 1] == "answered", told


@pytest.mark.parametrize("dialled", ["by us", "by the engine"])
def test_a_slice_ends_with_the_message_under_way(dialled: str) -> None:
    """What went wrong: 16 messages of thousands of blocks each were one slice, if they came from one engine.

    Some of them are replayed, the others wait in the socket.
    """
    endpoint, bound = free_endpoint(), dialled == "by the engine"
    dials: dict[str, Any] = {"endpoint": endpoint, "connect": True, "topic": "kv"} if bound else {}
    turn = 0
    turns: list[int] = []

    class Noted(Uncounted):
        def applied(self, change: Change) -> None:  # noqa: ARG002 - as `Counters` has it
            turns.append(turn)

    async def scenario() -> None:
        nonlocal turn
        settings = Settings(**{**QUICK, "slice_ms": 0.001, "bind_endpoints": (endpoint,) if bound else ()})
        fleet = LiveFleet(settings, lambda _: PyIndex(), Noted())
        loop = asyncio.get_running_loop()

        def count() -> None:
            nonlocal turn
            turn += 1
            loop.call_soon(count)

        async with fleet.running():
            if not bound:
                publish(20)  # nobody listens: to be replayed
            fleet.register(spec_of(engine, topic="kv" if bound else ""))
            await connected(engine)
            publish(20)
            loop.call_soon(count)
            await until("all is applied", lambda: len(turns) >= (20 if bound else 40))

    def publish(requests: int) -> None:
        for request in range(requests):
            engine.run_request([request] * 8, max_tokens=1)

    with FakeEngine(pool=PoolShape(num_blocks=400, block_size=4), **dials) as engine:
        asyncio.run(scenario())
    # but for what was held until a replay had caught up
    assert len(set(turns)) > 0.8 * len(turns), turns
