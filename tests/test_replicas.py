"""Trap 23: histories of replicas that share a Redis and follow the same engines.

Each ends the same way: every replica's index, the shard in Redis and the engine's cache are equal, and nobody writes
any more.  Links break in fault proxies: a replica's to Redis, or its own to the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Self

import pytest

from kvindexer.store import shard
from kvindexer.store.layout import Meta, shard_tag
from kvindexer.store.server import Refusal
from kvindexer.store.shard import Flush
from kvindexer.store.turns import turn
from kvindexer.testing import FakeEngine, FaultProxy, Faults, LinkFaults
from kvindexer.types import SourceSpec
from live import spec_of, until
from proxied import SMALL, traffic
from replicas import Replica, contents, eventually, kept, memory, replica
from servers import HOST, Server

WHOLE = LinkFaults()
DOWN = LinkFaults(down=True)
STALLED = LinkFaults(stall=True)
QUIET_S = 1.2
"""Several times everything that would make a replica write: flush, take-over, check."""


@contextmanager
def small_engine(**options: Any) -> Iterator[FakeEngine]:
    """An engine whose cache is too small for its traffic."""
    with FakeEngine(**{"pool": SMALL, **options}) as engine:
        yield engine


def in_turn(engine: FakeEngine, *names: str) -> list[str]:
    """The replicas' names in the order of their turns for this engine's shard."""
    tag = shard_tag(engine.endpoint, spec_of(engine))
    return sorted(names, key=lambda name: turn(name, names, tag))


class Detour:
    """A network of its own between one replica and an engine that it will follow: cut it, and it alone is cut off."""

    def __init__(self, one: Replica, engine: FakeEngine) -> None:
        self._proxies = [
            FaultProxy(HOST, int(endpoint.rpartition(":")[2]))
            for endpoint in (engine.endpoint, engine.replay_endpoint)
            if endpoint is not None
        ]
        subscriber: Any = one.fleet._subscriber
        add = subscriber.add

        def detoured(source: str, spec: SourceSpec, stream: Any) -> None:
            if source == engine.endpoint:
                events, replays = self._proxies
                values = {name: getattr(spec, name) for name in SourceSpec.__slots__}
                spec = SourceSpec(**{**values, "endpoint": events.endpoint, "replay": replays.endpoint})
            add(source, spec, stream)

        subscriber.add = detoured

    @property
    def faults(self) -> LinkFaults:
        """What the network does; assign to change it."""
        return self._proxies[0].faults

    @faults.setter
    def faults(self, faults: LinkFaults) -> None:
        for proxy in self._proxies:
            proxy.faults = faults

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in self._proxies:
            proxy.close()


@asynccontextmanager
async def linked(server: Server, name: str, **settings: Any) -> AsyncIterator[tuple[Replica, FaultProxy]]:
    """A replica with a network of its own to Redis."""
    with FaultProxy(HOST, server.port) as link:
        async with replica(f"redis://{HOST}:{link.port}", name, **settings) as one:
            yield one, link


async def followed(engine: FakeEngine, *replicas: Replica, complete: bool = True) -> SourceSpec:
    """Register an engine with the first replica and wait until all have caught up with it."""
    spec = spec_of(engine)
    replicas[0].fleet.register(spec)
    await live(engine, *replicas, complete=complete)
    return spec


async def live(engine: FakeEngine, *replicas: Replica, complete: bool = True) -> None:
    """Wait until the engine is live, sound and, unless told otherwise, complete with all of them."""
    for one in replicas:
        await until(
            f"replica {one.name} follows it",
            lambda one=one: (
                any(r.source == engine.endpoint for r in one.fleet.reports())  # type: ignore[misc]
                and one.flags(engine.endpoint) == ("live", True, complete)
            ),
        )


async def agreed(server: Server, engine: FakeEngine, *replicas: Replica, **settings: Any) -> Meta:
    """Wait until all agree exactly and nobody writes any more; returns what Redis says of the shard."""
    spec = spec_of(engine, **settings)
    for _ in range(5):
        for one in replicas:
            meta = await kept(server.url, one, spec, engine)
        before = [(one.keeper.jobs.writes, one.keeper.jobs.refusals) for one in replicas]
        await asyncio.sleep(QUIET_S)
        if before == [(one.keeper.jobs.writes, one.keeper.jobs.refusals) for one in replicas]:
            break
    else:
        raise AssertionError("the replicas never stop writing")
    for one in replicas:
        meta = await kept(server.url, one, spec, engine)
        assert not one.keeper.problems()
        assert sum(memory(one, spec.endpoint) != memory(other, spec.endpoint) for other in replicas) == 0
    return meta


def epoch(one: Replica, engine: FakeEngine) -> int:
    """The life that a replica says it follows."""
    return next(report.epoch for report in one.fleet.reports() if report.source == engine.endpoint)


def kept_source(one: Replica, engine: FakeEngine) -> Any:
    """What the keeper knows of the engine, looked at from inside."""
    return one.keeper.shelf.sources[engine.endpoint]


def test_two_replicas_share_the_work(redis_server: Server) -> None:
    """One source is written by one replica, and several sources by both."""

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            engines = [stack.enter_context(small_engine()) for _ in range(8)]
            a, b = [await stack.enter_async_context(replica(redis_server.url, name)) for name in "ab"]
            await until("A knows B", lambda: a.keeper.shelf.replicas == ("a", "b"))
            await until("B knows A", lambda: b.keeper.shelf.replicas == ("a", "b"))
            for number, engine in enumerate(engines):
                (a, b)[number % 2].fleet.register(spec_of(engine, f"pod-{number}"))
            for engine in engines:
                await live(engine, a, b)
                traffic(engine, 10)
                await agreed_quickly(redis_server, engine, a, b)
                first, _ = in_turn(engine, "a", "b")

                async def written_by_the_first(engine: FakeEngine = engine, first: str = first) -> bool:
                    traffic(engine, 1)
                    return (await agreed_quickly(redis_server, engine, a, b)).writer == first

                await eventually("whoever is first in turn writes", written_by_the_first)
            await agreed(redis_server, engines[0], a, b)

    asyncio.run(scenario())


async def agreed_quickly(server: Server, engine: FakeEngine, *replicas: Replica) -> Meta:
    """Wait until all agree exactly."""
    for one in replicas:
        meta = await kept(server.url, one, spec_of(engine), engine)
    return meta


def test_trap_23_the_restart_that_b_proves_first(redis_server: Server) -> None:
    """Design section 7: A has the turn and holds back, B mints, A's late flush is refused, A adopts and goes on."""

    async def scenario() -> None:
        with small_engine() as engine:
            first, second = in_turn(engine, "x", "y")
            async with replica(redis_server.url, first) as a, replica(redis_server.url, second) as b:
                await followed(engine, a, b)
                traffic(engine, 10)
                before = await agreed_quickly(redis_server, engine, a, b)
                mine = kept_source(a, engine)
                mine.busy = True
                traffic(engine, 3, seed=1)
                await until("A has the last messages", lambda: a.holds(engine))
                late = mine.shard.decide(float("inf"))
                assert isinstance(late, Flush)
                assert late.base == before.checkpoint.next
                engine.restart()
                traffic(engine, 10, seed=2)

                async def minted() -> bool:
                    found, _ = await contents(redis_server.url, spec_of(engine))
                    return found.meta is not None and found.meta.checkpoint.epoch == before.checkpoint.epoch + 1

                await eventually("B mints the next epoch", minted)
                refused = await a.keeper.writing.flush(mine, late)
                assert refused is Refusal.EPOCH
                mine.busy = False
                after = await agreed(redis_server, engine, a, b)
                assert after.checkpoint.epoch == before.checkpoint.epoch + 1
                assert epoch(a, engine) == epoch(b, engine) == after.checkpoint.epoch

    asyncio.run(scenario())


