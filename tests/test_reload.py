"""SIGHUP: sources, tokens and log level are changed while a real service answers; what did not change goes on."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvindexer.commands.client import OPEN, WayIn, call
from kvindexer.commands.failure import CommandError
from kvindexer.errors import ConflictError
from kvindexer.events.configured import difference
from kvindexer.events.sources import Registry
from kvindexer.testing import FakeEngine
from kvindexer.types import SourceSpec
from live import spec_of, with_fleet
from served import HOST, Served

PATIENCE_S = 30.0
LINE = "configuration read again: "
REFUSED = "configuration not read again, all goes on as before: "


def eventually(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Configured:
    """A service and its file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "kvindexer.yaml"
        self.settings: dict[str, Any] = {"drain_s": 0, "probe_interval_s": 0.3, "sources": []}
        self.way = OPEN
        self.service = Served(folder, "reloading", "--config", str(self.file))

    def write(self, **changes: Any) -> None:
        self.settings |= changes
        self.file.write_text(yaml.safe_dump(self.settings))

    def reload(self, text: str | None = None, **changes: Any) -> str:
        """Write the file, send the signal, and wait for what the log says about it."""
        if text is None:
            self.write(**changes)
        else:
            self.file.write_text(text)
        before = len(self.said())
        self.service.tell(signal.SIGHUP)
        eventually("a line about the signal", lambda: len(self.said()) > before)
        (line,) = self.said()[before:]
        return line

    def said(self) -> list[str]:
        return re.findall(rf"((?:INFO|WARNING|ERROR) \S+ (?:{LINE}|{REFUSED}).*)\n", self.service.log)

    def sources(self) -> dict[str, dict[str, Any]]:
        return {source["source"]: source for source in call(self.service.url, "/v1/sources", way=self.way)["sources"]}

    def live(self, *engines: FakeEngine) -> bool:
        found = self.sources()
        return set(found) == {engine.endpoint for engine in engines} and all(
            source["state"] == "live" for source in found.values()
        )

    def register(self, instance: str, port: int) -> None:
        body = {"modelname": "m", "type": "vLLM", "block_size": 4, "instance_id": instance}
        call(self.service.url, "/register", {**body, "endpoint": f"tcp://127.0.0.1:{port}"})

    def metric(self, name: str) -> float:
        connection = HTTPConnection(HOST, self.service.port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        (value,) = re.findall(rf"^kvindexer_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(value)


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Configured]:
    made = Configured(tmp_path)
    yield made
    made.service.close()


@pytest.fixture
def engines() -> Iterator[tuple[FakeEngine, FakeEngine, FakeEngine]]:
    with FakeEngine() as one, FakeEngine() as two, FakeEngine() as three:
        yield one, two, three


def entry(engine: FakeEngine, instance: str, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"instance": instance, "model": "m", "block_size": engine.shape.block_size}
    return {**values, "endpoint": engine.endpoint, "replay": engine.replay_endpoint, **more}


def registration(engine: FakeEngine, instance: str) -> dict[str, Any]:
    sizes = {"block_size": engine.shape.block_size, "modelname": "m", "type": "vLLM"}
    return {**sizes, "endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint, "instance_id": instance}


def test_sources_come_go_and_change_and_the_others_keep_their_streams(
    configured: Configured, engines: tuple[FakeEngine, FakeEngine, FakeEngine]
) -> None:
    """What did not change is not synchronised anew: the same epoch, no replay more, and its batches go on."""
    kept, changed, added = engines
    configured.write(sources=[entry(kept, "kept"), entry(changed, "changed")])
    configured.service.start()
    kept.run_request(list(range(64)))
    eventually("both live", lambda: configured.live(kept, changed) and configured.sources()[kept.endpoint]["batches"])
    before = configured.sources()[kept.endpoint]

    line = configured.reload(sources=[entry(kept, "kept"), entry(changed, "renamed"), entry(added, "added")])
    assert line.endswith(f"{LINE}sources: 1 added, 0 removed, 1 changed")
    eventually("all live", lambda: configured.live(kept, changed, added))
    kept.run_request(list(range(1000, 1064)))
    eventually("events go on", lambda: configured.sources()[kept.endpoint]["batches"] > before["batches"])
    after = configured.sources()
    assert {name: after[kept.endpoint][name] for name in ("epoch", "gaps", "sound")} == {
        name: before[name] for name in ("epoch", "gaps", "sound")
    }
    assert sum(after[kept.endpoint]["blocks"].values()) > sum(before["blocks"].values()) > 0
    assert f"source unregistered source={kept.endpoint}" not in configured.service.log
    assert f"source unregistered source={changed.endpoint} " in configured.service.log
    assert after[changed.endpoint]["instance"] == "renamed"

    line = configured.reload(sources=[entry(kept, "kept")])
    assert line.endswith(f"{LINE}sources: 0 added, 2 removed, 0 changed")
    assert set(configured.sources()) == {kept.endpoint}
    assert configured.metric('config_reloads_total{outcome="applied"}') == 2
    assert configured.metric("config_reload_successful") == 1


def test_what_others_registered_stays(
    configured: Configured, engines: tuple[FakeEngine, FakeEngine, FakeEngine]
) -> None:
    """Also where the settings named it too; what contradicts it is told, and tried again the next time."""
    http, both, third = engines
    configured.write(sources=[entry(both, "both")])
    configured.service.start()
    call(configured.service.url, "/register", registration(http, "http"))
    call(configured.service.url, "/register", registration(both, "both"))
    line = configured.reload(sources=[])
    assert line.endswith("sources: 0 added, 1 removed, 0 changed")
    assert set(configured.sources()) == {http.endpoint, both.endpoint}

    line = configured.reload(sources=[entry(http, "other"), entry(third, "third")])
    assert "WARNING" in line
    assert line.endswith("sources: 2 added, 0 removed, 0 changed; 1 of them not followed")
    assert f"source {http.endpoint} of the configuration is not followed: " in configured.service.log
    assert configured.sources()[http.endpoint]["instance"] == "http"
    assert third.endpoint in configured.sources()
    assert configured.metric('config_reloads_total{outcome="partial"}') == 1
    assert configured.metric("config_reload_successful") == 0

    call(configured.service.url, "/unregister", {"instance_id": "http", "modelname": "m", "type": "vLLM"})
    assert configured.reload().endswith("sources: 1 added, 0 removed, 0 changed")
    assert configured.sources()[http.endpoint]["instance"] == "other"
    assert configured.metric("config_reload_successful") == 1


TWO_FOR_ONE = """
log_level: debug
sources:
- {instance: a, model: m, block_size: 4, endpoint: 'tcp://10.0.0.1:1'}
- {instance: a, model: m, block_size: 4, endpoint: 'tcp://10.0.0.2:1'}
"""
NOT_ALLOWED = """
allowed_endpoints: ['tcp://*', 'ipc://*']
sources: [{instance: a, model: m, block_size: 4, endpoint: 'ipc:///run/a'}]
"""
BROKEN = (
    ("sources: [", "is not usable, expected YAML"),
    ("log_level: loud", "setting log_level: 'loud' is not usable"),
    ("log_level: debug\nsource: []", "did you mean sources"),
    (TWO_FOR_ONE, "instance 'a' rank 0 of 'm' publishes at tcp://10.0.0.1:1"),
    (NOT_ALLOWED, "changed as well, but needs a restart first: allowed_endpoints, drain_s, probe_interval_s"),
)


def test_a_file_that_cannot_be_used_changes_nothing(configured: Configured) -> None:
    """One line says why; log level and sources are as they were."""
    endpoint = "tcp://127.0.0.1:9"
    configured.write(sources=[{"instance": "a", "model": "m", "block_size": 4, "endpoint": endpoint}])
    configured.service.start()
    configured.reload()
    for number, (text, words) in enumerate(BROKEN, 1):
        log = configured.service.log
        line = configured.reload(text)
        assert line.startswith("ERROR")
        assert REFUSED in line
        assert words in line
        assert set(configured.sources()) == {endpoint}
        assert configured.service.log[len(log) :].count("\n") == 1
        assert configured.metric('config_reloads_total{outcome="refused"}') == number
        assert configured.metric("config_reload_successful") == 0
    configured.file.unlink()
    configured.service.tell(signal.SIGHUP)
    eventually("the file is missed", lambda: "a readable file (No such file" in configured.service.log)
    assert configured.reload(configured_again(configured)).endswith("sources: 0 added, 0 removed, 0 changed")
    assert configured.metric("config_reload_successful") == 1


def configured_again(configured: Configured) -> str:
    return yaml.safe_dump(configured.settings)


def test_the_log_level_changes_and_what_needs_a_restart_is_named_without_its_value(configured: Configured) -> None:
    configured.write(log_level="info")
    configured.service.start()
    line = configured.reload(log_level="debug", tokenizer_api_key="secret-7f", max_sources=7)
    assert line.endswith("0 changed; log level debug; needs a restart: max_sources, tokenizer_api_key")
    assert "WARNING" in line
    assert "secret-7f" not in configured.service.log
    line = configured.reload(log_level="error", tokenizer_api_key=None, max_sources=4096)
    assert "WARNING" not in line
    assert line.endswith("0 changed; log level error")
    said = configured.service.log
    configured.register("a", 1)
    assert configured.service.log == said
    assert "log level info" in configured.reload(log_level="info")
    configured.register("b", 2)
    assert "source registered source=tcp://127.0.0.1:2 " in configured.service.log


def test_tokens_are_read_again_and_a_broken_file_of_them_changes_nothing(
    configured: Configured, tmp_path: Path
) -> None:
    """Neither the tokens nor the sources that were to change with them."""
    file = tmp_path / "tokens.yaml"
    file.touch(0o600)
    file.write_text(tokens_of("first"))
    configured.write(auth_tokens_file=str(file))
    configured.service.start()
    configured.way = WayIn(token_of("first"))
    assert configured.sources() == {}
    file.write_text(tokens_of("second"))
    assert configured.reload().endswith("sources: 0 added, 0 removed, 0 changed")
    with pytest.raises(CommandError, match="unauthenticated"):
        configured.sources()
    configured.way = WayIn(token_of("second"))
    assert configured.sources() == {}
    file.write_text("tokens: [")
    source = {"instance": "a", "model": "m", "block_size": 4, "endpoint": "tcp://127.0.0.1:9"}
    line = configured.reload(sources=[source])
    assert REFUSED in line
    assert "auth_tokens_file" in line
    assert configured.sources() == {}
    file.write_text(tokens_of("second"))
    assert "1 added" in configured.reload()
    assert set(configured.sources()) == {"tcp://127.0.0.1:9"}
    assert token_of("first") not in configured.service.log


def token_of(name: str) -> str:
    return f"{name}-0123456789abcdef"


def tokens_of(name: str) -> str:
    return yaml.safe_dump({"tokens": [{"name": name, "token": token_of(name), "roles": ["admin"]}]})


def test_no_query_fails_while_sources_come_and_go(configured: Configured) -> None:
    """Connections that are kept busy all through ten reloads of a hundred sources lose no request."""
    many = [
        {"instance": f"pod-{n}", "model": "m", "block_size": 4, "endpoint": f"tcp://127.0.0.1:{20000 + n}"}
        for n in range(100)
    ]
    configured.write(sources=many[:1])
    configured.service.start()
    body = b'{"model": "m", "tokens": [1, 2, 3, 4]}'
    answers: list[int] = []
    done = threading.Event()

    def client() -> None:
        connection = HTTPConnection(HOST, configured.service.port)
        while not done.is_set():
            connection.request("POST", "/v1/match", body)
            answer = connection.getresponse()
            answer.read()
            answers.append(answer.status)
        connection.close()

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    try:
        for turn in range(10):
            configured.reload(sources=many if turn % 2 == 0 else many[:1])
    finally:
        done.set()
        for one in clients:
            one.join()
    assert len(answers) > 100
    assert set(answers) == {200}
    assert set(configured.sources()) == {many[0]["endpoint"]}


def test_a_signal_before_the_service_runs_is_not_lost_and_does_not_end_it(configured: Configured) -> None:
    """Sent from the first moment on, again and again, while the service starts."""
    configured.write()
    stop = threading.Event()

    def hang_up() -> None:
        while not stop.is_set():
            process = configured.service._process
            status = Path(f"/proc/{process.pid}/status").read_text() if process is not None else ""
            caught = re.search(r"^SigCgt:\s+(\w+)$", status, re.MULTILINE)
            if caught and int(caught[1], 16) & 1:  # it has its handler, so it takes them from here on
                configured.service.tell(signal.SIGHUP)
                return

    sender = threading.Thread(target=hang_up)
    sender.start()
    try:
        configured.service.start()
        eventually("the signal is answered", configured.said)
    finally:
        stop.set()
        sender.join()


def test_a_removed_engine_that_lists_its_publishers_takes_them_along() -> None:
    """Beside real sockets: a listing of the settings has a name of its own, and can be given up."""
    listing = SourceSpec(instance="a", model="m", block_size=4, endpoint="http://127.0.0.1:9")

    async def scenario(fleet: Any) -> None:
        assert [spec.endpoint for spec in fleet.specs()] == [listing.endpoint]
        fleet.forget_configured(listing)
        assert fleet.specs() == []
        fleet.forget_configured(listing)

    with_fleet(scenario, sources=[listing])


def test_what_was_unregistered_by_hand_does_not_come_back_by_a_reading_without_changes() -> None:
    with FakeEngine() as engine:
        spec = spec_of(engine)

        async def scenario(fleet: Any) -> None:
            assert fleet.unregister(spec.instance)
            fleet.forget_configured(spec)
            fleet.register(spec)
            fleet.forget_configured(spec)
            assert list(fleet.sources()) == [spec.endpoint]

        with_fleet(scenario, sources=[spec])
    assert difference([spec], [spec]) == ((), ())


def test_a_name_is_free_again_once_its_source_is_gone() -> None:
    registry = Registry()
    spec = SourceSpec(instance="a", model="m", block_size=4, endpoint="tcp://10.0.0.1:1")
    elsewhere = SourceSpec(instance="a", model="m", block_size=4, endpoint="tcp://10.0.0.2:1")
    for give_up in (lambda: registry.remove(spec.endpoint), lambda: registry.unregister("a")):
        registry.register(spec)
        with pytest.raises(ConflictError, match=r"publishes at tcp://10\.0\.0\.1:1"):
            registry.register(elsewhere)
        assert give_up()
        assert registry.register(elsewhere)
        assert registry.remove(elsewhere.endpoint) == elsewhere
        assert registry.remove(elsewhere.endpoint) is None
