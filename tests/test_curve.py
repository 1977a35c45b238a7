"""CURVE: events and replays of a publisher with a key, and what a source says whose key is another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.auth import create_certificates

from kvindexer.errors import RequestError, SettingsError
from kvindexer.events.curve import Curve, open_curve
from kvindexer.events.fleet import LiveFleet
from kvindexer.events.status import SourceReport
from kvindexer.settings import Settings, load_settings
from kvindexer.settings.source import parse_source
from kvindexer.testing import FakeEngine
from kvindexer.types import SourceSpec
from live import spec_of, until, with_fleet

TOKENS = list(range(64))


def keys() -> tuple[str, bytes]:
    """A publisher's public key, and its secret one."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret


def report(fleet: LiveFleet) -> SourceReport:
    (only,) = fleet.reports()
    return only


def blocks(fleet: LiveFleet) -> int:
    return sum(report(fleet).blocks)


def test_events_and_replays_of_a_publisher_with_a_key_arrive() -> None:
    """What was published before comes by replay, what is published now by subscription."""
    public, secret = keys()
    with FakeEngine(curve_secret_key=secret) as engine:
        engine.run_request(TOKENS)

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine, curve_server_key=public))
            await until("replayed", lambda: blocks(fleet) == 4)
            engine.run_request([token + 1000 for token in TOKENS])
            await until("live", lambda: blocks(fleet) == 8)
            assert report(fleet).state == "live"
            assert engine.replay_requests

        with_fleet(scenario)


def test_our_own_pair_is_what_the_publisher_may_know_us_by(tmp_path: Path) -> None:
    create_certificates(tmp_path, "ours")
    path = tmp_path / "ours.key_secret"
    public, secret = keys()
    with FakeEngine(curve_secret_key=secret) as engine:
        engine.run_request(TOKENS)

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine, curve_server_key=public))
            await until("replayed", lambda: blocks(fleet) == 4)

        with_fleet(scenario, curve_secret_key_file=path)
    own = open_curve(path)._own
    assert own is not None
    assert f'public-key = "{own.public.decode()}"' in (tmp_path / "ours.key").read_text()


@pytest.mark.parametrize(
    ("engine_has", "source_has", "said"),
    [
        ("a key", "another", "another key than curve_server_key"),
        ("a key", None, "one side speaks CURVE"),
        (None, "a key", "one side speaks CURVE"),
    ],
)
def test_a_source_whose_key_does_not_fit_says_so_and_takes_nothing(
    engine_has: str | None, source_has: str | None, said: str
) -> None:
    """Neither over the subscription nor by replay; and it is well once the key is right."""
    public, secret = keys()
    other, _ = keys()
    with FakeEngine(curve_secret_key=secret if engine_has else None) as engine:
        engine.run_request(TOKENS)

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine, curve_server_key=other if source_has else None))
            await until("told", lambda: said in report(fleet).why)
            engine.run_request([token + 1000 for token in TOKENS])
            await asyncio.sleep(0.3)  # long enough for an event to arrive that must not
            assert report(fleet).state != "live"
            assert not blocks(fleet)
            fleet.unregister("pod-a")
            fleet.register(spec_of(engine, curve_server_key=public if engine_has else None))
            await until("well", lambda: blocks(fleet) == 8)
            assert report(fleet).why == "live"

        with_fleet(scenario)


def test_a_publisher_that_comes_back_with_another_key_is_not_believed() -> None:
    """Whoever takes the place of an engine has not its secret key."""
    public, secret = keys()
    with FakeEngine(curve_secret_key=secret) as engine:
        engine.run_request(TOKENS)

        async def scenario(fleet: LiveFleet) -> None:
            fleet.register(spec_of(engine, curve_server_key=public))
            await until("live", lambda: report(fleet).state == "live" and blocks(fleet) == 4)
            engine.publisher._curve_secret_key = keys()[1]
            engine.publisher.rebind()
            await until("told", lambda: "another key" in report(fleet).why)
            engine.publisher._curve_secret_key = secret
            engine.publisher.rebind()
            await until("well", lambda: "key" not in report(fleet).why)

        with_fleet(scenario)


def test_a_key_that_is_forgotten_is_not_expected_any_more() -> None:
    curve, (public, _) = Curve(), keys()
    curve.expect("tcp://x", public)
    assert curve.expects("tcp://x")
    curve.forget("tcp://x")
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        curve.secure(socket, "tcp://x")
        assert socket.getsockopt(zmq.MECHANISM) == zmq.NULL


def test_publishers_that_dial_in_prove_nothing_by_a_key() -> None:
    endpoint = "tcp://127.0.0.1:45671"

    async def scenario(fleet: LiveFleet) -> None:
        spec = SourceSpec(
            instance="pod-a", model="m", block_size=16, endpoint=endpoint, topic="t", curve_server_key=keys()[0]
        )
        with pytest.raises(RequestError, match="dial in") as caught:
            fleet.register(spec)
        assert caught.value.code == "curve_not_there"
        assert not fleet.reports()

    with_fleet(scenario, bind_endpoints=(endpoint,))


@pytest.mark.parametrize("key", ["", "x", "x" * 41, "x" * 39 + " ", '"' * 40])
def test_what_is_no_key_is_refused(key: str) -> None:
    text = f"instance=pod-a,model=m,block_size=16,endpoint=tcp://a:1,curve_server_key={key}"
    with pytest.raises(SettingsError) as caught:
        parse_source(text)
    assert caught.value.key == "source.curve_server_key"


def test_every_key_can_be_written_in_a_flag() -> None:
    for _ in range(50):
        public, _ = keys()
        text = f"instance=pod-a,model=m,block_size=16,endpoint=tcp://a:1,curve_server_key={public}"
        assert parse_source(text).curve_server_key == public


@pytest.mark.parametrize("content", [None, "", "curve\n", 'curve\n    public-key = "x"\n', "secret"])
def test_a_file_that_is_no_key_pair_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys"
    if content == "secret":
        create_certificates(tmp_path, "ours")
        path = tmp_path / "ours.key"
    elif content is not None:
        path.write_text(content)
    chosen: dict[str, Any] = {"curve_secret_key_file": str(path)}
    settings: Settings = load_settings(None, chosen, {})
    with pytest.raises(SettingsError) as caught:
        open_curve(settings.curve_secret_key_file)
    assert caught.value.key == "curve_secret_key_file"