@pytest.mark.parametrize("held_back", ["first", "second", "none"])
def test_trap_23_whoever_finds_the_restart_first_there_is_one_new_epoch(redis_server: Server, held_back: str) -> None:
    """The other one's network to Redis is stalled meanwhile, or nobody's is: then both find it at once."""

    async def scenario() -> None:
        with small_engine() as engine:
            first, second = in_turn(engine, "x", "y")
            async with linked(redis_server, first) as (a, to_a), linked(redis_server, second) as (b, to_b):
                await followed(engine, a, b)
                traffic(engine, 10)
                before = await agreed_quickly(redis_server, engine, a, b)
                stalled = {"first": to_a, "second": to_b}.get(held_back)
                if stalled is not None:
                    stalled.faults = STALLED
                engine.restart()
                traffic(engine, 10, seed=1)
                if stalled is not None:
                    await kept(redis_server.url, b if stalled is to_a else a, spec_of(engine), engine)
                    traffic(engine, 3, seed=2)
                    stalled.faults = WHOLE
                after = await agreed(redis_server, engine, a, b)
                assert after.checkpoint.epoch == before.checkpoint.epoch + 1
                assert epoch(a, engine) == epoch(b, engine) == after.checkpoint.epoch
                assert after.checkpoint.coverage.level == 2

    asyncio.run(scenario())


