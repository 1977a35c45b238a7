"""Open files: nothing is said of a limit that nobody comes near, and one line before sources reach it."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator

import pytest

from kvindexer.cli import main
from kvindexer.events.descriptors import DESCRIPTORS_A_SOURCE, SPARE_DESCRIPTORS, room_in, shortage
from kvindexer.events.fleet import LiveFleet
from kvindexer.settings import Settings
from kvindexer.types import SourceSpec
from live import with_fleet

CONNECTIONS = 16
ROOM = 10
ALLOWED = SPARE_DESCRIPTORS + CONNECTIONS + DESCRIPTORS_A_SOURCE * ROOM


def spec(number: int) -> SourceSpec:
    return SourceSpec(instance=f"pod-{number}", model="m", block_size=16, endpoint=f"tcp://127.0.0.1:{number + 1}")


@pytest.fixture
def few() -> Iterator[None]:
    """The process may open enough for ten sources."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (ALLOWED, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_room_is_what_is_left_beside_callers() -> None:
    settings = Settings(max_connections=CONNECTIONS)
    assert room_in(ALLOWED, settings) == ROOM
    assert room_in(100, settings) == 0
    assert room_in(resource.RLIM_INFINITY, settings) == settings.max_sources
    assert room_in(10**9, settings) == settings.max_sources


def test_a_limit_is_short_only_for_what_is_named_or_asked_for() -> None:
    """The default of max_sources is no plan; 20,000 files are plenty for a small fleet."""
    assert shortage(Settings(), 20_000) == ""
    few = tuple(spec(number) for number in range(8))
    assert shortage(Settings(max_connections=CONNECTIONS, sources=few), ALLOWED) == ""
    many = (*few, spec(8))
    said = shortage(Settings(max_connections=CONNECTIONS, sources=many), ALLOWED)
    assert said.startswith(f"9 sources are configured, and {ALLOWED} open files are enough for about 10: ")
    assert "ulimit -n" in said
    said = shortage(Settings(max_connections=CONNECTIONS, max_sources=11), ALLOWED)
    assert said.startswith("max_sources=11 is asked for, and ")
    assert shortage(Settings(max_connections=CONNECTIONS, max_sources=10, sources=many), ALLOWED) == ""


@pytest.mark.usefixtures("few")
def test_sources_that_come_near_the_limit_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """And again if they had become few meanwhile."""
    caplog.set_level(logging.WARNING, "kvindexer.events.descriptors")
    said: list[int] = []

    async def scenario(fleet: LiveFleet) -> None:
        def come(first: int, last: int) -> None:
            for number in range(first, last):
                fleet.register(spec(number))
            said.append(len(caplog.records))

        come(0, 8)
        come(8, 10)
        come(10, 12)
        for number in range(4, 12):
            fleet.unregister(f"pod-{number}")
        come(12, 18)

    with_fleet(scenario, max_connections=CONNECTIONS)
    assert said == [0, 1, 1, 2]
    assert caplog.messages[0].startswith(
        f"9 sources are followed, and {ALLOWED} open files are enough for about 10: "
    )


def test_the_check_of_settings_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("nothing is short here")
    most = min(2**31 - 1, hard)
    assert main(["config", "check", "--set", f"max_sources={most}"]) == 0
    assert f"warn: setting max_sources: max_sources={most} is asked for" in capsys.readouterr().err
    assert main(["config", "check"]) == 0
    assert capsys.readouterr().err == ""
