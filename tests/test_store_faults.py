"""Trap 22: Redis is not there, slow, stopped, emptied, failed over, full, resharded, damaged or somebody else's.

While it lasts the index equals the engine's cache and answers; when it is over Redis holds just that, once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from redis import Redis

from kvindexer.errors import StoreError
from kvindexer.settings import Settings
from kvindexer.store.connect import open_client
from kvindexer.store.failures import asking
from kvindexer.store.layout import Meta, Names, shard_tag
from kvindexer.store.server import ShardServer
from kvindexer.testing import FakeEngine, FaultProxy, LinkFaults
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.types import Keyspace, SourceSpec
from live import spec_of, until
from proxied import SMALL, traffic
from replicas import Replica, contents, eventually, kept, memory, replica, stored
from servers import HOST, Cluster, Replicated, Server

WHOLE = LinkFaults()
PROMPT = list(range(24))
SYNC_DEADLINE_S = 1.0


@asynccontextmanager
async def following(url: str, engine: FakeEngine, name: str = "a") -> AsyncIterator[tuple[Replica, SourceSpec]]:
    """A replica that follows the engine from its start."""
    spec = spec_of(engine)
    async with replica(url, name, sources=(spec,), sync_deadline_s=SYNC_DEADLINE_S) as one:
        await until("live", lambda: one.flags(spec.endpoint) == ("live", True, True))
        yield one, spec


async def answers(one: Replica, engine: FakeEngine, seed: int = 0) -> None:
    """Load reaches the index, and a prompt is found, without anything that Redis says or does not say."""
    traffic(engine, 10, seed)
    engine.run_request(PROMPT)
    await until("the index equals the cache", lambda: one.holds(engine))
    keys = prompt_keys(pack_tokens(PROMPT), engine.shape.block_size)
    (found,) = one.fleet.index.match(Keyspace("default", "m", "", engine.shape.block_size), keys, len(PROMPT))
    assert found.cached == engine.cached_tokens(PROMPT) // engine.shape.block_size > 0
    await until("it is ready, at the latest when its time is over", lambda: one.fleet.ready)


async def well(one: Replica) -> None:
    """Wait until nothing is wrong with the copy any more."""
    await until(f"no problems of {one.name}", lambda: not one.keeper.problems())


def follows(one: Replica, spec: SourceSpec) -> bool:
    """Whether it follows the source, and well."""
    known = any(report.source == spec.endpoint for report in one.fleet.reports())
    return known and one.flags(spec.endpoint) == ("live", True, True)


def reasons(one: Replica) -> set[str]:
    """What is wrong."""
    return {problem.reason for problem in one.keeper.problems()}


async def troubled(one: Replica, *expected: str) -> None:
    """Wait until one of these problems is shown, with what to do about it."""
    await until(f"one of {expected}", lambda: bool(reasons(one) & set(expected)))
    assert all(problem.message and problem.hint for problem in one.keeper.problems())


def asked_since(engine: FakeEngine, requests: int) -> bool:
    """Whether a replay was asked for since there were so many requests."""
    return len(engine.replay_requests) > requests


def with_small_engine(scenario: Callable[[FakeEngine], Awaitable[None]]) -> None:
    """Run a scenario with an engine of its own."""

    async def run() -> None:
        with FakeEngine(pool=SMALL) as engine:
            await scenario(engine)

    asyncio.run(run())


def test_trap_22_redis_is_absent_at_the_start(own_redis_server: Server) -> None:
    """The service starts cold, is ready, answers, and writes when Redis comes."""
    server = own_redis_server
    server.stop()

    async def scenario(engine: FakeEngine) -> None:
        async with following(server.url, engine) as (one, spec):
            await answers(one, engine)
            await troubled(one, "unreachable")
            server.start()
            await kept(server.url, one, spec, engine)
            await well(one)

    with_small_engine(scenario)


def test_trap_22_redis_is_slow(redis_server: Server) -> None:
    """100 ms a round trip and more: everything gets there, later."""

    async def scenario(engine: FakeEngine) -> None:
        with FaultProxy(HOST, redis_server.port, LinkFaults(latency_s=0.05)) as link:
            async with following(f"redis://{HOST}:{link.port}", engine) as (one, spec):
                for seed in range(5):
                    await answers(one, engine, seed)
                await kept(redis_server.url, one, spec, engine)
                await well(one)

    with_small_engine(scenario)


def test_trap_22_redis_is_paused_and_goes_on(own_redis_server: Server) -> None:
    """SIGSTOP: connections stay open and nobody answers."""
    server = own_redis_server

    async def scenario(engine: FakeEngine) -> None:
        async with following(server.url, engine) as (one, spec):
            await answers(one, engine)
            await kept(server.url, one, spec, engine)
            for seed in range(2):
                server.pause()
                await answers(one, engine, seed)
                await troubled(one, "timeout")
                await answers(one, engine, seed + 10)
                server.resume()
                await kept(server.url, one, spec, engine)
                await well(one)

    with_small_engine(scenario)


def test_trap_22_redis_is_killed_and_restarted_empty(own_redis_server: Server) -> None:
    """Its scripts are gone too."""
    server = own_redis_server

    async def scenario(engine: FakeEngine) -> None:
        async with following(server.url, engine) as (one, spec):
            await answers(one, engine)
            before = await kept(server.url, one, spec, engine)
            server.kill()
            await answers(one, engine, 1)
            await troubled(one, "unreachable")
            server.start()
            after = await kept(server.url, one, spec, engine)
            await well(one)
            assert after.checkpoint.epoch == before.checkpoint.epoch
            server.kill()
            server.start()
            await answers(one, engine, 2)
            await kept(server.url, one, spec, engine)

    with_small_engine(scenario)


def test_trap_22_everything_is_flushed_while_running(redis_server: Server) -> None:
    """Shards and directory come back from memory: nobody takes an empty directory for a command."""

    async def scenario(engine: FakeEngine) -> None:
        spec = spec_of(engine)
        async with replica(redis_server.url, "a") as a, replica(redis_server.url, "b") as b:
            a.fleet.register(spec)
            for one in (a, b):
                await until("followed", lambda one=one: follows(one, spec))  # type: ignore[misc]
            for seed in range(4):
                await answers(b, engine, seed)
                redis_server.ask("FLUSHALL")
                await answers(a, engine, seed + 10)
                for one in (a, b):
                    await kept(redis_server.url, one, spec, engine)
                    assert [report.source for report in one.fleet.reports()] == [spec.endpoint]
            async with replica(redis_server.url, "c") as c:
                await until("C knows it", lambda: [report.source for report in c.fleet.reports()] == [spec.endpoint])
                meta = await kept(redis_server.url, c, spec, engine)
                assert meta.checkpoint.epoch == 1

    with_small_engine(scenario)


def test_trap_22_a_failover_that_loses_the_last_writes() -> None:
    """The new primary never got them: it looks like an older shard, and is brought up from memory."""

    async def scenario(engine: FakeEngine) -> None:
        with Replicated() as redis:
            async with following(redis.url, engine) as (one, spec):
                await answers(one, engine)
                await kept(redis.url, one, spec, engine)
                old = redis.primary
                new = next(server for server in redis.servers if server is not old)
                before, _ = await contents(old.url, spec)
                await until(
                    "replicated", lambda: new.info()["master_repl_offset"] == old.info()["master_repl_offset"]
                )
                new.ask("REPLICAOF", HOST, 1)
                await answers(one, engine, 1)
                await kept(old.url, one, spec, engine)
                lost, _ = await contents(new.url, spec)
                assert lost.meta is not None
                assert before.meta is not None
                assert lost.meta.checkpoint.next < (engine.last_seq or 0)
                await asyncio.to_thread(redis.failover, kill=True)
                await answers(one, engine, 2)
                after = await kept(redis.url, one, spec, engine)
                await well(one)
                assert after.checkpoint.epoch == before.meta.checkpoint.epoch

    with_small_engine(scenario)


def test_trap_22_an_older_state_of_redis_comes_back(redis_server: Server) -> None:
    """Whatever the age of what is restored, also of an earlier life, or while nothing moves."""

    async def scenario(engine: FakeEngine) -> None:
        async with following(redis_server.url, engine) as (one, spec):
            saved = []
            for seed in range(3):
                await answers(one, engine, seed)
                await kept(redis_server.url, one, spec, engine)
                saved.append(save(redis_server))
                if seed == 1:
                    engine.restart()
            for number, state in enumerate((*saved, saved[0])):
                restore(redis_server, state)
                if number % 2:
                    await answers(one, engine, 10 + number)
                meta = await kept(redis_server.url, one, spec, engine)
                assert meta.checkpoint.epoch == 2
            async with replica(redis_server.url, "b", sources=(spec,)) as other:
                await until("warm", lambda: other.flags(spec.endpoint) == ("live", True, True))
                await kept(redis_server.url, other, spec, engine)

    with_small_engine(scenario)


def save(server: Server) -> dict[bytes, bytes]:
    """All keys, as they are."""
    with raw(server) as client:
        return {key: client.dump(key) for key in client.keys("*")}


def restore(server: Server, state: dict[bytes, bytes]) -> None:
    """All keys, as they were."""
    with raw(server) as client:
        pipeline = client.pipeline()
        pipeline.flushall()
        for key, value in state.items():
            pipeline.restore(key, 0, value)
        pipeline.execute()


def raw(server: Server) -> Redis:
    """A client whose answers are bytes."""
    return Redis(host=HOST, port=server.port, protocol=2)


def test_trap_22_memory_is_full(own_redis_server: Server) -> None:
    """OOM is shown with what to change, and heals when there is room."""
    server = own_redis_server

    async def scenario(engine: FakeEngine) -> None:
        async with following(server.url, engine) as (one, spec):
            await answers(one, engine)
            await kept(server.url, one, spec, engine)
            server.ask("CONFIG", "SET", "maxmemory", 1)
            await answers(one, engine, 1)
            await troubled(one, "out_of_memory")
            await answers(one, engine, 2)
            server.ask("CONFIG", "SET", "maxmemory", 0)
            await kept(server.url, one, spec, engine)
            await well(one)

    with_small_engine(scenario)


def test_trap_22_the_server_may_evict_our_keys(own_redis_server: Server) -> None:
    """An eviction policy that could drop our keys is a problem as long as it is set."""
    server = own_redis_server

    async def scenario(engine: FakeEngine) -> None:
        async with following(server.url, engine) as (one, spec):
            await answers(one, engine)
            server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            await troubled(one, "evicts")
            assert "noeviction" in one.keeper.problems()[0].message + one.keeper.problems()[0].hint
            await answers(one, engine, 1)
            server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
            await well(one)
            await kept(server.url, one, spec, engine)

    with_small_engine(scenario)


def test_trap_22_slots_move_and_primaries_fail() -> None:
    """MOVED and ASK while it writes, and a primary that is killed: shards are found where they are."""

    async def scenario(engine: FakeEngine) -> None:
        with Cluster() as cluster:
            async with following(cluster.url, engine) as (one, spec):
                await answers(one, engine)
                await kept(cluster.url, one, spec, engine)
                meta = Names("kvindexer").meta(shard_tag(spec.endpoint, spec))
                for step in range(2):
                    target = next(server for server in cluster.primaries if server is not cluster.owner(meta))
                    await asyncio.to_thread(cluster.begin_move, meta, target)
                    await answers(one, engine, 10 + step)
                    await asyncio.to_thread(cluster.move, meta, target)
                    await answers(one, engine, 20 + step)
                    await kept(cluster.url, one, spec, engine)
                owner = cluster.owner(meta)
                await asyncio.to_thread(cluster.failover, owner, kill=True)
                await answers(one, engine, 30)
                after = await kept(cluster.url, one, spec, engine)
                assert after.checkpoint.epoch == 1
                await well(one)

    with_small_engine(scenario)


def test_a_cluster_holds_shards_of_many_sources(redis_cluster: Cluster) -> None:
    """Each shard in one slot, shards on all nodes, warm starts from all of them."""

    async def scenario(_engine: FakeEngine) -> None:
        engines = [FakeEngine(pool=SMALL) for _ in range(6)]
        try:
            specs = [spec_of(engine, f"pod-{number}") for number, engine in enumerate(engines)]
            async with replica(redis_cluster.url, "a", sources=tuple(specs)) as one:
                for engine in engines:
                    traffic(engine, 10)
                for engine, spec in zip(engines, specs, strict=True):
                    await kept(redis_cluster.url, one, spec, engine)
            before = [len(engine.replay_requests) for engine in engines]
            # the first look at a cluster takes several answers: what takes too long is a cold start, by design
            async with replica(redis_cluster.url, "b", sources=tuple(specs), store_timeout_s=2.0) as other:
                for engine, spec, asked in zip(engines, specs, before, strict=True):
                    # what was loaded agrees before the engine has been asked at all
                    await until("its engine is asked", partial(asked_since, engine, asked))
                    await kept(redis_cluster.url, other, spec, engine)
                    assert min(engine.replay_requests[asked:]) > 0, other.keeper.problems()
        finally:
            for engine in engines:
                engine.stop()

    with_small_engine(scenario)


def meta_key(spec: SourceSpec) -> str:
    """Where a shard's checkpoint is."""
    return Names("kvindexer").meta(shard_tag(spec.endpoint, spec))