def test_trap_23_two_restarts_while_a_replica_is_cut_off_from_the_engine(redis_server: Server) -> None:
    """It comes back two lives behind, whatever its turn, and adopts the newest."""

    async def scenario() -> None:
        with small_engine() as engine:
            names = in_turn(engine, "x", "y")
            for away in names:
                redis_server.ask("FLUSHALL")
                other = next(name for name in names if name != away)
                async with replica(redis_server.url, other) as a, replica(redis_server.url, away) as b:
                    with Detour(b, engine) as way:
                        await followed(engine, a, b)
                        traffic(engine, 10)
                        before = await agreed_quickly(redis_server, engine, a, b)
                        way.faults = DOWN
                        for life in range(2):
                            engine.restart()
                            traffic(engine, 5, seed=life)
                            await kept(redis_server.url, a, spec_of(engine), engine)
                        way.faults = WHOLE
                        after = await agreed(redis_server, engine, a, b)
                        assert after.checkpoint.epoch == before.checkpoint.epoch + 2
                        await live(engine, a, b)

    asyncio.run(scenario())


def test_trap_23_a_replica_that_is_cut_off_shows_it_and_writes_nothing(redis_server: Server) -> None:
    """C warms from Redis and never hears the engine: stale, then gone; Redis and the others never notice."""
    times = {"probe_interval_s": 0.2, "stale_after_s": 0.5, "gone_after_s": 1.5}

    async def scenario() -> None:
        with small_engine() as engine:
            async with replica(redis_server.url, "a") as a, replica(redis_server.url, "b") as b:
                spec = await followed(engine, a, b)
                traffic(engine, 10)
                before = await agreed_quickly(redis_server, engine, a, b)
                async with replica(redis_server.url, "c", allowed_endpoints=("tcp://none:*",), **times) as c:
                    with Detour(c, engine) as way:
                        way.faults = DOWN
                        c.fleet._membership._registry._allowed = ("tcp://*",)
                        c.fleet.register_shared(spec)
                        for state in ("stale", "gone"):
                            await until(state, lambda state=state: c.flags(spec.endpoint)[0] == state)  # type: ignore[misc]
                            assert c.flags(spec.endpoint)[1:] == (False, False) or state == "gone"
                        engine.restart()
                        traffic(engine, 10, seed=1)
                        after = await agreed(redis_server, engine, a, b)
                        assert after.checkpoint.epoch == before.checkpoint.epoch + 1
                        assert c.keeper.jobs.writes == 0
                        assert not c.fleet.index.copies(spec.endpoint)
                        way.faults = WHOLE
                        await agreed(redis_server, engine, a, b, c)
                        await live(engine, a, b, c)

    asyncio.run(scenario())


