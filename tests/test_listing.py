"""Engines registered by their HTTP address alone: they list their publishers themselves (vLLM 0.31 and newer)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvindexer.api.identities import Identities
from kvindexer.errors import ConflictError, RequestError
from kvindexer.events import listing
from kvindexer.events.fleet import LiveFleet
from kvindexer.testing import FakeEngine, PoolShape
from kvindexer.types import SourceSpec
from live import agrees, until, with_fleet

SMALL = PoolShape(num_blocks=40, block_size=4)


class Server(ThreadingHTTPServer):
    """An engine's HTTP server, as far as it matters here."""

    answer: bytes = b"{}"
    status = 200


class Handler(BaseHTTPRequestHandler):
    """Answers GET /kv_event_sources."""

    server: Server

    def do_GET(self) -> None:
        found = self.path == listing.PATH
        self.send_response(self.server.status if found else 404)
        self.end_headers()
        self.wfile.write(self.server.answer if found else b"")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def engine_server() -> Iterator[tuple[Server, str]]:
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def listed(*engines: FakeEngine) -> bytes:
    return json.dumps(
        {
            str(rank): {"endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint, "topic": ""}
            for rank, engine in enumerate(engines)
        }
    ).encode()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "RETRY_S", 0.05)
    monkeypatch.setattr(listing, "REFRESH_S", 0.05)


def spec(url: str) -> SourceSpec:
    return SourceSpec(instance="pod-a", model="m", block_size=4, endpoint=url)


def test_every_rank_that_the_engine_lists_is_followed() -> None:
    with FakeEngine(pool=SMALL) as one, FakeEngine(pool=SMALL, rank=1) as two, engine_server() as (server, url):
        server.answer = listed(one, two)

        async def scenario(fleet: LiveFleet) -> None:
            assert fleet.register(spec(url))
            assert not fleet.register(spec(url))
            one.run_request([1] * 30)
            two.run_request([2] * 30)
            await until("both ranks are registered", lambda: len(fleet.reports()) == 2)
            await agrees(fleet, one)
            await agrees(fleet, two)
            assert {report.spec.rank for report in fleet.reports()} == {0, 1}
            assert fleet.unregister("pod-a") == [spec(url)]
            assert fleet.reports() == []

        with_fleet(scenario)


def test_an_engine_that_is_not_up_yet_is_asked_until_it_is() -> None:
    """Its state says why meanwhile, and it holds up readiness only until the deadline."""
    with FakeEngine(pool=SMALL) as engine, engine_server() as (server, url):
        server.status = 503

        async def scenario(fleet: LiveFleet) -> None:
            await until("the reason is shown", lambda: "503" in fleet.reports()[0].why)
            assert (fleet.reports()[0].state, fleet.ready) == ("syncing", False)
            server.answer, server.status = listed(engine), 200
            engine.run_request([1] * 30)
            await until("followed", lambda: fleet.reports()[0].source == engine.endpoint)
            await agrees(fleet, engine)
            await until("ready", lambda: fleet.ready)

        with_fleet(scenario, sources=(spec(url),))


def test_trap_18_an_engine_that_comes_back_on_other_ports_is_followed_there() -> None:
    with FakeEngine(pool=SMALL) as old, FakeEngine(pool=SMALL, hash_seed=1) as new, engine_server() as (server, url):
        server.answer = listed(old)

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec(url))
            old.run_request([1] * 30)
            await until("followed", lambda: fleet.reports()[0].source == old.endpoint)
            await agrees(fleet, old)
            server.answer = listed(new)
            new.run_request([2] * 30)
            await until("moved", lambda: [report.source for report in fleet.reports()] == [new.endpoint])
            await agrees(fleet, new)
            server.status = 500  # while it does not answer, its sources stay
            new.run_request([3] * 30)
            await agrees(fleet, new)

        with_fleet(scenario)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"x": {"endpoint": "tcp://h:1"}}',
        b'{"0": {"endpoint": 5}}',
        b'{"0": {}}',
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_no_list_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a list of publishers"):
        listing.publishers(spec("http://10.0.0.7:8000"), body)


def test_a_wildcard_means_the_engines_own_host() -> None:
    body = b'{"1": {"endpoint": "tcp://*:5558", "replay_endpoint": "tcp://0.0.0.0:5658", "topic": "t"}}'
    (found,) = listing.publishers(spec("http://10.0.0.7:8000"), body)
    assert (found.endpoint, found.replay, found.topic, found.rank) == (
        "tcp://10.0.0.7:5558",
        "tcp://10.0.0.7:5658",
        "t",
        1,
    )


def test_addresses_that_no_setting_allows_are_not_asked() -> None:
    async def scenario(fleet: LiveFleet) -> None:
        with pytest.raises(RequestError, match="may not be dialled"):
            fleet.register(spec("http://10.0.0.7:8000"))
        assert fleet.reports() == []

    with_fleet(scenario, allowed_endpoints=("tcp://*",))


def test_one_address_has_one_registration() -> None:
    with engine_server() as (_, url):

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec(url))
            with pytest.raises(ConflictError):
                fleet.register(SourceSpec(instance="pod-b", model="m", block_size=4, endpoint=url))

        with_fleet(scenario)


def test_trap_13_the_address_of_a_listing_names_its_instance() -> None:
    """Also before the engine has listed anything, and no longer once it is unregistered."""
    with FakeEngine(pool=SMALL) as engine, engine_server() as (server, url):
        server.status = 503
        family = ("default", "m", None)

        async def scenario(fleet: LiveFleet) -> None:
            names = Identities(fleet)

            def unknown(name: str) -> bool:
                return bool(names.resolve([name], family, {"pod-a"}).unknown)

            assert unknown(url)
            fleet.register(spec(url))
            address = url.removeprefix("http://")
            assert not unknown(url)
            server.answer, server.status = listed(engine), 200
            await until("followed", lambda: fleet.reports()[0].source == engine.endpoint)
            assert not any(unknown(name) for name in (url, f"{url}/v1", address, "127.0.0.1"))
            assert not unknown(engine.endpoint)
            assert unknown("127.0.0.1:1")
            assert [status.state for status in fleet.each_status(["pod-a", "nobody"])] == [
                fleet.status("pod-a").state,
                "gone",
            ]
            fleet.unregister("pod-a")
            assert all(unknown(name) for name in (url, address, "127.0.0.1", engine.endpoint))

        with_fleet(scenario)
