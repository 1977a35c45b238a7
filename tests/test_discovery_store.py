"""Found sources and the shared copy in Redis: a life is a shard, and ends with its pod's container."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import live
from discovering import MODEL, EnginePod, expected, followed, free_port
from kube_api import KubeApi, pod, restarted
from kvindexer.events.discovery import finder, watching
from kvindexer.events.fleet import LiveFleet
from kvindexer.store.directory import Directory, Kind, Line
from kvindexer.store.layout import shard_tag
from kvindexer.testing import FakeEngine
from kvindexer.types import SourceSpec
from live import connected, truth, until
from replicas import Replica, replica
from servers import Server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "RETRY_MIN_S", 0.02)
    monkeypatch.setattr(finder, "EVERY_S", 0.1)


@pytest.fixture
def one() -> Iterator[EnginePod]:
    with EnginePod("127.77.5.1", free_port(), free_port()) as running:
        yield running


def annotated(one: EnginePod) -> dict[str, Any]:
    """Without a replay socket: what is known of the engine is what was heard, and what Redis has."""
    port = one.engine.endpoint.rpartition(":")[2]
    said = {**MODEL, "kvindexer.io/event-port": port, "kvindexer.io/block-size": "4"}
    return pod("a", one.address, annotations=said)


def held(fleet: LiveFleet, engine: FakeEngine) -> dict[tuple[int, Any], int]:
    """What the index says the engine holds; nothing if it is not followed."""
    return live.held(fleet, engine) if fleet.sources() else {}


def equal(one: Replica, engine: FakeEngine) -> bool:
    """Whether a replica knows just what the engine holds, which is something."""
    return held(one.fleet, engine) == truth(engine) != {}


async def stored(one: Replica, entries: int) -> None:
    def there() -> bool:
        reports = one.fleet.reports()
        return bool(reports) and reports[0].stored is not None and reports[0].stored.entries == entries

    await until(f"{entries} entries are in Redis", there)


def test_a_replica_that_starts_goes_on_with_the_same_life_and_not_with_another_one(
    one: EnginePod, redis_server: Server, tmp_path: Path
) -> None:
    """Without replay, only Redis knows what came before; and nothing on the wire tells the lives apart."""
    with KubeApi() as api:
        settings = {"discovery": "kubernetes", "discovery_kubeconfig": str(api.kubeconfig(tmp_path))}
        before = api.put("pods", annotated(one))

        async def scenario() -> None:
            async with replica(redis_server.url, **settings) as first:
                await until("followed", lambda: len(first.fleet.sources()) == 1)
                await connected(one.engine)
                one.engine.run_request([1] * 30)
                await until("heard", lambda: equal(first, one.engine))
                await stored(first, len(truth(one.engine)))
            async with replica(redis_server.url, name="b", **settings) as second:
                await until("warm", lambda: equal(second, one.engine))
                life = next(iter(followed(second.fleet).values()))
                api.put("pods", restarted(before))
                await until("another life", lambda: life not in followed(second.fleet).values())
                await until("followed", lambda: len(second.fleet.sources()) == 1)
                assert held(second.fleet, one.engine) == {}
            async with replica(redis_server.url, name="c", **settings) as third:
                await until("followed", lambda: len(third.fleet.sources()) == 1)
                await connected(one.restart())
                assert held(third.fleet, one.engine) == {}

        asyncio.run(scenario())


def test_a_life_that_is_over_leaves_nothing_in_redis(one: EnginePod, redis_server: Server, tmp_path: Path) -> None:
    with KubeApi() as api:
        settings = {"discovery": "kubernetes", "discovery_kubeconfig": str(api.kubeconfig(tmp_path))}
        made = api.put("pods", annotated(one))

        def lines() -> list[str]:
            known = redis_server.ask("HGETALL", "{kvindexer}:sources")
            return [text for name, text in known.items() if not name.startswith("#")]

        def buckets() -> list[str]:
            return [key for key in redis_server.ask("KEYS", "{kvindexer:*") if not key.endswith(":meta")]

        async def scenario() -> None:
            async with (
                replica(redis_server.url, **settings) as first,
                replica(redis_server.url, name="b", **settings) as second,
            ):
                both = (first, second)
                for _ in range(2):
                    await until("followed", lambda: all(each.fleet.sources() for each in both))
                    await asyncio.to_thread(one.engine.wait_for_subscribers, 2)
                    one.engine.run_request([1] * 30)
                    await until("heard", lambda: all(equal(each, one.engine) for each in both))
                    await stored(first, len(truth(one.engine)))
                    tag = shard_tag(*next(iter(first.fleet.sources().items())))
                    await until("a line", lambda: len(lines()) == 1)
                    api.delete("pods", "a")
                    await until("lost", lambda: not any(each.fleet.sources() for each in both))
                    await until("no line, no entries", lambda: lines() == buckets() == [])
                    assert redis_server.ask("HGET", f"{{kvindexer:{tag}}}:meta", "generation") is None
                    one.restart()
                    api.put("pods", restarted(made))

        asyncio.run(scenario())


def test_a_source_that_is_lost_and_found_again_in_the_same_life_is_kept_again(
    one: EnginePod, redis_server: Server, tmp_path: Path
) -> None:
    with KubeApi() as api:
        settings = {"discovery": "kubernetes", "discovery_kubeconfig": str(api.kubeconfig(tmp_path))}
        made = api.put("pods", annotated(one))

        async def scenario() -> None:
            async with replica(redis_server.url, **settings) as first:
                for prompt in range(2):
                    await until("followed", lambda: bool(first.fleet.sources()))
                    await connected(one.engine)
                    one.engine.run_request([prompt] * 30)
                    await until("stored", lambda: bool(first.fleet.reports()[0].stored))
                    await until("some entries", lambda: first.fleet.reports()[0].stored.entries > 0)  # type: ignore[union-attr]
                    api.delete("pods", "a")
                    await until("lost", lambda: not first.fleet.sources())
                    api.put("pods", made)
                    assert expected(api) is not None

        asyncio.run(scenario())


def test_a_registration_with_one_replica_takes_the_pod_over_at_all_and_gives_it_back(
    one: EnginePod, redis_server: Server, tmp_path: Path
) -> None:
    with KubeApi() as api:
        settings = {"discovery": "kubernetes", "discovery_kubeconfig": str(api.kubeconfig(tmp_path))}
        api.put("pods", annotated(one))

        async def scenario() -> None:
            async with (
                replica(redis_server.url, **settings) as first,
                replica(redis_server.url, name="b", **settings) as second,
            ):

                def everywhere(*, alive: bool) -> bool:
                    seen = [list(each.fleet.sources().values()) for each in (first, second)]
                    return all(len(specs) == 1 and bool(specs[0].life) == alive for specs in seen)

                for _ in range(2):
                    await until("found", lambda: everywhere(alive=True))
                    mine = SourceSpec(instance="mine", model="m", block_size=4, endpoint=one.engine.endpoint)
                    assert first.fleet.register(mine)
                    await until("taken over", lambda: everywhere(alive=False))
                    assert second.fleet.found == {}
                    assert second.fleet.unregister("mine") == [mine]
                await until("given back", lambda: everywhere(alive=True))
                await asyncio.to_thread(one.engine.wait_for_subscribers, 2)
                one.engine.run_request([1] * 30)
                await until("heard", lambda: equal(first, one.engine) and equal(second, one.engine))
                await stored(first, len(truth(one.engine)))

        asyncio.run(scenario())


# The directory, without I/O

SPEC = b'{"life": "u/1"}'


def found_line(directory: Directory) -> None:
    """A found source whose line was written."""
    directory.note_found("s", SPEC)
    (wish,) = directory.wanted()
    assert (wish.kind, wish.spec) == (Kind.FOUND, SPEC)
    directory.written(wish, 5)
    assert directory.wanted() == []


def test_a_line_of_a_life_that_is_over_is_not_published_again() -> None:
    directory = Directory()
    directory.note_found("s", SPEC)
    assert directory.wanted() == []  # it may stand there
    directory.merge({})
    found_line(directory)
    assert directory.merge({}) == []
    assert [(wanted.kind, wanted.generation) for wanted in directory.wanted()] == [(Kind.LOCAL, 5)]  # Redis lost it
    directory.written(directory.wanted()[0], 5)
    directory.drop("s", SPEC)
    (wish,) = directory.wanted()
    assert (wish.kind, wish.spec) == (Kind.DROPPED, SPEC)
    directory.written(wish, 6)
    assert directory.merge({}) == []
    assert directory.wanted() == []
    assert directory.generation("s") == 6


def test_what_somebody_has_registered_is_not_touched_by_what_was_found() -> None:
    directory = Directory()
    directory.merge({"s": Line(7, Kind.REGISTERED, b"{}")})
    directory.note_found("s", SPEC)
    assert directory.wanted() == []
    directory.drop("s", SPEC)
    assert directory.wanted() == []


@pytest.mark.parametrize("ends", [False, True])
def test_a_registration_that_comes_first_is_heard_by_who_wished_for_another_line(*, ends: bool) -> None:
    """Its line was there already when ours was to be written: Redis says 0, and the next look brings it."""
    directory = Directory()
    directory.merge({})
    found_line(directory) if ends else directory.note_found("s", SPEC)
    if ends:
        directory.drop("s", SPEC)
    (wish,) = directory.wanted()
    directory.written(wish, 0)
    line = Line(9, Kind.REGISTERED, b"{}")
    assert directory.merge({"s": line}) == [("s", line)]
    assert directory.wanted() == []


def test_a_registration_that_is_read_before_a_wish_is_written_is_news() -> None:
    directory = Directory()
    directory.merge({})
    found_line(directory)
    directory.drop("s", SPEC)
    line = Line(9, Kind.REGISTERED, b"{}")
    assert directory.merge({"s": line}) == [("s", line)]
    assert directory.wanted() == []


def test_the_next_life_at_a_place_takes_the_line_of_the_one_before() -> None:
    directory = Directory()
    directory.merge({"s": Line(7, Kind.LOCAL, SPEC)})
    directory.drop("s", SPEC)
    directory.note_found("s", b"next")
    assert [(wanted.kind, wanted.spec) for wanted in directory.wanted()] == [(Kind.FOUND, b"next")]


def test_what_is_found_again_has_a_line_again_once_everybody_was_told_of_the_unregistration() -> None:
    directory = Directory()
    directory.merge({"s": Line(7, Kind.REGISTERED, b"{}")})
    directory.want("s", Kind.REMOVED, b"{}")
    directory.note_found("s", SPEC)
    (wish,) = directory.wanted()
    assert wish.kind is Kind.REMOVED
    directory.written(wish, 8)
    assert [wanted.kind for wanted in directory.wanted()] == [Kind.FOUND]


def test_a_life_is_a_shard_of_its_own_and_sources_without_one_keep_theirs() -> None:
    spec = SourceSpec(instance="a", model="m", block_size=4, endpoint="tcp://h:1")
    alive = SourceSpec(instance="a", model="m", block_size=4, endpoint="tcp://h:1", life="u/1")
    assert shard_tag("tcp://h:1", spec) == "39f6b86ac1d754b0"
    assert shard_tag("tcp://h:1", alive) != shard_tag("tcp://h:1", spec)