def test_trap_23_joined_late_with_less_loads_the_better_covered_shard(redis_server: Server) -> None:
    """The engine's buffer is shorter than its history: alone a newcomer would never be complete."""

    async def scenario() -> None:
        with small_engine(buffer_steps=6) as engine:
            async with replica(redis_server.url, "a") as a:
                await followed(engine, a)
                for seed in range(5):
                    traffic(engine, 3, seed)
                    await until("A keeps up", lambda: a.holds(engine))
                before = await agreed(redis_server, engine, a)
                async with replica(redis_server.url, "b") as b:
                    await live(engine, a, b)
                    assert epoch(b, engine) == before.checkpoint.epoch
                    await agreed(redis_server, engine, a, b)
                async with linked(redis_server, "c") as (c, link):
                    link.faults = DOWN
                    await until("C knows that Redis is out of reach", lambda: not c.keeper.shelf.reachable)
                    await followed(engine, c, complete=False)
                    link.faults = WHOLE
                    await agreed(redis_server, engine, a, c)
                    await live(engine, a, c)
                after = await agreed(redis_server, engine, a)
                assert after.checkpoint.coverage == before.checkpoint.coverage == (2, 0)

    asyncio.run(scenario())


def test_trap_23_joined_late_with_less_and_nobody_who_knows_more_is_left(redis_server: Server) -> None:
    """What a better covered shard says of a life that nobody can go on from gives way, in the end."""

    async def scenario() -> None:
        with small_engine(buffer_steps=4) as engine:
            async with replica(redis_server.url, "a") as a:
                await followed(engine, a)
                traffic(engine, 3)
                before = await agreed_quickly(redis_server, engine, a)
            for seed in range(5):
                traffic(engine, 3, seed)
            async with replica(redis_server.url, "b") as b:
                spec = spec_of(engine)
                assert sources(b) == [spec.endpoint]
                await until("B is live", lambda: b.fleet.reports()[0].state == "live")
                assert not b.flags(spec.endpoint)[2]

                async def up_to_date() -> bool:
                    found, _ = await contents(redis_server.url, spec)
                    assert found.meta is not None
                    return found.meta.checkpoint.next == (engine.last_seq or 0) + 1

                await eventually("Redis holds what B holds", up_to_date)
                found, records = await contents(redis_server.url, spec)
                assert records == memory(b, spec.endpoint)
                assert found.meta is not None
                assert found.meta.checkpoint.coverage.level < before.checkpoint.coverage.level
                engine.reset()
                traffic(engine, 5, seed=9)
                after = await agreed(redis_server, engine, b)
                await live(engine, b)
                assert after.checkpoint.coverage.level == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("away", [0, 1], ids=["first-in-turn", "second-in-turn"])
def test_trap_23_a_replica_with_a_gap_heals_from_the_better_covered_shard(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch, away: int
) -> None:
    """It was cut off for longer than the engine's buffer; twice, for the second load is not refused for ever."""
    monkeypatch.setattr(shard, "_LOAD_PAUSE_S", 0.5)

    async def scenario() -> None:
        with small_engine(buffer_steps=5) as engine:
            names = in_turn(engine, "x", "y")
            async with (
                replica(redis_server.url, names[1 - away]) as a,
                replica(redis_server.url, names[away]) as b,
            ):
                with Detour(b, engine) as way:
                    await followed(engine, a, b)
                    for turn_of_events in range(2):
                        way.faults = DOWN
                        await until("B has noticed", lambda: not b.flags(engine.endpoint)[1])
                        for seed in range(8):
                            traffic(engine, 2, seed + 10 * turn_of_events)
                            await until("A keeps up", lambda: a.holds(engine))
                        way.faults = WHOLE
                        after = await agreed(redis_server, engine, a, b)
                        await live(engine, a, b)
                        assert after.checkpoint.coverage == (2, 0)
                        assert after.checkpoint.epoch == 1

    asyncio.run(scenario())


def test_trap_23_one_lags_and_the_other_steps_in(redis_server: Server) -> None:
    """The first in turn can't reach Redis any more: the second writes, and both agree when it is back."""

    async def scenario() -> None:
        with small_engine() as engine:
            first, second = in_turn(engine, "x", "y")
            async with linked(redis_server, first) as (a, link), replica(redis_server.url, second) as b:
                await followed(engine, a, b)
                traffic(engine, 5)
                await agreed_quickly(redis_server, engine, a, b)
                link.faults = STALLED
                traffic(engine, 5, seed=1)
                meta = await kept(redis_server.url, b, spec_of(engine), engine)
                assert meta.writer == second
                assert a.holds(engine)
                traffic(engine, 5, seed=2)
                link.faults = WHOLE
                await agreed(redis_server, engine, a, b)
                traffic(engine, 5, seed=3)
                await agreed(redis_server, engine, a, b)

                async def first_again() -> bool:
                    traffic(engine, 1)
                    return (await agreed_quickly(redis_server, engine, a, b)).writer == first

                await eventually("the first in turn writes again", first_again)

    asyncio.run(scenario())


