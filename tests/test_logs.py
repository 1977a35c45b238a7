"""The log: its two forms, the lines of requests and streams, and what is in none of its lines."""

from __future__ import annotations

import ast
import json
import logging
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from struct import pack
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

from kvindexer.events.states import State
from kvindexer.settings import Settings
from kvindexer.testing import FakeEngine
from kvindexer.watching.logs import FIXED, JsonLines, TextLines, loop_fault, tell
from kvindexer.watching.requests import MAX_PROBLEMS_PER_S, RequestLog
from kvindexer.watching.work import Work
from servers import Server
from tokenizing import fake_engine, make_tokenizer
from watched import Watched, eventually

MARKED_TOKENS = [918_273_645, 918_273_646, 918_273_647, 918_273_648] * 8
MARKED_TEXT = "zanzibar the quick brown fox"
MARKED_SALT = "salzburg"
MARKED_DEPLOYMENT = "salamanca"
MARKED_KEY = "sesame-of-the-engine"
MARKED_BEARER = "open-sesame-of-a-caller"
MARKED_POISON = "arsenic"
MARKS = (
    *("918273645", "918273646", "918273647", "918273648"),
    *("zanzibar", MARKED_SALT, MARKED_DEPLOYMENT, MARKED_KEY, MARKED_BEARER, MARKED_POISON),
    b64encode(pack("<4I", *MARKED_TOKENS[:4])).decode()[:12],
)


