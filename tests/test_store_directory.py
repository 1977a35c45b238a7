"""The directory that replicas share, step by step: two of them and a real Redis, in every order that can happen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvindexer.settings import Settings
from kvindexer.store.connect import open_client
from kvindexer.store.directory import Directory, Kind, Line, read_lines
from kvindexer.store.layout import Names, pack_spec
from kvindexer.store.server import ShardServer
from kvindexer.testing import FakeEngine
from live import spec_of, until
from replicas import contents, eventually, replica
from servers import Server

SOURCE = "tcp://10.0.0.1:5557"
SPEC = b'{"model": "m"}'
OTHER = b'{"model": "n"}'
LIFE = b'{"model": "m", "life": "u/1"}'


class Side:
    """One replica's directory, and what a beat does with it."""

    def __init__(self, server: ShardServer) -> None:
        self._server = server
        self.directory = Directory()

    async def publish(self) -> None:
        """Write what is wanted."""
        for wanted in self.directory.wanted():
            known = self.directory.generation(wanted.source)
            answer = await self._server.register(wanted.source, wanted.kind, wanted.spec, wanted.generation, known)
            self.directory.written(wanted, answer)

    async def news(self) -> list[tuple[str, Kind]]:
        """Read all lines; what this replica did not know."""
        found = {source: line for source, line in read_lines(await self._server.lines()) if isinstance(line, Line)}
        return [(source, line.kind) for source, line in self.directory.merge(found)]


def with_two_sides(redis_server: Server, scenario: Callable[[Side, Side], Awaitable[None]]) -> None:
    """Run a scenario of two replicas."""

    async def run() -> None:
        values: dict[str, Any] = {"store": redis_server.url}
        server = ShardServer(open_client(Settings(**values)), Names("kvindexer"), 5)
        try:
            await scenario(Side(server), Side(server))
        finally:
            await server.close()

    asyncio.run(run())


@pytest.mark.parametrize("seen", [True, False])
def test_an_unregistration_is_heard_though_a_local_line_took_its_place(redis_server: Server, *, seen: bool) -> None:
    """What was found is followed again at once where it was unregistered: between two looks of the other replica."""

    async def scenario(a: Side, b: Side) -> None:
        a.directory.want(SOURCE, Kind.REGISTERED, SPEC)
        await a.publish()
        assert await a.news() == []
        assert await b.news() == [(SOURCE, Kind.REGISTERED)]
        a.directory.want(SOURCE, Kind.REMOVED, SPEC)
        a.directory.note_found(SOURCE, LIFE)
        await a.publish()
        if seen:
            assert await b.news() == [(SOURCE, Kind.REMOVED)]
        await a.publish()
        assert await b.news() == [(SOURCE, Kind.LOCAL if seen else Kind.REMOVED)]
        for side in (a, b):
            assert await side.news() == []
            assert side.directory.wanted() == []
            assert side.directory.generation(SOURCE) == 3

    with_two_sides(redis_server, scenario)


def test_the_shard_that_ends_then_is_not_that_of_the_local_line(redis_server: Server) -> None:
    """Somebody has the same source in its settings and writes where the registration's writers are refused."""

    async def scenario(engine: FakeEngine) -> None:
        spec = spec_of(engine)
        async with replica(redis_server.url) as one:
            assert one.fleet.register(spec)
            engine.run_request([1] * 30)

            async def stored() -> bool:
                found, records = await contents(redis_server.url, spec)
                return found.meta is not None and found.meta.registration == 1 and bool(records)

            await eventually("stored", stored)
            line = f"3:local:{pack_spec(spec).decode()}"
            redis_server.ask(
                "HSET", Names("kvindexer").sources, spec.endpoint, line, "#generation", "3", "#version", "3"
            )
            await until("unregistered", lambda: not one.fleet.sources())

            async def ended() -> bool:
                found, _ = await contents(redis_server.url, spec)
                return found.meta is None and found.removed == 2

            await eventually("what was written for the registration is gone, and no later writer refused", ended)

    with FakeEngine() as engine:
        asyncio.run(scenario(engine))


def test_settings_never_take_the_line_of_a_registration(redis_server: Server) -> None:
    """Whoever registered would read it as an unregistration."""

    async def scenario(a: Side, b: Side) -> None:
        a.directory.want(SOURCE, Kind.REGISTERED, SPEC)
        await a.publish()
        b.directory.note_local(SOURCE, OTHER)
        assert b.directory.wanted() == []  # it has not read the directory yet
        assert await b.news() == []  # it has its own idea of the source
        await b.publish()
        assert await a.news() == []
        assert b.directory.wanted() == []
        assert b.directory.generation(SOURCE) == 1

    with_two_sides(redis_server, scenario)


@pytest.mark.parametrize("first", ["a", "b"])
def test_an_unregistration_is_heard_though_the_older_line_was_to_be_published_again(
    redis_server: Server, first: str
) -> None:
    """Redis is emptied after one replica has unregistered and before the other has heard: whoever writes first."""

    async def scenario(a: Side, b: Side) -> None:
        a.directory.want(SOURCE, Kind.REGISTERED, SPEC)
        await a.publish()
        assert await b.news() == [(SOURCE, Kind.REGISTERED)]
        a.directory.want(SOURCE, Kind.REMOVED, SPEC)
        await a.publish()
        redis_server.ask("FLUSHALL")
        assert await a.news() == await b.news() == []  # both want to publish what they know
        for side in (a, b) if first == "a" else (b, a):
            await side.publish()
        assert await b.news() == [(SOURCE, Kind.REMOVED)]
        assert await a.news() == []
        for side in (a, b):
            assert side.directory.wanted() == []
            assert side.directory.generation(SOURCE) == 2

    with_two_sides(redis_server, scenario)