def test_trap_23_an_old_replica_comes_back_with_old_data(redis_server: Server) -> None:
    """Cut off from everything while the engine lived on, and once more while it was restarted: it harms nothing."""

    async def scenario() -> None:
        with small_engine(buffer_steps=5) as engine:
            first, second = in_turn(engine, "x", "y")
            async with linked(redis_server, first) as (old, link), replica(redis_server.url, second) as b:
                with Detour(old, engine) as way:
                    await followed(engine, old, b)
                    traffic(engine, 5)
                    await agreed_quickly(redis_server, engine, old, b)
                    for restarts in (False, True):
                        link.faults = way.faults = STALLED
                        traffic(engine, 2, seed=1)
                        if restarts:
                            engine.restart()
                        for seed in range(8):
                            traffic(engine, 2, seed)
                            await until("B keeps up", lambda: b.holds(engine))
                        await kept(redis_server.url, b, spec_of(engine), engine)
                        link.faults = way.faults = WHOLE
                        meta = await agreed(redis_server, engine, old, b)
                        assert meta.checkpoint.epoch == 1 + restarts
                        assert meta.checkpoint.coverage.level == 2
                        await live(engine, old, b)

    asyncio.run(scenario())


def test_old_and_new_writers_at_once(redis_server: Server) -> None:
    """Everybody may write at any time: the newer state wins, and nothing is written twice or undone."""

    async def scenario() -> None:
        with small_engine() as engine:
            async with AsyncExitStack() as stack:
                all_of_them = [await stack.enter_async_context(replica(redis_server.url, name)) for name in "abc"]
                await followed(engine, *all_of_them)
                for one in all_of_them:
                    one.keeper.shelf.share_out = lambda: None  # type: ignore[method-assign]
                    kept_source(one, engine).shard.turn = 0
                newest = 0
                for seed in range(30):
                    traffic(engine, 3, seed)
                    await asyncio.sleep(0.02)
                    found, _ = await contents(redis_server.url, spec_of(engine))
                    if found.meta is not None:
                        assert found.meta.checkpoint.next >= newest, "an older state was written over a newer one"
                        newest = found.meta.checkpoint.next
                meta = await agreed(redis_server, engine, *all_of_them)
                assert meta.checkpoint.epoch == 1

    asyncio.run(scenario())


def test_sources_registered_with_one_replica_are_followed_by_all(redis_server: Server) -> None:
    """Also by one that starts later; and nobody follows what was unregistered with any of them."""

    async def scenario() -> None:
        with small_engine() as one_engine, small_engine() as other:
            async with replica(redis_server.url, "a") as a, replica(redis_server.url, "b") as b:
                await followed(one_engine, a, b)
                b.fleet.register(spec_of(other, "pod-b"))
                await live(other, a, b)
                traffic(one_engine, 5)
                traffic(other, 5)
                await agreed(redis_server, other, a, b, instance="pod-b")
                async with replica(redis_server.url, "c") as c:
                    await live(one_engine, c)
                    await live(other, c)
                    assert b.fleet.unregister("pod-a") == [spec_of(one_engine)]
                    for each in (a, b, c):
                        await until("unregistered", lambda each=each: sources(each) == [other.endpoint])  # type: ignore[misc]
                    await eventually("its shard is ended", lambda: ended(redis_server, spec_of(one_engine)))
                async with replica(redis_server.url, "d") as d:
                    await live(other, d)
                    assert sources(d) == [other.endpoint]

    asyncio.run(scenario())


def sources(one: Replica) -> list[str]:
    """What a replica follows."""
    return sorted(report.source for report in one.fleet.reports())