@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        (("SET", "{}", "mine"), "no hash"),
        (("HSET", "{}", "colour", "red"), "no layout"),
        (("HSET", "{}", "layout", "2", "generation", "of 2031"), "layout 2"),
        (("HSET", "{}", "layout", "1", "generation", "a", "buckets", "3"), "damaged"),
        (("RPUSH", "{}", "1", "2"), "no hash"),
    ],
    ids=["string", "hash", "newer", "damaged", "list"],
)
def test_another_program_s_key_in_the_place_of_a_shard(
    redis_server: Server, foreign: tuple[str, ...], words: str
) -> None:
    """One clear problem that names the key and says what to change; nothing of it is changed or deleted."""

    async def scenario(engine: FakeEngine) -> None:
        spec = spec_of(engine)
        key = meta_key(spec)
        redis_server.ask(*(word.format(key) for word in foreign))
        before = save(redis_server)[key.encode()]
        async with following(redis_server.url, engine) as (one, _):
            await answers(one, engine)
            await troubled(one, "foreign")
            (problem,) = one.keeper.problems()
            assert key in problem.message
            assert words in problem.message
            assert "store_namespace" in problem.hint
            await answers(one, engine, 1)
            assert one.keeper.jobs.writes == 0
            assert save(redis_server)[key.encode()] == before
            redis_server.ask("DEL", key)
            await kept(redis_server.url, one, spec, engine)
            await well(one)
            redis_server.ask("DEL", key)
            redis_server.ask(*(word.format(key) for word in foreign))
            await answers(one, engine, 2)
            await troubled(one, "foreign")
            assert save(redis_server)[key.encode()] == before

    with_small_engine(scenario)


