"""Changes of a real fleet over real sockets: followers and the index agree, through lives, replays and replicas."""

from __future__ import annotations

import asyncio
import random

from kvindexer.events.fleet import LiveFleet
from kvindexer.index.records import read
from kvindexer.settings import Settings
from kvindexer.testing import FakeEngine, PoolShape
from live import agrees, connected, spec_of, until, with_fleet
from replicas import replica
from servers import Server
from test_changes import Content, Service, View

SMALL = PoolShape(num_blocks=40, block_size=4)


class Following(Service):
    """A view's service, of which the index and the log are those of a fleet."""

    def __init__(self, fleet: LiveFleet) -> None:
        self.fleet = fleet
        self.index, self.log = fleet.index, fleet.changes  # type: ignore[assignment]  # the view asks for no more

    @property
    def content(self) -> Content:
        found: Content = {}
        for source, spec in self.fleet.sources().items():
            hashes = self.index.hashes(source)
            records = (read(packed, spec.block_size) for packed in self.index.records(source, hashes))
            found[source] = {
                block_hash: (record.key, record.block_size, frozenset(name for name, _ in record.spots))
                for block_hash, record in zip(hashes, records, strict=True)
                if record.spots
            }
        return found


def traffic(engine: FakeEngine, requests: int, seed: int = 0) -> None:
    dice = random.Random(seed)
    for _ in range(requests):
        engine.run_request([dice.randrange(30) for _ in range(dice.randrange(4, 30))], max_tokens=2)
    engine.publisher.flush()


def in_step(view: View, service: Service) -> bool:
    view.hear_all()
    return view.blocks == service.content


def test_a_follower_of_a_live_fleet_is_in_step_through_traffic_restarts_and_replays() -> None:
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            view, service = View(), Following(fleet)
            view.connect(service)
            traffic(engine, 20)
            await agrees(fleet, engine)
            assert in_step(view, service)
            engine.restart()
            traffic(engine, 5, seed=1)
            await agrees(fleet, engine)
            assert in_step(view, service)
            assert any(view.blocks.values())
            traffic(engine, 5, seed=2)
            await agrees(fleet, engine)
            assert in_step(view, service)
            assert "reset" not in str(view.told)

        with_fleet(scenario)


def test_a_position_holds_on_a_replica_that_was_warmed_from_the_store(redis_server: Server) -> None:
    """It has loaded what the first one has heard, so nothing has to be told again."""

    async def scenario(engine: FakeEngine) -> None:
        async with replica(redis_server.url, "a") as one:
            one.fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 20)
            await agrees(one.fleet, engine)
            await until("proven", lambda: one.flags(engine.endpoint) == ("live", True, True))
            view, service = View(), Following(one.fleet)
            view.connect(service)
            assert in_step(view, service)
            await until("written", lambda: one.fleet.reports()[0].stored is not None)
            async with replica(redis_server.url, "b") as two:
                await agrees(two.fleet, engine)
                await until("proven", lambda: two.flags(engine.endpoint) == ("live", True, True))
                view.disconnect(service)
                service = Following(two.fleet)
                view.connect(service)
                assert in_step(view, service)
                assert "reset" not in str(view.told)
                traffic(engine, 5, seed=3)
                await agrees(two.fleet, engine)
                assert in_step(view, service)
                assert set(view.told) <= {f"blocks {engine.endpoint}"}

    with FakeEngine(pool=SMALL) as engine:
        asyncio.run(scenario(engine))


def test_settings_bound_what_a_fleet_keeps() -> None:
    with FakeEngine(pool=SMALL) as engine:

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine))
            await connected(engine)
            traffic(engine, 50)
            await agrees(fleet, engine)
            assert 0 < fleet.changes._bytes <= 1000

        with_fleet(scenario, changes_max_bytes=1000)
    assert Settings().changes_max_bytes > 1000
