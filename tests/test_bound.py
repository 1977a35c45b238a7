"""Engines that dial in to us: told apart by topic and rank, and only where a setting allows it."""

from __future__ import annotations

import socket

import pytest

from kvindexer.errors import RequestError
from kvindexer.events.fleet import LiveFleet
from kvindexer.testing import FakeEngine, PoolShape
from kvindexer.types import SourceSpec
from live import free_endpoint, truth, until, with_fleet

SMALL = PoolShape(num_blocks=40, block_size=4)


def dialling(endpoint: str, topic: str, rank: int = 0, *, seed: int = 0) -> FakeEngine:
    """An engine whose publisher connects to us."""
    return FakeEngine(pool=SMALL, endpoint=endpoint, connect=True, topic=topic, rank=rank, hash_seed=seed)


def spec(endpoint: str, engine: FakeEngine, topic: str, rank: int = 0) -> SourceSpec:
    return SourceSpec(
        instance=topic,
        model="m",
        block_size=4,
        endpoint=endpoint,
        replay=engine.replay_endpoint,
        topic=topic,
        rank=rank,
    )


def held(fleet: LiveFleet, source: str) -> dict[tuple[int, int], int]:
    return {(group, value): n for (_, group, _, _, value), n in fleet.index.copies(source).items()}


async def follows(fleet: LiveFleet, source: str, engine: FakeEngine) -> None:
    await until("index equals the engine's cache", lambda: held(fleet, source) == truth(engine))
    assert held(fleet, source)


def test_trap_5_engines_that_dial_in_are_told_apart_by_topic_and_rank() -> None:
    """Two pods, one of them with two ranks under one topic, through one bound socket: each has its own blocks."""
    endpoint = free_endpoint()
    with (
        dialling(endpoint, "kv@pod-a@m", seed=1) as one,
        dialling(endpoint, "kv@pod-b@m", 0, seed=2) as two,
        dialling(endpoint, "kv@pod-b@m", 1, seed=3) as three,
    ):
        engines = {("kv@pod-a@m", 0): one, ("kv@pod-b@m", 0): two, ("kv@pod-b@m", 1): three}

        async def scenario(fleet: LiveFleet) -> None:
            for (topic, rank), engine in engines.items():
                assert fleet.register(spec(endpoint, engine, topic, rank))
            for number, engine in enumerate(engines.values()):
                for request in range(20):
                    engine.run_request([number, request] * 10, max_tokens=2)
            for (topic, rank), engine in engines.items():
                await follows(fleet, f"{endpoint}#{topic}#{rank}", engine)
            assert [fleet.status(topic)[:3] for topic, _ in engines] == [("live", True, True)] * 3

        with_fleet(scenario, bind_endpoints=(endpoint,))


def test_an_engine_that_nobody_registered_adds_nothing() -> None:
    endpoint = free_endpoint()
    with dialling(endpoint, "known") as known, dialling(endpoint, "stranger", seed=1) as stranger:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec(endpoint, known, "known"))
            stranger.run_request([7] * 40)
            known.run_request([8] * 40)
            await follows(fleet, f"{endpoint}#known#0", known)
            assert [report.source for report in fleet.reports()] == [f"{endpoint}#known#0"]

        with_fleet(scenario, bind_endpoints=(endpoint,))


def test_a_source_of_a_bound_endpoint_needs_a_topic() -> None:
    endpoint = free_endpoint()

    async def scenario(fleet: LiveFleet) -> None:
        with pytest.raises(RequestError, match="told apart by their topics"):
            fleet.register(SourceSpec(instance="a", model="m", block_size=4, endpoint=endpoint))
        assert fleet.reports() == []

    with_fleet(scenario, bind_endpoints=(endpoint,))


def test_without_the_setting_nothing_is_bound() -> None:
    """The same registration dials, as it does everywhere else; the topic is only a filter then."""
    endpoint = free_endpoint()

    async def scenario(fleet: LiveFleet) -> None:
        fleet.register(SourceSpec(instance="a", model="m", block_size=4, endpoint=endpoint, topic="t"))
        assert [report.source for report in fleet.reports()] == [endpoint]

    with_fleet(scenario)
    with socket.create_server(("127.0.0.1", int(endpoint.rpartition(":")[2]))):
        pass