@pytest.mark.parametrize("name", ["sources", "replicas"])
def test_another_program_s_key_in_the_place_of_the_directory(redis_server: Server, name: str) -> None:
    """The problem names the key; memory goes on."""

    async def scenario(engine: FakeEngine) -> None:
        key = f"{{kvindexer}}:{name}"
        redis_server.ask("SET", key, "mine")
        async with following(redis_server.url, engine) as (one, spec):
            await answers(one, engine)
            await troubled(one, "wrong_type")
            assert any(key in problem.message for problem in one.keeper.problems())
            assert any("store_namespace" in problem.hint for problem in one.keeper.problems())
            assert redis_server.ask("GET", key) == "mine"
            redis_server.ask("DEL", key)
            await kept(redis_server.url, one, spec, engine)
            await well(one)

    with_small_engine(scenario)


def test_lines_of_the_directory_that_nobody_understands(redis_server: Server) -> None:
    """They are shown and left alone; those that are understood count."""

    async def scenario(engine: FakeEngine) -> None:
        redis_server.ask(
            "HSET",
            "{kvindexer}:sources",
            "tcp://10.0.0.1:5",
            "colour red",
            "x",
            "7:registered:{",
            "y",
            b"\xff",
            "z",
            "7:removed:{",
        )
        async with replica(redis_server.url, "a") as one:
            spec = spec_of(engine)
            one.fleet.register(spec)
            traffic(engine, 10)
            await kept(redis_server.url, one, spec, engine)
            await troubled(one, "foreign")
            assert [report.source for report in one.fleet.reports()] == [spec.endpoint]
            assert redis_server.ask("HGET", "{kvindexer}:sources", "x") == "7:registered:{"
            redis_server.ask("HDEL", "{kvindexer}:sources", "tcp://10.0.0.1:5", "x", "y", "z")
            redis_server.ask("HSET", "{kvindexer}:sources", "#version", "1")
            await well(one)

    with_small_engine(scenario)