async def ended(server: Server, spec: SourceSpec) -> bool:
    """Whether Redis holds nothing of a source but that it was unregistered."""
    found, _ = await contents(server.url, spec)
    return found.meta is None and found.removed is not None and not found.leftovers


def test_trap_23_unregistered_and_registered_again_here_and_there(redis_server: Server) -> None:
    """Whoever says so last is right, with whatever replica."""

    async def scenario() -> None:
        with small_engine() as engine:
            spec = spec_of(engine)
            async with replica(redis_server.url, "a") as a, replica(redis_server.url, "b") as b:
                traffic(engine, 5)
                for here, there in ((a, b), (b, a), (a, b)):
                    await followed(engine, here, there)
                    await agreed_quickly(redis_server, engine, a, b)
                    there.fleet.unregister("pod-a")
                    await until("nobody follows it", lambda: not sources(a) + sources(b))
                    await eventually("its shard is ended", lambda: ended(redis_server, spec))
                a.fleet.register(spec)
                b.fleet.register(spec)
                await live(engine, a, b)
                await agreed(redis_server, engine, a, b)
                a.fleet.unregister("pod-a")
                b.fleet.unregister("pod-a")
                await until("nobody follows it", lambda: not sources(a) + sources(b))
                await eventually("its shard is ended", lambda: ended(redis_server, spec))
                a.fleet.register(spec)
                a.fleet.unregister("pod-a")
                a.fleet.register(spec)
                await live(engine, a, b)
                await agreed(redis_server, engine, a, b)

    asyncio.run(scenario())


def test_trap_23_an_unregistered_source_does_not_come_back_with_an_old_replica(redis_server: Server) -> None:
    """The tombstone wins over the older registration, also in a Redis that has been emptied meanwhile."""

    async def scenario() -> None:
        with small_engine() as engine:
            async with replica(redis_server.url, "a") as a, linked(redis_server, "b") as (b, link):
                spec = spec_of(engine)
                for emptied in (False, True):
                    await followed(engine, a, b)
                    traffic(engine, 5)
                    await agreed_quickly(redis_server, engine, a, b)
                    link.faults = STALLED
                    a.fleet.unregister("pod-a")
                    await eventually("its shard is ended", lambda: ended(redis_server, spec))
                    if emptied:
                        redis_server.ask("FLUSHALL")
                    traffic(engine, 5, seed=1)
                    assert b.holds(engine) or sources(b) == [engine.endpoint]
                    link.faults = WHOLE
                    await until("B follows it no longer", lambda: not sources(b))
                    await asyncio.sleep(QUIET_S)
                    assert not sources(a) + sources(b)
                    found, records = await contents(redis_server.url, spec)
                    assert found.meta is None
                    assert not records

    asyncio.run(scenario())


def test_trap_23_a_registration_after_the_directory_was_lost_is_newer_than_every_tombstone(
    redis_server: Server,
) -> None:
    """FLUSHALL forgets how far the generations had come; those who remember must not bring the tombstone back."""

    async def scenario() -> None:
        with small_engine() as engine:
            spec = spec_of(engine)
            async with replica(redis_server.url, "a") as a, replica(redis_server.url, "b") as b:
                for _ in range(3):
                    await followed(engine, a, b)
                    a.fleet.unregister("pod-a")
                    await until("nobody follows it", lambda: not sources(a) + sources(b))
                await eventually("its shard is ended", lambda: ended(redis_server, spec))
                redis_server.ask("FLUSHALL")
                a.fleet.register(spec)
                await live(engine, a, b)
                traffic(engine, 5)
                await agreed(redis_server, engine, a, b)
                assert sources(a) == sources(b) == [engine.endpoint]

    asyncio.run(scenario())


