"""deploy/compose, as far as it can be read without Docker: it fits together, and with the settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kvindexer.settings import Settings, load_settings
from servers import Server

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "compose"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
REPLICAS = sorted(name for name in SERVICES if name.startswith("replica"))
BALANCER = (FOLDER / "haproxy.cfg").read_text()


def settings_of(service: str) -> Settings:
    """The settings that a container would start with."""
    return load_settings(None, {}, {name: str(value) for name, value in SERVICES[service]["environment"].items()})


def test_there_are_three_replicas_of_one_image_that_know_themselves_apart() -> None:
    assert len(REPLICAS) == 3
    settings = [settings_of(name) for name in REPLICAS]
    assert [one.replica for one in settings] == REPLICAS
    assert {SERVICES[name]["image"] for name in REPLICAS} == {SERVICES[REPLICAS[0]]["image"]}
    for one in settings:
        assert str(one.store) == "redis://redis:6379"
        assert one.host == "0.0.0.0"  # noqa: S104 - in a container that publishes nothing


def test_every_service_that_is_named_is_there() -> None:
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= SERVICES.keys()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (FOLDER / source).is_file()


def test_the_balancer_asks_every_replica_whether_it_is_ready() -> None:
    port = Settings().port
    assert re.findall(r"^ +server (\S+) (\S+)$", BALANCER, re.MULTILINE) == [
        (name, f"{name}:{port}") for name in REPLICAS
    ]
    assert "http-check send meth GET uri /ready" in BALANCER
    assert "http-check expect status 200" in BALANCER
    (published,) = SERVICES["balancer"]["ports"]
    assert f"bind :{published.rpartition(':')[2]}\n" in BALANCER
    for name in REPLICAS:
        assert f"http://127.0.0.1:{port}/ready" in SERVICES[name]["healthcheck"]["test"][-1]


def test_a_replica_gets_the_time_to_leave_and_the_balancer_sees_it() -> None:
    for name in REPLICAS:
        settings = settings_of(name)
        grace_s = float(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        assert grace_s > settings.drain_s + 2 * settings.shutdown_grace_s
        found = re.search(r"check inter (\d+)ms fall (\d+)", BALANCER)
        assert found
        assert settings.drain_s * 1000 > 2 * int(found[1]) * int(found[2])


def test_the_store_keeps_what_it_has() -> None:
    """A real server takes the options: what is written lasts, nothing is evicted, small hashes stay compact."""
    words = SERVICES["redis"]["command"].split()[1:]
    options = [f"{name.removeprefix('--')} {value}" for name, value in zip(words[::2], words[1::2], strict=True)]
    expected = {
        "maxmemory-policy": "noeviction",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "hash-max-listpack-entries": "128",
        "hash-max-listpack-value": "64",
    }
    with Server(*options) as server:
        for name, value in expected.items():
            assert f"{name} {value}" in options
            assert server.ask("CONFIG", "GET", name) == [name, value]