async def bucket_keys(server: Server, spec: SourceSpec) -> tuple[Meta, list[str]]:
    """The buckets that exist of a shard."""
    found, _ = await contents(server.url, spec)
    assert found.meta is not None
    tag = shard_tag(spec.endpoint, spec)
    names = [Names("kvindexer").bucket(tag, found.meta.generation, number) for number in range(found.meta.buckets)]
    return found.meta, [name for name in names if server.ask("EXISTS", name)]


@pytest.mark.parametrize("harm", ["evicted", "changed", "garbage", "extra", "missing", "wrong-type"])
def test_what_is_damaged_in_redis_is_found_and_repaired(redis_server: Server, harm: str) -> None:
    """None of it moves the checkpoint; the check of digests finds it, memory is right."""

    async def scenario(engine: FakeEngine) -> None:
        async with following(redis_server.url, engine) as (one, spec):
            await answers(one, engine)
            await kept(redis_server.url, one, spec, engine)
            _, buckets = await bucket_keys(redis_server, spec)
            with raw(redis_server) as client:
                damage(client, buckets[0], harm)
            await until("it is found", lambda: one.keeper.checks.divergences > 0)
            await eventually("it can be read", lambda: readable(redis_server, spec))
            await kept(redis_server.url, one, spec, engine)
            await well(one)
            if harm == "wrong-type":
                assert redis_server.ask("GET", buckets[0]) == "mine"

    with_small_engine(scenario)


