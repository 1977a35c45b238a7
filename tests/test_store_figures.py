"""What a replica says of its store: the server's own condition, problems, figures for health and metrics."""

from __future__ import annotations

import asyncio

from kvindexer.events.keeping import Nobody, StoreFigures
from kvindexer.store.figures import SHARD_STATES
from kvindexer.testing import FakeEngine
from live import connected, spec_of, until
from replicas import Replica, kept, replica
from servers import Server


def reasons(one: Replica) -> set[str]:
    return {problem.reason for problem in one.fleet.problems()}


def test_trap_22_a_wrong_eviction_policy_shows_until_it_is_right(own_redis_server: Server) -> None:
    """It is looked at from the start and again and again, and says what to change."""
    server = own_redis_server

    async def scenario() -> None:
        server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        async with replica(server.url) as one:
            await until("it shows", lambda: reasons(one) == {"evicts"})
            (problem,) = one.fleet.problems()
            assert "set maxmemory-policy to noeviction" in problem.message
            assert "docs/redis.md" in problem.hint
            server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
            await until("it is gone", lambda: not reasons(one))

    asyncio.run(scenario())


def test_figures_follow_what_happens(own_redis_server: Server) -> None:
    server = own_redis_server

    async def scenario() -> None:
        with FakeEngine() as engine:
            spec = spec_of(engine)
            async with replica(server.url, sources=(spec,)) as one:
                await connected(engine)
                engine.run_request(list(range(64)))
                meta = await kept(server.url, one, spec, engine)
                await until("it is in step", lambda: one.fleet.store().shards["in_step"] == 1)
                figures = one.fleet.store()
                assert (figures.kind, figures.reachable, figures.replicas) == ("redis", True, 1)
                assert (figures.writes > 0, figures.lag_s, figures.pending_bytes) == (True, 0.0, 0)
                assert tuple(figures.shards) == SHARD_STATES
                (report,) = one.fleet.reports()
                assert report.stored == (meta.checkpoint.epoch, engine.last_seq, meta.entries)
                server.stop()
                await until("it is missed", lambda: not one.fleet.store().reachable)
                engine.run_request(list(range(100, 164)))
                await until("it is behind", lambda: one.fleet.store().shards["behind"] == 1)
                figures = one.fleet.store()
                assert figures.lag_s > 0
                assert figures.pending_bytes > 0
                assert "unreachable" in reasons(one)
                server.start()
                await kept(server.url, one, spec, engine)
                await until("all is well", lambda: not reasons(one) and one.fleet.store().lag_s == 0)
                await until("it is compared", lambda: one.fleet.store().checks > 0)

    asyncio.run(scenario())


def test_without_a_store_there_is_nothing_to_say() -> None:
    nobody = Nobody()
    assert (nobody.figures(), nobody.stored("a"), tuple(nobody.problems())) == (StoreFigures(), None, ())