class Lines(logging.Handler):
    """Formats what is logged, in a form."""

    def __init__(self, form: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(form)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger that nobody else hears."""
    own = logging.getLogger("kvindexer.test_logs")
    own.propagate = False
    own.setLevel(logging.INFO)
    yield own
    for handler in own.handlers[:]:
        own.removeHandler(handler)


def lines_of(logger: logging.Logger, form: logging.Formatter) -> list[str]:
    """What it logs from now on."""
    handler = Lines(form)
    logger.addHandler(handler)
    return handler.lines


# The two forms


def test_a_unit_of_work_is_one_line_of_json_with_fixed_fields_and_its_own(logger: logging.Logger) -> None:
    lines = lines_of(logger, JsonLines())
    tell(logger, logging.INFO, "shard written", source="tcp://pod:1", records=7, ratio=0.5, why=None, whole=True)
    told = json.loads(lines[0])
    assert tuple(told) == (*FIXED, "source", "records", "ratio", "whole")
    assert told["ts"].endswith("Z")
    assert (told["level"], told["logger"], told["message"]) == ("info", "kvindexer.test_logs", "shard written")
    assert (told["source"], told["records"], told["ratio"], told["whole"]) == ("tcp://pod:1", 7, 0.5, True)


def test_a_unit_of_work_is_one_line_of_text_whose_fields_can_be_told_apart(logger: logging.Logger) -> None:
    lines = lines_of(logger, TextLines())
    tell(logger, logging.WARNING, "source stale", source="tcp://pod:1", why="silent for 3 s", sound=False, seq=3)
    assert lines[0].partition(" WARNING ")[2] == (
        'kvindexer.test_logs source stale source=tcp://pod:1 why="silent for 3 s" sound=false seq=3'
    )


@pytest.mark.parametrize("form", [TextLines(), JsonLines()], ids=["text", "json"])
@pytest.mark.parametrize("evil", ["\n", "\r", "\r\n", "\x0b", "\x85", "\u2028", "\x1b[2K"], ids=ascii)
def test_no_name_makes_a_record_look_like_two(logger: logging.Logger, form: logging.Formatter, evil: str) -> None:
    """Neither in a field nor in the middle of a message; nor does it speak to the terminal."""
    lines = lines_of(logger, form)
    name = f"pod{evil}2026-01-01 00:00:00,000 INFO kvindexer all is well"
    tell(logger, logging.INFO, "source registered", instance=name)
    logger.warning("source %s is odd", name)
    for line in lines:
        assert all(not further or further.startswith("    ") for further in line.splitlines()[1:])
        assert "\x1b" not in line
        assert "\r" not in line


@pytest.mark.parametrize("form", [TextLines(), JsonLines()], ids=["text", "json"])
def test_of_an_exception_the_log_has_types_and_places_and_not_what_it_says(
    logger: logging.Logger, form: logging.Formatter
) -> None:
    lines = lines_of(logger, form)
    try:
        try:
            json.loads("{}")["zanzibar-1"]
        except KeyError as cause:
            raise ValueError("zanzibar-2") from cause
    except ValueError:
        logger.exception("it failed")
    (line,) = lines
    shown = json.loads(line)["stack"] if isinstance(form, JsonLines) else line
    assert "KeyError" in shown
    assert "ValueError" in shown
    assert "test_logs.py" in shown
    assert 'raise ValueError("zanzibar-2")' in shown, "the code is shown, and its literals"
    assert "ValueError: " not in shown
    assert "KeyError: " not in shown


def test_a_fault_in_the_loop_is_told_without_what_the_exception_says(caplog: pytest.LogCaptureFixture) -> None:
    import asyncio  # noqa: PLC0415 - nothing else of this module needs a loop

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError(MARKED_TEXT)

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(loop_fault)
        task = asyncio.create_task(fails())
        await asyncio.wait([task])
        del task
        asyncio.get_running_loop().call_soon(int, MARKED_TEXT)
        await asyncio.sleep(0)

    asyncio.run(scenario())
    told = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert [(it["message"], it["error"]) for it in told] == [
        ("Task exception was never retrieved", "ValueError"),
        ("Exception in callback int", "ValueError"),
    ]
    assert "zanzibar" not in json.dumps(told)


# Lines of requests


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def answered(log: RequestLog, status: int = 200, seconds: float = 0.001, route: str = "/v1/match") -> None:
    work = Work()
    work.route, work.prompts, work.tokens, work.hit_tokens = route, 1, 64, 48
    log.answered("POST", status, seconds, work=work, caller="router", trace=None)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(JsonLines().format(record))
    return {name: value for name, value in told.items() if name not in ("ts", "logger")}


@pytest.mark.parametrize(
    ("settings", "level", "expected"),
    [
        ({}, logging.INFO, []),
        ({}, logging.DEBUG, ["debug"]),
        ({"log_requests": "all"}, logging.INFO, ["info"]),
        ({"log_requests": "all"}, logging.WARNING, []),
    ],
)
def test_ordinary_requests_have_a_line_where_that_was_asked_for(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], level: int, expected: list[str]
) -> None:
    with caplog.at_level(level, "kvindexer.watching.requests"):
        answered(RequestLog(Settings(**settings)))
    assert [fields(record) for record in caplog.records] == [
        {
            "level": shown,
            "message": "request",
            "method": "POST",
            "route": "/v1/match",
            "status": 200,
            "duration_ms": 1.0,
            "prompts": 1,
            "tokens": 64,
            "hit_tokens": 48,
            "caller": "router",
        }
        for shown in expected
    ]


def test_slow_and_failed_requests_have_a_line_and_streams_are_never_slow(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(Settings(slow_request_s=0.5))
    answered(log, 200, 0.5)
    answered(log, 503, 0.001)
    answered(log, 200, 3600.0, "/v1/changes")
    answered(log, 422, 0.1)
    shown = [fields(record) for record in caplog.records]
    assert [(it["level"], it["status"], it.get("slow")) for it in shown] == [
        ("warning", 200, True),
        ("warning", 503, None),
    ]


def test_a_service_in_trouble_does_not_drown_in_lines_and_says_how_many_it_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    log = RequestLog(Settings(), clock)
    for _ in range(MAX_PROBLEMS_PER_S + 990):
        answered(log, 503)
    assert len(caplog.records) == MAX_PROBLEMS_PER_S
    clock.now += 1
    answered(log, 503)
    answered(log, 503)
    assert [fields(record).get("left_out") for record in caplog.records[-2:]] == [990, None]


# A whole service


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_at_debug_holds_tokens_prompts_salts_or_secrets(
    tmp_path: Path, redis_server: Server, form: str
) -> None:
    """Traffic of every kind, good and bad, with marked values everywhere; and every line of JSON is one."""
    with fake_engine() as tokenizer, FakeEngine() as engine:
        tokenizers = {
            "m": {"path": str(make_tokenizer(tmp_path / "tokenizer"))},
            "remote": {"engines": [tokenizer.url]},
            "dead": {"engines": ["http://127.0.0.1:1"]},
        }
        with Watched(
            tmp_path,
            log_level="debug",
            log_format=form,
            store=redis_server.url,
            store_flush_interval_s="0.05",
            tokenizers=json.dumps(tokenizers),
            tokenizer_api_key=MARKED_KEY,
            tokenizer_timeout_s="1",
        ) as service:
            _marked_traffic(service, engine)
            eventually("it is in the store", lambda: service.value("kvindexer_store_records_written_total") > 0)
        log = service.process.log
    for mark in MARKS:
        assert mark not in log, mark
    assert log.count("/v1/match") > 5, "there is a line for each request"
    if form == "json":
        records = [json.loads(line) for line in log.splitlines()]
        assert all(set(FIXED) <= set(record) for record in records)
        (good, *_) = (it for it in records if it.get("route") == "/v1/match" and it.get("hit_tokens"))
        assert (good["status"], good["prompts"], good["tokens"]) == (200, 1, len(MARKED_TOKENS))


def _marked_traffic(service: Watched, engine: FakeEngine) -> None:
    client = service.client
    client.headers["authorization"] = f"Bearer {MARKED_BEARER}"
    service.follow(engine, additional_salt=MARKED_DEPLOYMENT)
    engine.run_request(MARKED_TOKENS, salt=MARKED_SALT)
    asked = {"model": "m", "tokens": MARKED_TOKENS, "cache_salt": MARKED_SALT}
    eventually("the blocks are found", lambda: service.post("/v1/match", asked)["matches"] != [])
    packed = b64encode(pack(f"<{len(MARKED_TOKENS)}I", *MARKED_TOKENS)).decode()
    chat = [{"role": "user", "content": MARKED_TEXT}]
    bodies: list[tuple[str, Any]] = [
        *[("/v1/match", {"model": model, "prompt": MARKED_TEXT}) for model in ("m", "remote", "dead", "none")],
        *[("/v1/match", {"model": model, "messages": chat}) for model in ("m", "remote", "dead")],
        ("/v1/match", {"model": "m", "tokens_b64": packed}),
        ("/v1/match", {"model": "m", "tokens": MARKED_TOKENS, "additional_salt": MARKED_DEPLOYMENT}),
        ("/v1/match", {"model": "m", "tokens": [*MARKED_TOKENS, "zanzibar"]}),
        ("/v1/match", {"model": "m", "tokens": [*MARKED_TOKENS, 2**70]}),
        ("/v1/match", {"model": "m", "messages": [{"role": MARKED_TEXT}, 7]}),
        ("/v1/match/batch", {"model": "m", "prompts": [{"tokens": MARKED_TOKENS}, {"prompt": MARKED_TEXT}]}),
        ("/v1/keys", {"model": "m", "tokens": MARKED_TOKENS, "cache_salt": MARKED_SALT}),
        ("/v1/explain", asked),
        ("/v1/routed", {**asked, "instance": "pod-a"}),
        ("/query", {"model": "m", "token_ids": MARKED_TOKENS, "cache_salt": MARKED_SALT}),
        ("/query", {"model": "m", "token_ids": MARKED_TEXT}),
        ("/score_completions", {"model": "m", "prompt": MARKED_TEXT}),
        ("/score_chat_completions", {"model": "m", "messages": chat}),
        (f"/{MARKED_SALT}", {}),
    ]
    for path, body in bodies:
        assert client.post(path, json=body).status_code < 504
    assert client.post("/v1/match", content=MARKED_TEXT.encode()).status_code == 400
    assert client.get("/v1/changes", params={"model": "m", "since": MARKED_SALT}).status_code == 422
    for payload in (MARKED_POISON.encode(), msgpack.packb([1.0, [{"type": MARKED_POISON}, MARKED_TOKENS], 0])):
        engine.publish_raw(payload)
    engine.run_request(MARKED_TOKENS[:24], salt=MARKED_SALT)
    eventually("poison is seen", lambda: service.value("kvindexer_unreadable_total") > 0)
    engine.restart(hash_seed=5)
    engine.wait_for_subscribers()
    engine.run_request(MARKED_TOKENS, salt=MARKED_SALT)
    eventually("the new life is seen", lambda: service.value("kvindexer_entries_withdrawn_total") > 0)
    eventually("the blocks are found again", lambda: service.post("/v1/match", asked)["matches"] != [])


def test_the_line_of_a_request_names_its_caller_and_not_its_token(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(json.dumps({"tokens": [{"name": "router-7", "token": MARKED_BEARER, "roles": ["query"]}]}))
    tokens.chmod(0o600)
    with Watched(tmp_path, auth_tokens_file=str(tokens), log_requests="all", log_format="json") as service:
        headers = {"authorization": f"Bearer {MARKED_BEARER}"}
        assert service.client.get("/v1/sources", headers=headers).status_code == 200
        assert service.client.get("/v1/sources", headers={"authorization": "Bearer zanzibar"}).status_code == 401

        def shown() -> list[tuple[int, str]]:
            records = [json.loads(line) for line in service.process.log.splitlines()]
            return [(it["status"], it["caller"]) for it in records if it.get("route") == "/v1/sources"]

        eventually("both have a line", lambda: shown() == [(200, "router-7"), (401, "anonymous")])
        assert not any(mark in service.process.log for mark in MARKS)


def test_the_page_lists_every_unit_of_work_with_its_fields() -> None:
    """What is told in the code is in the table of docs/observability.md, and the other way round."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / "observability.md").read_text().split("## Logs")[1].split("## ")[0]
    documented: dict[str, set[str]] = {}
    for events, fields_of in re.findall(r"^\| (`.+?) \| .+? \| (`.+) \|$", page, re.MULTILINE):
        documented |= {event: set(re.findall(r"`(\w+)`", fields_of)) for event in re.findall(r"`([^`]+)`", events)}
    told: dict[str, set[str]] = {}
    for path in (root / "kvindexer").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tell":
                event = ast.unparse(call.args[2])
                states = [f"source {state.value}" for state in State]
                names = states if event.startswith("f'source {") else [ast.literal_eval(event)]
                told |= {name: {keyword.arg or "" for keyword in call.keywords} for name in names}
    assert documented == told


def test_the_life_of_a_source_is_told_line_by_line(tmp_path: Path) -> None:
    """Registered, live, emptied and live again after a restart, stale after its death, unregistered."""
    with Watched(tmp_path, log_format="json", stale_after_s="0.6", gone_after_s="60") as service:

        def told(message: str) -> list[dict[str, Any]]:
            records = [json.loads(line) for line in service.process.log.splitlines()]
            return [record for record in records if record["message"] == message]

        with FakeEngine() as engine:
            service.follow(engine)
            engine.run_request(list(range(64)))
            eventually("it is live", lambda: len(told("source live")) == 1)
            eventually("it has blocks", lambda: service.value("kvindexer_blocks", tier="gpu") > 0)
            engine.restart(hash_seed=7)
            engine.wait_for_subscribers()
            engine.run_request(list(range(64)))
            eventually("it is live again", lambda: len(told("source live")) == 2)
        eventually("it is stale", lambda: len(told("source stale")) == 1)
        service.post("/unregister", {"instance_id": "pod-a", "model": "m"})
        eventually("it is forgotten", lambda: len(told("source unregistered")) == 1)
        (registered,) = told("source registered")
        assert (registered["instance"], registered["model"]) == ("pod-a", "m")
        (withdrawn,) = told("entries withdrawn")
        assert (withdrawn["reason"], withdrawn["entries"] > 0, withdrawn["level"]) == ("new_life", True, "warning")
        rebuilt = told("source live")[-1]
        assert (rebuilt["epoch"], rebuilt["sound"], rebuilt["blocks"] > 0) == (2, True, True)
        assert rebuilt["duration_ms"] >= 0
        assert told("source stale")[0]["level"] == "warning"
        assert told("request") == [], "an ordinary request has no line by default"
