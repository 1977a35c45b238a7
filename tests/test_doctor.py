"""`kvindexer doctor`: each check by itself, and the command against a real service and real engines' sockets."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvindexer import __version__
from kvindexer.commands.checkup import MOST_NAMED, SOURCE_CHECKS, Finding, findings
from kvindexer.commands.client import call
from kvindexer.commands.failure import CommandError
from kvindexer.testing import AllBlocksCleared, FakeEngine, PoolShape
from served import Served

PATIENCE_S = 30.0
PROMPT = list(range(500, 564))
"""Four blocks of 16 tokens."""

HEALTH: dict[str, Any] = {
    "ready": True,
    "store": {"kind": "memory", "reachable": True, "replicas": 1, "problems": []},
}
SOURCE: dict[str, Any] = {
    "instance": "pod-a",
    "source": "tcp://pod-a:5557",
    "endpoint": "tcp://pod-a:5557",
    "replay": "tcp://pod-a:5657",
    "model": "m",
    "tenant": "default",
    "block_size": 16,
    "block_sizes": [16],
    "state": "live",
    "why": "",
    "sound": True,
    "complete": True,
    "lag_ms": 0.0,
    "batches": 20,
    "gaps": 0,
    "replays": 0,
    "blocks": {"gpu": 100, "cpu": 0, "disk": 0, "remote": 0},
    "orphans": 0,
    "poison": 0,
    "feedback": {"doubts": 0},
}
NOT_LISTED: dict[str, Any] = {
    "endpoint": "http://pod-a:8000",
    "source": "http://pod-a:8000",
    "why": "it lists none",
    "replay": None,
}
NOT_LISTED |= {"state": "syncing", "complete": False, "batches": 0, "blocks": {"gpu": 0}}

ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("listing", NOT_LISTED, "fail", "it lists none"),
    ("live", {"state": "gone", "why": "silent"}, "fail", "gone, silent"),
    ("live", {"state": "stale"}, "fail", "stale"),
    ("live", {"state": "syncing"}, "warn", "syncing"),
    ("events", {"batches": 0, "blocks": {"gpu": 0}}, "warn", "no event has ever come"),
    ("block size", {"block_sizes": [16, 32]}, "fail", "registered with 16, events say 32"),
    ("sound", {"sound": False, "why": "a gap"}, "warn", "a gap"),
    ("complete", {"complete": False}, "warn", "not complete"),
    ("poison", {"poison": 1}, "warn", "1 unreadable, of 20 batches"),
    ("poison", {"poison": 2}, "fail", "2 unreadable, of 20 batches"),
    ("gaps", {"gaps": 3, "replays": 1, "sound": False}, "warn", "3 gaps, 1 replays"),
    ("gaps", {"gaps": 3, "replay": None}, "warn", "3 gaps, 0 replays"),
    ("orphans", {"orphans": 10}, "warn", "10 of 100 blocks"),
    ("replay", {"replay": None}, "warn", "no replay endpoint"),
    ("lag", {"lag_ms": 2500.0}, "warn", "2.5 s behind"),
    ("feedback", {"feedback": {"doubts": 2}}, "warn", "wrong too often 2 times"),
]


def examined(*sources: dict[str, Any], version: str = "1", **health: Any) -> dict[str, Finding]:
    return {one.check: one for one in findings({**HEALTH, **health}, sources, version, "1")}


def test_a_healthy_service_is_ok_everywhere() -> None:
    found = examined(SOURCE)
    assert {one.level for one in found.values()} == {"ok"}
    assert not any(one.advice for one in found.values())
    assert "no time of another machine" in found["clocks"].what


@pytest.mark.parametrize(("check", "change", "level", "words"), ROWS, ids=lambda part: str(part)[:40])
def test_a_sick_source_is_found(check: str, change: dict[str, Any], level: str, words: str) -> None:
    found = examined({**SOURCE, "instance": "well", "source": "tcp://well:1"}, {**SOURCE, **change})[check]
    assert found.level == level
    assert found.what.startswith("1 of 2; pod-a (")
    assert words in found.what
    assert found.advice
    assert len(found.sources) == 1


def test_every_check_of_a_source_has_its_test() -> None:
    assert list(dict.fromkeys(row[0] for row in ROWS)) == [check.check for check in SOURCE_CHECKS]


@pytest.mark.parametrize("change", [{"orphans": 9}, {"gaps": 5, "replays": 5}, {"lag_ms": 20.0}])
def test_what_is_normal_is_no_finding(change: dict[str, Any]) -> None:
    assert {one.level for one in examined({**SOURCE, **change}).values()} == {"ok"}


def test_an_engine_that_does_not_list_is_told_once() -> None:
    found = examined({**SOURCE, **NOT_LISTED})
    assert [one.check for one in found.values() if one.level != "ok"] == ["listing"]


def test_many_sick_sources_are_counted_and_some_are_named() -> None:
    sick = [{**SOURCE, "instance": f"pod-{n}", "source": f"tcp://pod-{n}:1", "state": "syncing"} for n in range(9)]
    found = examined(*sick, {**SOURCE, "state": "gone"})["live"]
    assert (found.level, len(found.sources)) == ("fail", 10)
    assert found.what.startswith("10 of 10; pod-a (tcp://pod-a:5557): gone; ")
    assert found.what.endswith(f"and {10 - MOST_NAMED} more")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"tenant": "acme", "source": "x"}, "pod-a serves 2 models or tenants"),
        ({"model": "n", "source": "x"}, "pod-a serves 2 models or tenants"),
        ({"instance": "Pod-A", "source": "x"}, "instances Pod-A, pod-a differ only in spelling"),
        ({"instance": "pod-b", "source": "tcp://POD-A:5557"}, "differ only in spelling"),
    ],
)
def test_names_that_stand_for_two_things_are_found(other: dict[str, Any], words: str) -> None:
    found = examined(SOURCE, {**SOURCE, **other})["identities"]
    assert found.level == "warn"
    assert words in found.what
    second_rank = {**SOURCE, "source": "tcp://pod-a:5558", "rank": 1}
    assert examined(SOURCE, second_rank)["identities"].level == "ok"


def test_the_service_itself() -> None:
    assert examined(SOURCE, ready=False)["ready"].level == "fail"
    assert examined()["sources"].level == "warn"
    assert examined(SOURCE, version="2")["version"].level == "warn"
    redis = {"kind": "redis", "reachable": True, "replicas": 3, "problems": []}
    assert examined(SOURCE, store=redis)["store"].what == "redis, 3 replicas were heard lately"
    problem = {"reason": "timeout", "message": "no answer", "hint": "look at Redis"}
    found = examined(SOURCE, store={**redis, "problems": [problem]})["store"]
    assert (found.level, found.what, found.advice) == ("warn", "no answer (timeout)", "look at Redis")
    assert examined(SOURCE, store={**redis, "reachable": False})["store"].level == "warn"


# The command


def doctor(url: str, *options: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "kvindexer", "doctor", "--url", url, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.returncode, done.stdout, done.stderr


def checks(url: str) -> dict[str, dict[str, Any]]:
    """What the command says, for programs."""
    code, out, _ = doctor(url, "--json")
    answer = json.loads(out)
    assert code == (answer["status"] == "fail")
    return {one["check"]: one for one in answer["checks"]}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path, "served", "--set", "probe_interval_s=0.3")
    served.start()
    yield served
    served.close()


@pytest.fixture
def open_engine() -> Iterator[Callable[..., FakeEngine]]:
    with ExitStack() as stack:
        yield lambda **shape: stack.enter_context(FakeEngine(pool=PoolShape(**shape)))


def register(service: Served, name: str, endpoint: str, **fields: Any) -> None:
    body = {"instance_id": name, "endpoint": endpoint, "modelname": "m", "block_size": 16, **fields}
    assert call(service.url, "/register", body)["instance_id"] == name


def sources(service: Served) -> dict[str, dict[str, Any]]:
    return {each["instance"]: each for each in call(service.url, "/v1/sources")["sources"]}


def test_nothing_there_is_a_failure(service: Served) -> None:
    service.end(signal.SIGKILL)
    code, out, err = doctor(service.url)
    assert (code, err) == (1, "")
    assert out.startswith("fail  reachable  no answer from")
    assert list(checks(service.url)) == ["reachable"]
    assert doctor("nonsense")[0] == 2


def test_a_good_service_gets_0_and_a_bad_one_1(service: Served, open_engine: Callable[..., FakeEngine]) -> None:
    good = open_engine()
    register(service, "good", good.endpoint, replay_endpoint=good.replay_endpoint)
    good.wait_for_subscribers()
    good.run_request(PROMPT)
    until(lambda: sources(service)["good"]["batches"] and sources(service)["good"]["state"] == "live")
    code, out, err = doctor(service.url)
    assert (code, err) == (0, "")
    assert f"ok    version     {__version__}" in out
    assert out.rstrip().endswith("0 fail, 0 warn, 19 ok")

    silent, wrong, broken = open_engine(), open_engine(block_size=32), open_engine()
    register(service, "silent", silent.endpoint)
    register(service, "wrong", wrong.endpoint, replay_endpoint=wrong.replay_endpoint)
    register(service, "broken", broken.endpoint, replay_endpoint=broken.replay_endpoint)
    register(service, "unlisted", "http://127.0.0.1:9")
    for engine in (wrong, broken):
        engine.wait_for_subscribers()
    wrong.run_request(PROMPT)
    broken.publish_raw(b"no batch")
    until(lambda: sources(service)["broken"]["poison"] and sources(service)["wrong"]["batches"])
    until(lambda: sources(service)["unlisted"]["why"].startswith("http://127.0.0.1:9/kv_event_sources:"))
    found = checks(service.url)
    sick = {name: one["sources"] for name, one in found.items() if one["level"] == "fail"}
    assert sick == {"listing": ["http://127.0.0.1:9"], "block size": [wrong.endpoint], "poison": [broken.endpoint]}
    assert "registered with 16, events say 32" in found["block size"]["what"]
    assert found["replay"]["sources"] == [silent.endpoint]
    assert found["events"]["sources"] == [silent.endpoint]
    assert doctor(service.url)[0] == 1


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'{"sources": [], "ready": true}', b"no JSON"])
def test_another_program_on_that_port_is_told(answer: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        code, out, err = doctor(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert (code, out) == (1, "")
    assert err.startswith("kvindexer: ")
    assert "Traceback" not in err


def test_it_fits_a_terminal(service: Served) -> None:
    register(service, "pod-with-a-long-name" * 3, "http://127.0.0.1:9")
    main, side = pty.openpty()
    command = [sys.executable, "-m", "kvindexer", "doctor", "--url", service.url]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, stdout=side, env=environ) as process:
        os.close(side)
        shown = b""
        while True:
            try:
                piece = os.read(main, 65536)
            except OSError:  # Linux says so where the other side has closed
                break
            if not piece:
                break
            shown += piece
    os.close(main)
    assert process.returncode == 1
    assert b"\x1b[31mfail" in shown
    assert b"1 fail" in shown


# Explanations of real engines' streams


def test_explanations_of_a_fleet(service: Served, open_engine: Callable[..., FakeEngine]) -> None:
    small, full, silent, wrong = open_engine(num_blocks=8), open_engine(), open_engine(), open_engine(block_size=32)
    engines = {"small": small, "full": full, "silent": silent, "wrong": wrong}
    for name, engine in engines.items():
        register(service, name, engine.endpoint, replay_endpoint=engine.replay_endpoint)
        engine.wait_for_subscribers()
    small.run_request(PROMPT)
    small.run_request(range(5000, 5100))  # pushes the other prompt out
    full.run_request(PROMPT)
    wrong.run_request(PROMPT)

    def explained(**fields: Any) -> dict[str, dict[str, Any]]:
        answer = call(service.url, "/v1/explain", {"model": "m", "tokens": [*PROMPT, 1], **fields})
        return {each["instance"]: each for each in answer["instances"]}

    until(lambda: all(sources(service)[name]["batches"] for name in ("small", "full", "wrong")))
    until(lambda: all(each["state"] == "live" for each in sources(service).values()))
    rows = explained(block_size=16)
    assert {name: each["reason"] for name, each in rows.items()} == {
        "full": "whole_prompt",
        "small": "removed",
        "silent": "no_events",
        "wrong": "other_block_size",
    }
    assert rows["small"]["missing"]["held_by"] == ["full"]
    for name in ("full", "small"):
        assert rows[name]["matched_tokens"] == engines[name].cached_tokens([*PROMPT, 1])
    assert explained()["wrong"]["matched_tokens"] == 64
    full.publish_events([AllBlocksCleared()])
    until(lambda: explained(block_size=16)["full"]["matched_tokens"] == 0)
    assert explained(block_size=16)["full"]["reason"] == "removed"


def test_a_model_whose_engines_do_not_list_is_explained(service: Served) -> None:
    register(service, "pod-a", "http://127.0.0.1:9")
    answer = call(service.url, "/v1/explain", {"model": "m", "tokens": PROMPT})
    assert (answer["reason"], answer["instances"]) == ("not_listed", [])
    assert "near_models" not in answer


def test_its_log_has_no_tokens(service: Served, open_engine: Callable[..., FakeEngine]) -> None:
    engine = open_engine()
    register(service, "pod-a", engine.endpoint, replay_endpoint=engine.replay_endpoint)
    marked = [987654321 + number for number in range(16)]
    call(service.url, "/v1/explain", {"model": "m", "tokens": marked})
    with pytest.raises(CommandError, match="out of range"):
        call(service.url, "/v1/explain", {"model": "m", "tokens": [*marked, -1]})
    assert "9876543" not in service.log