def test_a_registration_that_changes_is_followed_anew_by_all(redis_server: Server) -> None:
    """Another model behind the same endpoint is another shard; the old one is ended."""

    async def scenario() -> None:
        with small_engine() as engine:
            old, new = spec_of(engine), spec_of(engine, model="other")
            async with replica(redis_server.url, "a") as a, replica(redis_server.url, "b") as b:
                await followed(engine, a, b)
                traffic(engine, 5)
                await agreed_quickly(redis_server, engine, a, b)
                b.fleet.unregister("pod-a")
                b.fleet.register(new)
                for one in (a, b):
                    await until("the new one", lambda one=one: [r.spec for r in one.fleet.reports()] == [new])  # type: ignore[misc]
                await agreed(redis_server, engine, a, b, model="other")

                async def gone() -> bool:
                    found, _ = await contents(redis_server.url, old)
                    return found.meta is None and not found.leftovers

                await eventually("the old shard is ended", gone)

    asyncio.run(scenario())


def test_messages_that_are_lost_for_one_replica_alone(redis_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine forgets messages that one replica never got: it takes them over from the shard.

    The first load may come before the others have written what the engine's short buffer no longer has.
    """
    monkeypatch.setattr(shard, "_LOAD_PAUSE_S", 0.5)

    async def scenario() -> None:
        with small_engine(buffer_steps=3) as engine:
            async with replica(redis_server.url, "a") as a, replica(redis_server.url, "b") as b:
                with Detour(b, engine) as way:
                    await followed(engine, a, b)
                    traffic(engine, 5)
                    await agreed_quickly(redis_server, engine, a, b)
                    way.faults = LinkFaults(reset=True)
                    for seed in range(5):
                        traffic(engine, 3, seed)
                        await until("A keeps up", lambda: a.holds(engine))
                    way.faults = WHOLE
                    await agreed(redis_server, engine, a, b)
                    await live(engine, a, b)

    asyncio.run(scenario())


def test_what_everybody_has_lost_is_not_complete_anywhere(redis_server: Server) -> None:
    """A message that nobody got: no replica and no checkpoint claims to know it, until a reset makes up for it."""

    async def scenario() -> None:
        with small_engine() as engine:
            async with replica(redis_server.url, "a") as a, replica(redis_server.url, "b") as b:
                spec = await followed(engine, a, b)
                traffic(engine, 5)
                await agreed_quickly(redis_server, engine, a, b)
                lost = (engine.last_seq or 0) + 1
                engine.faults = Faults(drop_and_forget_seqs=frozenset({lost}))
                traffic(engine, 5, seed=1)
                for one in (a, b):
                    await until("shown", lambda one=one: one.flags(spec.endpoint) == ("live", False, False))  # type: ignore[misc]

                async def shown() -> bool:
                    found, records = await contents(redis_server.url, spec)
                    level = None if found.meta is None else found.meta.checkpoint.coverage.level
                    return level == 0 and records == memory(a, spec.endpoint) == memory(b, spec.endpoint)

                await eventually("the checkpoint says so too", shown)
                async with replica(redis_server.url, "c") as c:
                    await until("C is live", lambda: [r.state for r in c.fleet.reports()] == ["live"])
                    assert c.flags(spec.endpoint) == ("live", False, False)
                    engine.reset()
                    traffic(engine, 5, seed=2)
                    meta = await agreed(redis_server, engine, a, b, c)
                    await live(engine, a, b, c)
                    assert meta.checkpoint.coverage.level == 2

    asyncio.run(scenario())


def test_a_replica_that_comes_or_goes_takes_its_turns(redis_server: Server) -> None:
    """The others find out that it is no longer there, at once if it has left in good order."""

    async def scenario() -> None:
        with small_engine() as engine:
            first, second = in_turn(engine, "x", "y")
            async with replica(redis_server.url, second) as b:
                await followed(engine, b)
                async with replica(redis_server.url, first) as a:
                    await live(engine, a)
                    await until("B's turn is over", lambda: kept_source(b, engine).shard.turn == 1)
                    traffic(engine, 5)
                    await agreed(redis_server, engine, a, b)
                left = await b.keeper._server.beat(second, 60)
                assert left.replicas == (second,), "it has said so itself"
                await until("it is B's turn again", lambda: kept_source(b, engine).shard.turn == 0)
                traffic(engine, 5, seed=1)
                assert (await agreed(redis_server, engine, b)).writer == second

    asyncio.run(scenario())