async def readable(server: Server, spec: SourceSpec) -> bool:
    """Whether a shard can be read."""
    try:
        await contents(server.url, spec)
    except StoreError:
        return False
    return True


def damage(client: Redis, bucket: str, harm: str) -> None:
    """Do something to a bucket that nobody of us would."""
    field = next(iter(client.hkeys(bucket)))
    match harm:
        case "evicted":
            client.delete(bucket)
        case "changed":
            client.hset(bucket, field, b"\x01" + b"\x07" * 8 + b"\x00")
        case "garbage":
            client.hset(bucket, field, b"\xff\xff")
        case "extra":
            client.hset(bucket, b"\x00" * 8, b"\x01" + b"\x07" * 8 + b"\x00")
        case "long":
            client.hset(bucket, b"far too long a field", b"x")
        case "missing":
            client.hdel(bucket, field)
        case "wrong-type":
            client.delete(bucket)
            client.set(bucket, "mine")


@pytest.mark.parametrize("harm", ["evicted", "garbage", "long", "wrong-type"])
def test_a_warm_start_from_a_damaged_shard_is_never_wrong(redis_server: Server, harm: str) -> None:
    """It takes what it can or begins cold, claims nothing that is not so, and Redis is repaired."""

    async def scenario(engine: FakeEngine) -> None:
        async with following(redis_server.url, engine) as (one, spec):
            await answers(one, engine)
            await kept(redis_server.url, one, spec, engine)
        _, buckets = await bucket_keys(redis_server, spec)
        with raw(redis_server) as client:
            damage(client, buckets[0], harm)
        async with replica(redis_server.url, "b", sources=(spec,)) as other:
            await until("live", lambda: other.flags(spec.endpoint)[0] == "live")
            assert other.holds(engine) or not other.flags(spec.endpoint)[2]
            await eventually("it can be read", lambda: readable(redis_server, spec))

            async def honest() -> bool:
                found, records = await contents(redis_server.url, spec)
                known = found.meta is not None and found.meta.checkpoint.coverage.level == 2
                return records == memory(other, spec.endpoint) and known == other.flags(spec.endpoint)[2]

            await eventually("Redis says what is known", honest)
            engine.reset()
            await answers(other, engine, 1)
            await kept(redis_server.url, other, spec, engine)
            await until("complete", lambda: other.flags(spec.endpoint) == ("live", True, True))
            await well(other)

    with_small_engine(scenario)


