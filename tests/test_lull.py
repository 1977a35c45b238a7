"""Work that can wait gives way to requests, and is done all the same."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Collection, Coroutine
from functools import wraps
from typing import Any

import httpx
import pytest
import uvloop

from kvindexer.api.errors import send_json
from kvindexer.api.listeners import Unsignalled, configured
from kvindexer.lull import Lull
from kvindexer.settings import Settings
from kvindexer.store.writing import PIECE_RECORDS
from kvindexer.testing import FakeEngine
from live import spec_of, until
from replicas import contents, eventually, replica, stored
from servers import Server

PIECE_S = 0.002
LONG_S = 60.0


def on_a_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """Run a test as a coroutine, on the loop that the service has."""

    def run() -> None:
        uvloop.run(test())

    return wraps(test)(run)


@on_a_loop
async def test_nobody_waits_where_nobody_asks() -> None:
    lull = Lull()
    await asyncio.gather(*(lull.wait() for _ in range(10)))


@on_a_loop
async def test_each_of_several_gets_a_turn_of_its_own() -> None:
    lull, turn, seen = Lull(), 0, []
    loop = asyncio.get_running_loop()

    def count() -> None:
        nonlocal turn
        turn += 1
        loop.call_soon(count)

    async def work() -> None:
        for _ in range(3):
            await lull.wait()
            seen.append(turn)

    loop.call_soon(count)
    await asyncio.gather(*(work() for _ in range(4)))
    assert len(seen) == len(set(seen)) == 12


@on_a_loop
async def test_work_goes_on_a_whole_turn_after_the_last_arrival() -> None:
    lull, turns = Lull(patience_s=LONG_S), 0
    work = asyncio.ensure_future(lull.wait())
    for _ in range(5):
        await asyncio.sleep(0)
        assert not work.done()
        lull.disturb()
    while not work.done():
        await asyncio.sleep(0)
        turns += 1
    assert 2 <= turns <= 4


@on_a_loop
async def test_whoever_never_stops_asking_stops_no_work() -> None:
    now = 0.0
    lull = Lull(patience_s=1.0, clock=lambda: now)
    for _ in range(3):
        work = asyncio.ensure_future(lull.wait())
        begun = now
        while not work.done():
            lull.disturb()
            await asyncio.sleep(0)
            now += 0.1
        assert now - begun == pytest.approx(1.0, abs=0.35)


def served(app: Callable[..., Any], lull: Lull, beside: Callable[[], Any], asking: Callable[[str], None]) -> None:
    """Serve an application by uvloop, with something beside it, while somebody asks."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Unsignalled(configured(app, Settings(), lull=lull))

    async def run() -> None:
        task = asyncio.create_task(beside())
        await server.serve(sockets=[listener])
        task.cancel()

    thread = threading.Thread(target=uvloop.run, args=(run(),))
    thread.start()
    try:
        asking(f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()


def test_no_work_is_done_between_a_request_and_its_answer() -> None:
    """What went wrong: a piece of a write in each turn, and so three in the course of one query."""
    told: list[str] = []

    class Told(Lull):
        def disturb(self) -> None:
            told.append("arrived")
            super().disturb()

    lull = Told(patience_s=LONG_S)

    async def app(_: Any, receive: Any, send: Any) -> None:
        await receive()
        told.append("answered")
        await send_json(send, 200, b"{}")

    async def work() -> None:
        while True:
            await lull.wait()
            told.append("piece")
            time.sleep(PIECE_S)  # noqa: ASYNC251 - that it holds up the loop is the point

    def ask(url: str) -> None:
        with httpx.Client(trust_env=False, timeout=LONG_S) as client:
            for _ in range(50):
                assert client.post(url, content=b"x" * 20_000).status_code == 200

    served(app, lull, work, ask)
    assert told.count("answered") == 50
    assert told.count("piece") > 50, "work is done as well, while whoever asks thinks"
    since_arrival = 0
    for what in told:
        since_arrival = 0 if what == "arrived" else since_arrival + (what == "piece")
        # a request may arrive in parts: a piece may come between them, but not behind the last one
        assert what != "answered" or since_arrival == 0, told


@pytest.mark.parametrize("waits_s", [0.0, 0.005])
def test_a_write_keeps_up_where_requests_leave_it_little(redis_server: Server, waits_s: float) -> None:
    """In small pieces while nobody is in the way, in larger ones where each has to wait for long."""
    blocks, pieces = 3_000, list[int]()

    class Busy(Lull):
        async def wait(self) -> float:
            await super().wait()
            return waits_s

    async def scenario(engine: FakeEngine) -> None:
        spec = spec_of(engine)
        async with replica(redis_server.url, lull=Busy(), sources=(spec,)) as one:
            records = one.fleet.index.records

            def noted(source: str, hashes: Collection[int]) -> list[bytes]:
                pieces.append(len(hashes))
                return records(source, hashes)

            one.fleet.index.records = noted  # type: ignore[method-assign]
            await until("live", lambda: one.flags(spec.endpoint) == ("live", True, True))
            engine.publish_events([stored(0, blocks)])

            async def all_there() -> bool:
                found, there = await contents(redis_server.url, spec)
                return found.meta is not None and len(there) == blocks

            await eventually("Redis has all of it", all_there)

    with FakeEngine() as engine:
        uvloop.run(scenario(engine))
    assert sum(pieces) >= blocks
    assert max(pieces) == (PIECE_RECORDS if not waits_s else 500), pieces
