"""kvindexer.client against a real server, blocking and with asyncio: every method, and whatever goes wrong."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any, assert_type

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_server import Api, serving
from kvindexer.api import registration
from kvindexer.client import (
    AsyncChanges,
    AsyncClient,
    BadAnswerError,
    BlocksEvent,
    Change,
    Changes,
    Chat,
    Client,
    ClientError,
    EndEvent,
    GoneEvent,
    InvalidRequestError,
    Keys,
    MatchAnswer,
    MultimodalItem,
    NotFoundError,
    PositionEvent,
    RefusedError,
    ResetEvent,
    SourceSpec,
    Text,
    TimedOutError,
    Tokens,
    UnavailableError,
    UnreachableError,
    answers,
    calls,
    exchange,
    reports,
)
from kvindexer.client import changes as told
from kvindexer.client.exchange import Again
from kvindexer.client.methods import Method, Methods
from kvindexer.tokenization.blocks import pack_tokens, prompt_keys
from kvindexer.types import SOURCE_TYPES
from tokenizing import ids, make_tokenizer

PROMPT = list(range(100, 140))
"""Ten blocks of 4 tokens."""
KEYS = list(prompt_keys(pack_tokens(PROMPT), 4))
HASHES = [1000 + number for number in range(10)]
SERVICE = {
    kind.__name__: kind
    for module in list(sys.modules.values())
    if module.__name__.startswith("kvindexer.api.")
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
}
STRUCTS = [
    kind
    for module in (answers, reports, told)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
]
LEFT_OUT = {("KeysAnswer", "keys_b64"): "`keys` says the same"}
"""Fields of the service that the client does not read, and why."""
WITHOUT_METHOD = {
    "/metrics": "for Prometheus",
    "/workers": "RFC #1403, for clients of its dialects: `sources` says more",
    "/query": "RFC #1403, for clients of its dialects: `match` says more",
    "/query_by_hash": "RFC #1403, for clients of its dialects: `match` with Keys says more",
    "/score_completions": "for clients of llm-d's example service: `match` has scores",
    "/score_chat_completions": "for clients of llm-d's example service: `match` has scores",
}
ASKED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str, Any]] = {
    "match": (
        ("m", Tokens(PROMPT)),
        {"candidates": ("pod-b", "pod-a", "pod-x"), "by_rank": True},
        "/v1/match",
        {"model": "m", "tokens": PROMPT, "candidates": ["pod-b", "pod-a", "pod-x"], "by_rank": True},
    ),
    "match_batch": (
        ("m", [Tokens(PROMPT), Keys(KEYS[:2]), Tokens([1])]),
        {"top_k": 1, "weights": {"cpu": 0.5}},
        "/v1/match/batch",
        {
            "model": "m",
            "prompts": [{"tokens": PROMPT}, {"keys": KEYS[:2]}, {"tokens": [1]}],
            "top_k": 1,
            "weights": {"cpu": 0.5},
        },
    ),
    "keys": (("m", Tokens(PROMPT, lora="l")), {}, "/v1/keys", {"model": "m", "tokens": PROMPT, "lora": "l"}),
    "routed": (
        ("m", "pod-b", Keys(KEYS)),
        {"ttl_s": 9.0},
        "/v1/routed",
        {"model": "m", "instance": "pod-b", "keys": KEYS, "ttl_s": 9.0},
    ),
    "feedback": (
        ("pod-a", 40, 24),
        {"request_id": "r"},
        "/v1/feedback",
        {"instance": "pod-a", "predicted_tokens": 40, "cached_tokens": 24},
    ),
    "locate": (
        ("m",),
        {"hashes": HASHES, "instance": "pod-a", "near": "pod-b"},
        "/v1/blocks/locate",
        {"model": "m", "hashes": HASHES, "instance": "pod-a", "near": "pod-b"},
    ),
    "offload_plan": (
        ("pod-a", "gpu", [*HASHES, b"\1\2\3\4\5\6\7\x08"]),
        {"hot_from": 5.0},
        "/v1/offload/plan",
        {"instance": "pod-a", "tier": "gpu", "hashes": [*HASHES, "0102030405060708"], "hot_from": 5.0},
    ),
    "explain": (
        ("m", Tokens(PROMPT)),
        {"candidates": ["pod-a", "pod-b", "pod-x"]},
        "/v1/explain",
        {"model": "m", "tokens": PROMPT, "candidates": ["pod-a", "pod-b", "pod-x"]},
    ),
    "tiers": ((), {"model": "m"}, "/v1/tiers?model=m", None),
    "health": ((), {}, "/health", None),
    "heat_prefixes": (("m",), {"top": 3}, "/v1/heat/prefixes?model=m&top=3", None),
    "heat_single": (("m",), {}, "/v1/heat/single?model=m", None),
    "heat_prewarm": (("m", "pod b"), {}, "/v1/heat/prewarm?model=m&instance=pod+b", None),
    "sources": ((), {"instance": "pod-a"}, "/v1/sources?instance=pod-a", None),
    "ready": ((), {}, "/ready", None),
    "register": (
        (SourceSpec(instance="pod-a", model="m", block_size=4, endpoint="tcp://pod-a:5557"),),
        {},
        "/register",
        {"instance_id": "pod-a", "modelname": "m", "block_size": 4, "endpoint": "tcp://pod-a:5557"},
    ),
    "unregister": (("pod-c",), {"rank": 1}, "/unregister", {"instance_id": "pod-c", "dp_rank": 1}),
}
"""Method -> what it is given; path and body of the same request, GET without one."""


class Flavour:
    """Calls methods of either client, and waits."""

    def __init__(self, kind: type[Client | AsyncClient]) -> None:
        self._kind = kind
        self.runner = asyncio.Runner()
        self._opened: list[Client | AsyncClient] = []

    def open(self, url: str, **options: Any) -> Client | AsyncClient:
        client = self._kind(url, **options)
        self._opened.append(client)
        return client

    def call(self, client: Client | AsyncClient, name: str, *args: Any, **named: Any) -> Any:
        answer = getattr(client, name)(*args, **named)
        return self.runner.run(answer) if isinstance(client, AsyncClient) else answer

    def close(self) -> None:
        for client in self._opened:
            self.call(client, "close")
        self.runner.close()


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    with closing(Flavour(request.param)) as made:
        yield made


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        running.store(running.add("pod-a"), PROMPT)
        running.store(running.add("pod-b"), PROMPT[:12])
        running.store("tcp://pod-b:5557", PROMPT[:20], medium="CPU")
        yield running


@pytest.fixture
def ask(api: Api, flavour: Flavour) -> Callable[..., Any]:
    """A method of a client of the service; how long that takes is not what is tested with it."""
    client = flavour.open(url_of(api), timeout_s=30.0)

    def asked(name: str, *args: Any, **named: Any) -> Any:
        return flavour.call(client, name, *args, **named)

    return asked


def url_of(api: Api) -> str:
    return f"http://127.0.0.1:{api.address[1]}"


def methods() -> set[str]:
    return {name for name, value in vars(Methods).items() if isinstance(value, Method)}


# What it asks and answers


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_method_answers_what_its_route_answers(api: Api, ask: Callable[..., Any], name: str) -> None:
    args, named, path, body = ASKED[name]
    if name == "unregister":
        api.add("pod-c", rank=1)
    for _ in range(3):
        api.post("/v1/match", {"model": "m", "tokens": PROMPT})  # some heat
    answer = ask(name, *args, **named)
    if name == "unregister":
        api.add("pod-c", rank=1)
    response = api.client.post(path, json=body) if body is not None else api.client.get(path)
    plain = msgspec.convert(response.json(), type(answer))
    for changing in ("queries", "asked_per_minute", "heat", "error_per_minute"):
        answer, plain = without(answer, changing), without(plain, changing)
    assert answer == plain


def without(value: Any, field: str) -> Any:
    """The value as plain data, but for a figure that changes with time."""
    data = msgspec.to_builtins(value)
    if isinstance(data, dict):
        return {name: without(inner, field) for name, inner in data.items() if name != field}
    return [without(inner, field) for inner in data] if isinstance(data, list) else data


def test_answers_are_typed_and_frozen(api: Api) -> None:
    with Client(url_of(api)) as client:
        answer = assert_type(client.match("m", Tokens(PROMPT), top_k=1), MatchAnswer)
        assert assert_type(client.keys("m", Tokens(PROMPT)).keys, list[int]) == KEYS
        with pytest.raises(AttributeError):
            answer.model = "n"  # type: ignore[misc]
    assert [(row.instance, row.cached_tokens, row.speculative_tokens) for row in answer.matches] == [
        ("pod-a", 36, None)
    ]

    async def asynchronous() -> None:
        async with AsyncClient(url_of(api)) as client:
            assert assert_type(await client.match("m", Tokens(PROMPT), top_k=1), MatchAnswer) == answer
            both = await asyncio.gather(client.ready(), client.sources())
            assert both[0].ready
            assert len(both[1].sources) == 2

    asyncio.run(asynchronous())


def test_called_on_no_client_a_method_is_the_call(api: Api) -> None:
    call = Client.match("m", Tokens(PROMPT))
    assert call == calls.match("m", Tokens(PROMPT))
    with Client(url_of(api)) as client:
        assert client.send(call).matches[0].instance == "pod-a"


def test_every_route_has_a_method_or_a_reason_why_not(api: Api) -> None:
    routes = set(api.client.get("/openapi.json").json()["paths"])
    asked = {path.partition("?")[0] for _, _, path, _ in ASKED.values()} | {"/v1/changes"}
    assert asked | WITHOUT_METHOD.keys() == routes
    assert not asked & WITHOUT_METHOD.keys()


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda kind: kind.__name__)
def test_structs_of_answers_have_the_fields_and_types_of_the_services_own(kind: type[msgspec.Struct]) -> None:
    """They can't be the same: the service's stand beside routes, which import a server."""
    service = {field.encode_name: field for field in msgspec.structs.fields(SERVICE[kind.__name__])}
    mine = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    left_out = {name for struct, name in LEFT_OUT if struct == kind.__name__}
    assert mine.keys() == service.keys() - left_out
    properties = [properties_of(struct) for struct in (kind, SERVICE[kind.__name__])]
    for name, field in mine.items():
        assert service[name].required or not field.required, f"{name} may be left out"
        here, there = (types_of(of[name]) for of in properties)
        assert here - {"null"} == there - {"null"}, name
        assert there <= here, f"{name} may be null"


def properties_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components([kind])
    found: dict[str, Any] = schemas[kind.__name__]["properties"]
    return found


def types_of(schema: dict[str, Any]) -> set[str]:
    """What a value may be, without what it may say."""
    if "$ref" in schema:
        return {schema["$ref"].rpartition("/")[2]}
    if "anyOf" in schema:
        return {each for one in schema["anyOf"] for each in types_of(one)}
    if "enum" in schema:
        return {"string"}
    inner = schema.get("items", schema.get("additionalProperties"))
    of = f" of {sorted(types_of(inner))}" if isinstance(inner, dict) else ""
    return {schema.get("type", "anything") + of}


def test_every_field_of_a_source_is_registered() -> None:
    values: dict[str, Any] = {
        "instance": "i",
        "model": "m",
        "block_size": 4,
        "endpoint": "tcp://h:1",
        "replay": "tcp://h:2",
        "rank": 3,
        "type": SOURCE_TYPES[1],
        "tenant": "t",
        "topic": "kv",
        "lora": "l",
        "additional_salt": "s",
        "tier": "cpu",
        "readers": (),
        "report_mode": "full",
        "offload_blocks_per_chunk": 2,
        "offload_connector": True,
        "speculative_blocks": 1,
        "clear_lower_tiers": True,
        "durable_tiers": ("disk",),
        "aliases": ("a",),
        "block_bytes": 9,
        "curve_server_key": "k" * 40,
    }
    spec = SourceSpec(**values)
    assert set(values) | {"life"} == set(SourceSpec.__dataclass_fields__)  # which life it is, discovery finds out
    body = calls.register(spec).body
    assert body is not None
    assert registration.source_of(msgspec.json.decode(body, type=registration.Registration)) == spec


def test_registered_and_forgotten(api: Api, ask: Callable[..., Any]) -> None:
    spec = SourceSpec(instance="pod-z", model="z", block_size=8, endpoint="tcp://pod-z:5557", aliases=("z.local",))
    assert ask("register", spec).instance_id == "pod-z"
    assert [(entry.instance, entry.block_size) for entry in ask("sources", model="z").sources] == [("pod-z", 8)]
    assert ask("match", "z", Tokens(PROMPT), candidates=["z.local"]).matches[0].candidate == "z.local"
    assert ask("unregister", "pod-z", model="z").removed_instances == ["pod-z|default|0"]
    assert spec not in api.fleet.specs()


def test_not_being_ready_is_an_answer(api: Api, ask: Callable[..., Any]) -> None:
    assert ask("ready").ready
    api.fleet.ready = False
    assert not ask("ready").ready


# Prompts


@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"lora": "l"},
        {"cache_salt": "s"},
        {"multimodal": [MultimodalItem("h", 3, 9)], "lora": "l", "cache_salt": "s"},
        {"lora": "", "cache_salt": ""},
    ],
    ids=str,
)
def test_keys_that_are_hashed_here_are_those_of_the_service(ask: Callable[..., Any], extras: dict[str, Any]) -> None:
    prompt = Tokens([*PROMPT, 7], **extras)
    answer = ask("keys", "m", prompt)
    assert answer.prompt() == prompt.hashed(4)
    assert ask("match", "m", prompt.hashed(4)) == ask("match", "m", prompt)
    assert ask("match_batch", "m", [prompt.hashed(4)]).results[0].tokens == 41


def test_keys_name_the_block_size_that_they_were_made_for(api: Api, ask: Callable[..., Any]) -> None:
    api.add("pod-e", block_size=8)
    prompt = Tokens(PROMPT)
    assert [row.instance for row in ask("match", "m", prompt.hashed(4)).matches] == ["pod-a", "pod-b"]
    assert not ask("match", "m", prompt.hashed(8)).matches
    assert ask("routed", "m", "pod-e", prompt.hashed(8)).speculative_tokens == 40
    assert ask("match_batch", "m", [prompt.hashed(4)]).results[0].error is None
    assert ask("match_batch", "m", [Keys(KEYS), prompt.hashed(4)]).results[0].matches[0].instance == "pod-a"
    with pytest.raises(RefusedError):
        ask("match", "m", Keys(KEYS))
    with pytest.raises(ValueError, match="one block size"):
        ask("match_batch", "m", [prompt.hashed(4), prompt.hashed(8)])


def test_prompts_as_text(tmp_path: Path, flavour: Flavour) -> None:
    with serving(tokenizers={"m": {"path": str(make_tokenizer(tmp_path))}}) as api:
        words = "the quick brown fox jumps over"
        api.store(api.add("pod-a"), ids(f"<s> {words}"))
        client = flavour.open(url_of(api))
        assert flavour.call(client, "match", "m", Text(words)).matches[0].matched_tokens == 4
        chat = Chat([{"role": "user", "content": words}], add_generation_prompt=True)
        assert flavour.call(client, "keys", "m", chat).tokens == len(ids(f"<s> user {words} </s> assistant"))


def test_token_ids_come_as_numbers_or_packed() -> None:
    assert Tokens(range(5)) == Tokens(pack_tokens(range(5)))
    assert len(Tokens(range(5))) == 5
    assert Keys([-1, 1]) == Keys([2**64 - 1, 1])
    assert Keys(Keys(KEYS).packed) == Keys(KEYS)
    assert len(Keys(KEYS)) == 10


@pytest.mark.parametrize("ids", [[-1], [2**32], ["7"], [1.5], b"123", [None]], ids=str)
def test_what_can_not_be_token_ids_is_refused_at_once(ids: Any) -> None:
    with pytest.raises(ValueError, match="token ids"):
        Tokens(ids)


def test_prompts_are_in_no_repr() -> None:
    """P9."""
    prompts = (
        Tokens([4711], cache_salt="Zanzibar"),
        Keys([4711]),
        Text("Zanzibar 4711", cache_salt="Zanzibar"),
        Chat([{"role": "user", "content": "Zanzibar 4711"}], tools=[{"name": "Zanzibar"}], cache_salt="Zanzibar"),
    )
    shown = [repr(prompt) for prompt in prompts] + [repr(calls.match("m", prompt)) for prompt in prompts]
    assert not any("Zanzibar" in each or "4711" in each or "\\x" in each for each in shown)


# What goes wrong


@contextmanager
def answering(*replies: bytes | Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers requests with these bytes in turn, the last ones for ever; and what it was asked."""
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            asked.append(self.rfile.read(int(self.headers.get("content-length", 0))))
            said = replies[min(len(asked), len(replies)) - 1]
            self.close_connection = True
            if callable(said):
                said(self)
            else:
                self.wfile.write(said.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


READY = reply(200, b'{"ready": true}')
NO_SOURCES = reply(200, b'{"sources": [], "totals": {"events": 0, "queries": 0, "blocks": 0}}')
BUSY = b'{"error": {"code": "overloaded", "message": "too many", "hint": "later"}}'


@pytest.mark.parametrize(
    ("args", "kind", "code"),
    [
        (("match", "unheard-of", Tokens(PROMPT)), NotFoundError, "unknown_model"),
        (("routed", "m", "pod-x", Tokens(PROMPT)), NotFoundError, "unknown_instance"),
        (("feedback", "pod-x", 1, 1), NotFoundError, "unknown_instance"),
        (("unregister", "pod-x"), NotFoundError, "unknown_instance"),
        (("offload_plan", "pod-x", "gpu", HASHES), NotFoundError, "unknown_instance"),
        (("heat_prefixes", "unheard-of"), NotFoundError, "unknown_model"),
        (("match", "m", Text("why?")), InvalidRequestError, "no_tokenizer"),
        (("keys", "m", Tokens(PROMPT, multimodal=[MultimodalItem("h", 0, 0)])), InvalidRequestError, None),
        (("offload_plan", "pod-a", "attic", HASHES), InvalidRequestError, "invalid_request"),
    ],
)
def test_what_the_service_refuses(
    ask: Callable[..., Any], args: tuple[Any, ...], kind: type[RefusedError], code: str | None
) -> None:
    with pytest.raises(kind) as caught:
        ask(*args)
    error = caught.value
    assert type(error) is kind
    assert code in (None, error.code)
    assert 400 <= error.status < 500
    assert error.message
    assert error.message in str(error)


def test_too_much_is_refused_with_the_setting_that_limits_it(flavour: Flavour) -> None:
    with serving(max_prompt_tokens=8) as api:
        api.add("pod-a")
        with pytest.raises(InvalidRequestError) as caught:
            flavour.call(flavour.open(url_of(api)), "match", "m", Tokens(PROMPT))
    assert (caught.value.status, caught.value.code) == (413, "too_large")
    assert "max_prompt_tokens" in caught.value.hint


def test_nobody_listens(flavour: Flavour) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # for as long as the test runs, so that nobody else listens there either
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnreachableError) as caught:
            flavour.call(flavour.open(url), "ready")
    assert url in str(caught.value)
    assert caught.value.code == "unreachable"
    assert caught.value.hint