def test_trap_25_a_large_source_is_removed_in_small_steps(redis_server: Server) -> None:
    """No KEYS, no SCAN, no long command; the buckets are gone afterwards."""

    async def scenario(engine: FakeEngine) -> None:
        spec = spec_of(engine)
        async with replica(redis_server.url, "a") as one, replica(redis_server.url, "b") as other:
            one.fleet.register(spec)
            await until("live", lambda: follows(one, spec))
            for start in range(0, 60_000, 500):
                engine.publish_events([stored(start, 500)])
            await until("taken in", lambda: len(one.fleet.index.hashes(spec.endpoint)) >= 60_000)

            async def written() -> bool:
                found, _ = await contents(redis_server.url, spec)
                return found.meta is not None and found.meta.entries >= 60_000

            await eventually("written", written)
            assert redis_server.ask("DBSIZE") > 500
            redis_server.ask("CONFIG", "RESETSTAT")
            redis_server.ask("CONFIG", "SET", "slowlog-log-slower-than", 100_000)
            redis_server.ask("SLOWLOG", "RESET")
            other.fleet.unregister("pod-a")

            async def gone() -> bool:
                return set(redis_server.ask("KEYS", "*")) <= {
                    "{kvindexer}:sources",
                    "{kvindexer}:replicas",
                    meta_key(spec),
                }

            async def small() -> bool:
                return int(redis_server.ask("DBSIZE")) <= 3

            await eventually("its buckets are gone", small)
            stats = redis_server.ask("INFO", "commandstats")
            assert not {f"cmdstat_{name}" for name in ("keys", "scan", "hscan", "flushall", "del")} & set(stats)
            assert "cmdstat_unlink" in stats
            assert redis_server.ask("SLOWLOG", "LEN") == 0
            assert await gone()

    with_small_engine(scenario)


@pytest.mark.parametrize("kind", ["single", "cluster"])
def test_a_call_that_is_cancelled_ends(redis_server: Server, redis_cluster: Cluster, kind: str) -> None:
    """At whatever moment: pipelines of redis-py swallow some cancellations, and a replica must be able to stop."""

    async def scenario(_engine: FakeEngine) -> None:
        url = redis_server.url if kind == "single" else redis_cluster.url
        settings = Settings(store=url)  # type: ignore[arg-type]
        server = ShardServer(open_client(settings), Names("kvindexer"), 1.0)

        async def busy() -> None:
            while True:
                await server.beat("x", 2)
                await server.read(["a", "b"])
                await server.lines()

        dice = random.Random(7)
        try:
            await server.beat("x", 2)
            for _ in range(300):
                task = asyncio.create_task(busy())
                for _ in range(dice.randrange(60)):
                    await asyncio.sleep(0)
                await asyncio.sleep(dice.choice((0, 0.001)))
                task.cancel()
                await asyncio.wait([task], timeout=20)
                assert task.cancelled()
        finally:
            await server.close()

    with_small_engine(scenario)


def test_a_connection_that_breaks_under_uvloop_is_no_bug_of_ours() -> None:
    """It says so with a RuntimeError; any other one is a bug, and stays what it is."""

    async def scenario(_engine: FakeEngine) -> None:
        with pytest.raises(StoreError) as caught:
            async with asking(1.0):
                raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
        assert caught.value.reason == "unreachable"
        with pytest.raises(RuntimeError, match="something else"):
            async with asking(1.0):
                raise RuntimeError("something else")

    with_small_engine(scenario)
