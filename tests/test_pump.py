"""Ingest in slices: how long they are, and who comes between them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
import zmq

from kvindexer.events.fleet import LiveFleet
from kvindexer.events.follower import Follower
from kvindexer.events.pump import Pumps
from kvindexer.events.replay import Replays
from kvindexer.events.stream import Stream, StreamSettings
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


class Turns:
    """Counts the turns of a loop, and notes in which of them something is applied."""

    def __init__(self) -> None:
        self.turn = 0
        self.noted: list[int] = []

    def count(self) -> None:
        """From now on."""
        self.turn += 1
        asyncio.get_running_loop().call_soon(self.count)

    def note(self) -> None:
        """Something is applied."""
        self.noted.append(self.turn)


@pytest.mark.parametrize("dialled", ["by us", "by the engine"])
def test_a_slice_ends_with_the_message_under_way(dialled: str) -> None:
    """What went wrong: 16 messages of thousands of blocks each were one slice, if they came from one engine.

    Some of them are replayed, the others wait in the socket.
    """
    endpoint, bound = free_endpoint(), dialled == "by the engine"
    dials: dict[str, Any] = {"endpoint": endpoint, "connect": True, "topic": "kv"} if bound else {}
    turns = Turns()

    class Noted(Uncounted):
        def applied(self, change: Change) -> None:  # noqa: ARG002 - as `Counters` has it
            turns.note()

    async def scenario() -> None:
        chosen = {"slice_ms": 0.001, "replay_timeout_s": 60.0, "bind_endpoints": (endpoint,) if bound else ()}
        settings = Settings(**{**QUICK, **chosen})
        fleet = LiveFleet(settings, lambda _: PyIndex(), Noted())
        async with fleet.running():
            turns.count()
            if not bound:
                publish(20)  # nobody listens: to be replayed
            fleet.register(spec_of(engine, topic="kv" if bound else ""))
            await connected(engine)
            await until("all that is to be replayed is applied", lambda: bound or len(turns.noted) == 20)
            publish(20)
            await until("all is applied", lambda: len(turns.noted) >= (20 if bound else 40))

    def publish(requests: int) -> None:
        for request in range(requests):
            engine.run_request([request] * 8, max_tokens=1)

    with FakeEngine(pool=PoolShape(num_blocks=400, block_size=4), **dials) as engine:
        asyncio.run(scenario())
    assert len(set(turns.noted)) == len(turns.noted), turns.noted


def test_what_was_held_during_a_replay_is_carried_out_in_slices_too() -> None:
    """It was one slice, up to ten thousand messages long."""
    turns = Turns()

    class Sink:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def apply(self, source: str, seq: int, payload: bytes) -> None:  # noqa: ARG002 - as `Sink` has it
            self.seen.append(seq)
            turns.note()

        def withdraw(self, source: str, reason: str, *, everything: bool) -> None: ...

        def dropped(self, source: str, reason: str) -> None: ...

        def changed(self, source: str) -> None: ...

    async def scenario() -> None:
        pumps = Pumps(asyncio.get_running_loop(), 0.000_001)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        replays = Replays(
            context, pumps, max_concurrent=1, max_bytes=1, max_message_bytes=1, max_kept=1, timeout_s=1.0
        )
        follower = Follower("a", None, Stream(StreamSettings()), sink, replays)
        follower.act(follower.stream.connected(0.0))
        for seq in range(20):
            follower.frame(seq, b"%d" % seq)
        assert sink.seen == []
        turns.count()
        follower.replay_over(None)
        await until("all is applied", lambda: len(sink.seen) == 20)
        replays.close()
        context.term()

    sink = Sink()
    asyncio.run(scenario())
    assert sink.seen == list(range(20))
    assert len(set(turns.noted)) == 20, turns.noted