def test_a_service_that_comes_up_meanwhile_is_asked_again(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second try of a refused connection finds it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    opened: list[socket.socket] = []

    def serve_ready() -> None:
        connection, _ = opened[0].accept()
        with connection:
            connection.recv(65536)
            connection.sendall(READY)

    def again(*outcome: Any) -> Again | None:
        opened.append(socket.create_server(("127.0.0.1", port)))
        threading.Thread(target=serve_ready, daemon=True).start()
        return exchange.again(*outcome)

    monkeypatch.setattr("kvindexer.client.clients.again", again)
    assert flavour.call(flavour.open(f"http://127.0.0.1:{port}"), "ready").ready
    opened[0].close()


def test_503_is_tried_once_more_after_the_pause_that_it_asks_for(flavour: Flavour) -> None:
    with answering(reply(503, BUSY, "retry-after: 0"), NO_SOURCES) as (url, asked):
        assert flavour.call(flavour.open(url), "sources").sources == []
        assert len(asked) == 2


@pytest.mark.parametrize(
    ("said", "options", "tries"),
    [
        ([], {}, 2),
        (["retry-after: 3600"], {}, 1),
        (["retry-after: soon"], {}, 2),
        (["retry-after: 1.9"], {"timeout_s": 1.5}, 1),
        ([], {"retry": False}, 1),
    ],
    ids=str,
)
def test_503_in_the_end(flavour: Flavour, said: list[str], options: dict[str, Any], tries: int) -> None:
    with answering(reply(503, BUSY, *said)) as (url, asked):
        with pytest.raises(UnavailableError) as caught:
            flavour.call(flavour.open(url, **options), "sources")
        assert len(asked) == tries
    error = caught.value
    assert (error.status, error.code, error.message, error.hint) == (503, "overloaded", "too many", "later")


@pytest.mark.parametrize("status", [400, 404, 500, 502])
def test_nothing_else_is_tried_again(flavour: Flavour, status: int) -> None:
    with answering(reply(status, b"<html>proxy</html>")) as (url, asked):
        with pytest.raises(RefusedError) as caught:
            flavour.call(flavour.open(url), "sources")
        assert len(asked) == 1
    assert (caught.value.status, caught.value.code) == (status, f"status_{status}")


@pytest.mark.parametrize(
    "said",
    [
        reply(200, b"<html>hello</html>"),
        reply(200, b""),
        reply(200, b'{"sources": 7}'),
        reply(200, b"[" * 100_000),
        reply(200, b"\xff\xfe"),
        reply(302, b"", "location: http://127.0.0.1:1/"),
        reply(200, b"x" * 2000),
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nshort",
    ],
    ids=lambda said: repr(said[:60]),
)
def test_garbage_is_a_bad_answer(flavour: Flavour, said: bytes) -> None:
    with answering(said) as (url, asked):
        with pytest.raises(BadAnswerError) as caught:
            flavour.call(flavour.open(url, max_answer_bytes=1000), "sources")
        assert len(asked) == 1
    assert caught.value.code == "bad_answer"


def test_msgpack_routes_take_no_json_for_an_answer(flavour: Flavour) -> None:
    with answering(READY) as (url, _), pytest.raises(BadAnswerError):
        flavour.call(flavour.open(url), "match", "m", Tokens(PROMPT))


def test_an_error_that_is_none_of_ours_where_503_is_an_answer(flavour: Flavour) -> None:
    with answering(reply(503, b"no backend")) as (url, _), pytest.raises(UnavailableError):
        flavour.call(flavour.open(url), "ready")


def silent(_: BaseHTTPRequestHandler) -> None:
    sleep(1.0)


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """Every byte is in time, the whole is not."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(1000):
            handler.wfile.write(b" ")
            sleep(0.02)
    except OSError:
        pass


@pytest.mark.parametrize("said", [silent, dripping])
def test_a_call_ends_when_its_time_is_over(flavour: Flavour, said: Callable[[BaseHTTPRequestHandler], None]) -> None:
    with answering(said) as (url, asked):
        began = monotonic()
        with pytest.raises(TimedOutError) as caught:
            flavour.call(flavour.open(url, timeout_s=0.2), "sources")
        assert monotonic() - began < 10
        assert len(asked) <= 1
    assert caught.value.code == "timed_out"
    assert "0.2 s" in str(caught.value)


def test_prompts_are_in_no_error_and_no_log(
    flavour: Flavour, api: Api, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """P9: tokens, keys and texts, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    secret = 3_141_592_653
    prompts = (
        Tokens([secret] * 8),
        Keys([secret] * 2),
        Text(f"Zanzibar {secret}"),
        Chat([{"role": "user", "content": f"Zanzibar {secret}"}]),
    )
    said: list[str] = []
    with answering(reply(200, b"?")) as (garbage, _), answering(reply(503, b"Zanzibar 3141592653")) as (busy, _):
        for url in (url_of(api), garbage, busy, "http://127.0.0.1:1"):
            client = flavour.open(url, retry=False)
            for prompt in prompts:
                try:
                    said.append(repr(flavour.call(client, "routed", "m", "pod-x", prompt)))
                except ClientError as error:
                    said += [str(error), repr(error), error.message, error.hint]
    out = capsys.readouterr()
    everything = "".join([*said, caplog.text, out.out, out.err])
    assert said
    assert str(secret) not in everything
    assert "Zanzibar" not in everything


@pytest.mark.parametrize(
    "url", ["", "localhost:8090", "ftp://h", "http://", "http://h:port", "http://h\n", 7], ids=repr
)
def test_what_can_not_be_an_address_is_refused_at_once(flavour: Flavour, url: Any) -> None:
    with pytest.raises(ValueError, match="url"):
        flavour.open(url)


def test_a_password_in_the_address_is_not_shown(flavour: Flavour) -> None:
    client = flavour.open("http://me:secret@127.0.0.1:1", retry=False)
    with pytest.raises(UnreachableError) as caught:
        flavour.call(client, "ready")
    assert "secret" not in repr(client) + str(caught.value)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_waits_are_finite_and_positive(flavour: Flavour, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        flavour.open("http://h", timeout_s=timeout_s)


# Connections


def test_connections_are_used_again(flavour: Flavour) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[socket.socket] = []

        def forward() -> None:
            """Answer on one connection for as long as it is used."""
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            accepted.append(connection)
            while connection.recv(65536):
                connection.sendall(READY)

        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        client = flavour.open(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert [flavour.call(client, "ready").ready for _ in range(5)] == [True] * 5
    assert len(accepted) == 1
    flavour.call(client, "close")
    thread.join(5)
    accepted[0].close()


@contextmanager
def hanging_up(*answered: int) -> Iterator[tuple[str, list[bytes]]]:
    """A server whose connections each answer so many requests, and hang up when the next one has come."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for count in answered:
                connection, _ = listener.accept()
                with connection:
                    for number in range(count + 1):
                        asked.append(_whole(connection))
                        if number < count and asked[-1]:
                            connection.sendall(REPLIES[asked[-1].split(b" ")[1].partition(b"?")[0]])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    thread.join(5)


def _whole(connection: socket.socket) -> bytes:
    """One request, or nothing."""
    received = b""
    while b"\r\n\r\n" not in received and (chunk := connection.recv(65536)):
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length and len(body) < int(length[1]):
        body += connection.recv(65536)
    return head + body


AS_MSGPACK = "content-type: application/msgpack"
REPLIES = {
    b"/ready": READY,
    b"/v1/feedback": reply(
        200, msgspec.msgpack.encode({"instance": "a", "outcome": "exact", "counted": True, "doubted": 0}), AS_MSGPACK
    ),
    b"/v1/routed": reply(
        200,
        msgspec.msgpack.encode({"model": "m", "instance": "a", "tokens": 1, "speculative_tokens": 0, "ttl_s": 2.0}),
        AS_MSGPACK,
    ),
}


@pytest.mark.parametrize("asking", [("ready",), ("routed", "m", "a", Tokens([1]))])
def test_a_kept_connection_that_is_closed_under_a_request_is_no_failure(
    flavour: Flavour, asking: tuple[Any, ...]
) -> None:
    with hanging_up(1, 1) as (url, asked):
        client = flavour.open(url)
        assert flavour.call(client, "ready").ready
        assert flavour.call(client, *asking)
        assert len(asked) == 3
        flavour.call(client, "close")


def test_what_counts_twice_if_sent_twice_is_not_sent_again(flavour: Flavour) -> None:
    with hanging_up(1, 1) as (url, asked):
        client = flavour.open(url)
        assert flavour.call(client, "ready").ready
        with pytest.raises(UnreachableError):
            flavour.call(client, "feedback", "a", 1, 1)
        assert len(asked) == 2
        assert flavour.call(client, "ready").ready
        flavour.call(client, "close")
    with hanging_up(1, 1) as (url, _):
        client = flavour.open(url)
        assert flavour.call(client, "ready").ready
        assert flavour.call(client, "feedback", "a", 1, 1, request_id="r").counted
        flavour.call(client, "close")


def test_a_new_connection_that_hangs_up_is_not_tried_again(flavour: Flavour) -> None:
    with hanging_up(0, 1) as (url, asked):
        client = flavour.open(url)
        with pytest.raises(BadAnswerError):
            flavour.call(client, "ready")
        assert len(asked) == 1
        assert flavour.call(client, "ready").ready
        flavour.call(client, "close")


# Changes


class Following:
    """Takes events of a stream of either client."""

    def __init__(self, flavour: Flavour, client: Client | AsyncClient, **about: Any) -> None:
        self._runner = flavour.runner
        self.stream = client.changes("m", **about)

    def next(self) -> Change:
        if isinstance(self.stream, Changes):
            return next(self.stream)
        return self._runner.run(_next(self.stream))

    def until_position(self) -> list[Change]:
        found = [self.next()]
        while not isinstance(found[-1], PositionEvent):
            found.append(self.next())
        return found

    def close(self) -> None:
        if isinstance(self.stream, Changes):
            self.stream.close()
        else:
            self._runner.run(self.stream.close())


async def _next(stream: AsyncChanges) -> Change:
    return await anext(stream)


def test_changes_come_typed_and_go_on_at_a_position(api: Api, flavour: Flavour) -> None:
    client = flavour.open(url_of(api))
    with closing(Following(flavour, client)) as following:
        reset, blocks, *_ = told = following.until_position()
        assert isinstance(reset, ResetEvent)
        assert isinstance(blocks, BlocksEvent)
        assert (reset.instance, reset.model, blocks.instance, blocks.rest) == ("pod-a", "m", "pod-a", 0)
        assert [(block.hash, block.key) for block in blocks.stored] == list(zip(HASHES, KEYS, strict=True))
        assert blocks.stored[0].places[0].tier == "gpu"
        assert len(told) == 5
        position = following.stream.position
    assert position
    api.store("tcp://pod-b:5557", PROMPT[:16], first=7)
    with closing(Following(flavour, client, since=position)) as following:
        assert following.stream.position == position
        change, at = following.until_position()
        assert isinstance(change, BlocksEvent)
        assert [block.hash for block in change.stored] == [7000, 7001, 7002, 7003]
        assert at == PositionEvent(2)
        assert following.stream.position != position


def test_the_end_of_changes_is_told_and_ends_the_iteration(api: Api) -> None:
    with Client(url_of(api)) as client, client.changes("m") as changes:
        assert isinstance(next(changes), ResetEvent)
        api.fleet.leaving = True
        rest = list(changes)
    assert rest[-1] == EndEvent("leaving")

    async def asynchronous() -> list[Change]:
        async with AsyncClient(url_of(api)) as client, client.changes("m") as changes:
            return [change async for change in changes]

    assert asyncio.run(asynchronous()) == [EndEvent("leaving")]


@pytest.mark.parametrize(
    ("about", "kind", "code"),
    [
        ({"tenant": "x"}, NotFoundError, "unknown_model"),
        ({"since": "?"}, InvalidRequestError, "invalid_position"),
    ],
)
def test_changes_that_are_refused(
    api: Api, flavour: Flavour, about: dict[str, str], kind: type[RefusedError], code: str
) -> None:
    with closing(Following(flavour, flavour.open(url_of(api)), **about)) as following, pytest.raises(kind) as caught:
        following.next()
    assert caught.value.code == code


EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
A_POSITION = b': changes\nretry: 1000\n\nid: here\nevent: position\ndata: {"sources": 0}\n\n'


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (EVENT_STREAM + A_POSITION, UnreachableError),
        (EVENT_STREAM + A_POSITION + b"event: gone\ndata: {}\n\n", BadAnswerError),
        (EVENT_STREAM + A_POSITION + b"event: gone\ndata: {}", UnreachableError),
        (EVENT_STREAM + A_POSITION + b"\n" + b"x" * 2000, BadAnswerError),
    ],
    ids=["ended", "garbage", "half", "endless"],
)
def test_a_stream_that_breaks_off_is_an_error_and_its_position_stays(
    flavour: Flavour, said: bytes, kind: type[ClientError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told, "MAX_EVENT_BYTES", 1000)
    with answering(said) as (url, _), closing(Following(flavour, flavour.open(url))) as following:
        assert following.next() == PositionEvent(0)
        with pytest.raises(kind):
            following.next()
        assert following.stream.position == "here"


@pytest.mark.parametrize("said", [READY, reply(200, b"{}", "content-type: text/html")])
def test_what_is_no_stream_is_a_bad_answer(flavour: Flavour, said: bytes) -> None:
    with answering(said) as (url, _):
        following = Following(flavour, flavour.open(url))
        with pytest.raises(BadAnswerError):
            following.next()


def test_a_silent_stream_is_given_up(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvindexer.client.clients.SILENCE_S", 0.1)
    with answering(silent) as (url, _):
        following = Following(flavour, flavour.open(url))
        with pytest.raises(TimedOutError):
            following.next()


@given(cuts=st.lists(st.integers(0, 400)))
def test_events_are_the_same_however_their_bytes_are_cut(cuts: list[int]) -> None:
    text = A_POSITION + b':\n\nevent: later\ndata: {"x": 1}\n\nevent: gone\ndata: {"source": "s"}\n\n'
    reader = told.Reader("url")
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events = [event for here, there in pairwise(places) for event in reader.feed(text[here:there])]
    assert events == [told.Told(PositionEvent(0), "here"), told.Told(GoneEvent("s"), None)]


def test_it_speaks_https_with_certificates_that_it_is_given(flavour: Flavour) -> None:
    context = ssl.create_default_context()
    client = flavour.open("https://127.0.0.1:1", verify=context, retry=False)
    with pytest.raises(UnreachableError):
        flavour.call(client, "ready")


def test_headers_go_with_every_request(flavour: Flavour) -> None:
    seen: list[str | None] = []

    def note(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers.get("authorization"))
        handler.wfile.write(READY)

    with answering(note) as (url, _):
        assert flavour.call(flavour.open(url, headers={"authorization": "Bearer x"}), "ready").ready
    assert seen == ["Bearer x"]


def test_it_imports_no_server() -> None:
    """A scheduler that asks needs nothing of what answers."""
    servers = {"fastapi", "starlette", "uvicorn", "uvloop", "zmq", "redis", "pydantic", "prometheus_client"}
    program = "import sys, kvindexer.client; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not servers & set(found.split())
