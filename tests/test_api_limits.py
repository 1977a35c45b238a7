"""Trap 26, and what surrounds it: bodies that are too large, too slow, too deep, or no JSON; too many at once."""

from __future__ import annotations

import json
import logging
import socket
import struct
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest

from api_server import Api, error, serving, until
from kvindexer.api.connection import MAX_HEAD_BYTES
from kvindexer.types import Keyspace

HOT = ("/v1/match", "/v1/match/batch", "/v1/keys", "/query", "/query_by_hash")
NEWER = (
    *("/v1/explain", "/v1/routed", "/v1/feedback", "/v1/blocks/locate", "/v1/offload/plan"),
    *("/score_completions", "/score_chat_completions"),
)
OLDER = (*HOT, "/register", "/unregister")
BODIES = (*OLDER, *NEWER)
PACKED = ("/v1/match", "/v1/match/batch", "/v1/keys", *NEWER)
"""Routes that take msgpack."""
AS_MSGPACK = {"content-type": "application/msgpack"}
LIMIT = 4096


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as running:
        running.add("pod-a")
        yield running


@contextmanager
def connected(api: Api) -> Iterator[socket.socket]:
    """A socket for requests that no HTTP client would send."""
    with socket.create_connection(api.address, timeout=30) as raw:
        yield raw


def answer(raw: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and JSON of an answer, read to its end."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = raw.recv(65536)
        assert chunk, received
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += raw.recv(65536)
    return int(first.split()[1]), headers, json.loads(body)["error"]


def head(path: str, *headers: str) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "host: test", *headers, "", "")).encode()


def still_answers(api: Api) -> bool:
    """Whether the service answers a query as if nothing had been."""
    return bool(api.post("/query", {"model": "m", "token_ids": [1]}) == {"default": {}})


# Head


def test_these_tests_reach_the_service_through_its_own_listener() -> None:
    """Its bounds on heads, and its headers, are seen by all of them, as each one's settings say."""
    with serving(receive_timeout_s=0.2) as api:
        assert api.client.get("/health").headers["x-content-type-options"] == "nosniff"
        with connected(api) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nx: ".ljust(MAX_HEAD_BYTES + 1, b"y"))
            assert answer(raw)[0] == 431
        with connected(api) as raw:
            raw.sendall(b"POST /query HTTP/1.1\r\n")
            assert answer(raw)[0] == 408


# Size


@pytest.mark.parametrize("path", BODIES)
def test_trap_26_a_body_over_the_limit_is_413(path: str) -> None:
    with serving(max_body_bytes=LIMIT) as api:
        status, code, hint = api.refused(path, b" " * (LIMIT + 1))
        assert (status, code) == (413, "too_large")
        assert "max_body_bytes" in hint
        assert api.refused(path, b" " * LIMIT)[0] == 400


@pytest.mark.parametrize("size", [LIMIT + 1, 3 * LIMIT, 100 * LIMIT])
def test_trap_26_a_body_in_chunks_without_a_length_is_413(size: int) -> None:
    with serving(max_body_bytes=LIMIT) as api, connected(api) as raw:
        raw.sendall(head("/v1/match", "transfer-encoding: chunked"))
        for _ in range(0, size, 1024):
            raw.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
            if size > 2 * LIMIT:
                break
        if size > 2 * LIMIT:
            raw.sendall(b"%x\r\n" % (2 * LIMIT) + b" " * (2 * LIMIT) + b"\r\n")
        else:
            raw.sendall(b"0\r\n\r\n")
        status, _, detail = answer(raw)
        assert (status, detail["code"]) == (413, "too_large")


def test_trap_26_a_length_far_over_the_limit_is_refused_before_the_body_is_sent() -> None:
    with serving(max_body_bytes=LIMIT) as api, connected(api) as raw:
        raw.sendall(head("/query", f"content-length: {10**15}"))
        status, headers, detail = answer(raw)
        assert (status, detail["code"], headers["connection"]) == (413, "too_large", "close")
        assert raw.recv(1) == b""


def test_a_client_that_asks_before_sending_is_told_at_once() -> None:
    with serving(max_body_bytes=LIMIT) as api, connected(api) as raw:
        raw.sendall(head("/query", f"content-length: {LIMIT + 1}", "expect: 100-continue"))
        assert answer(raw)[0] == 413


def test_trap_26_a_length_that_promises_more_than_comes_times_out() -> None:
    with serving(receive_timeout_s=0.2) as api, connected(api) as raw:
        raw.sendall(head("/query", "content-length: 100") + b"{}")
        status, headers, detail = answer(raw)
        assert (status, detail["code"], headers["connection"]) == (408, "receive_timeout", "close")
        assert "receive_timeout_s" in detail["hint"]
        until(lambda: 'requests_total{route="/query",status="408"} 1.0' in api.client.get("/metrics").text)
        assert 'duration_seconds_count{route="/query"}' not in api.client.get("/metrics").text


def test_trap_26_a_length_that_promises_less_than_comes_ends_the_body() -> None:
    """What comes behind it would be the next request; it is none."""
    body = b'{"model":"x","token_ids":[1]}'
    with serving() as api, connected(api) as raw:
        api.add("pod-a")
        raw.sendall(head("/query", f"content-length: {len(body) - 1}") + body + b"]]]]\r\n\r\n")
        assert raw.recv(12) == b"HTTP/1.1 400"
        assert still_answers(api)


def test_a_client_that_goes_away_half_way_harms_nobody(api: Api) -> None:
    with connected(api) as raw:
        raw.sendall(head("/query", "content-length: 100") + b"{")
    with connected(api) as raw:
        raw.sendall(head("/query", "transfer-encoding: chunked") + b"2\r\n{}\r\n")
    assert still_answers(api)


@pytest.mark.parametrize("path", [*HOT[:1], *OLDER[-1:], *NEWER[:1]])
def test_trap_26_a_dripping_body_is_408(path: str) -> None:
    with serving(receive_timeout_s=0.3) as api, connected(api) as raw:
        raw.sendall(head(path, "content-length: 1000000"))
        raw.settimeout(0.02)
        received = b""
        while not received:
            raw.sendall(b" ")
            try:
                received = raw.recv(12)
            except TimeoutError:
                continue
        assert received == b"HTTP/1.1 408"


# JSON


MALFORMED: list[tuple[bytes, set[str]]] = [
    (b"", {"malformed_json"}),
    (b"{", {"malformed_json"}),
    (b"[]", {"invalid_request"}),
    (b"null", {"invalid_request"}),
    (b'{"model": "\xff"}', {"malformed_json"}),
    (b"\xff\xfe", {"malformed_json"}),
    (b'{"x": NaN}', {"malformed_json", "unknown_field"}),
    (b'{"x": Infinity}', {"malformed_json", "unknown_field"}),
    (b'{"model": NaN}', {"malformed_json"}),
    (b'{"model": "\\ud800"}', {"malformed_json"}),
    (b'{"model": 7}', {"invalid_request"}),
    (b'{"x":' + b"[" * 1_000_000, {"malformed_json", "unknown_field"}),
    (b'{"x":' + b'{"x":' * 200_000, {"malformed_json", "unknown_field"}),
    (b"[" * 1_000_000, {"invalid_request"}),
]


@pytest.mark.parametrize("path", BODIES)
def test_trap_26_what_is_no_usable_json_is_400_or_422(api: Api, path: str) -> None:
    for body, codes in MALFORMED:
        status, code, hint = api.refused(path, body)
        assert code in codes, body[:24]
        assert status == (400 if code == "malformed_json" else 422)
        assert hint
    assert still_answers(api)


def test_trap_26_million_nested_brackets_that_close_again(api: Api) -> None:
    depth = 1_000_000
    body = b'{"model":"m","token_ids":[1],"x":' + b"[" * depth + b"]" * depth + b"}"
    assert api.refused("/query", body)[:2] == (400, "malformed_json")


@pytest.mark.parametrize(
    "tokens", ["[-1]", "[4294967296]", "[1e30]", "[1.5]", "[true]", '["1"]', "[null]", "[[1]]", "{}", "[1e400]"]
)
@pytest.mark.parametrize("path", ["/v1/match", "/v1/keys", "/query"])
def test_trap_26_token_ids_that_are_none_are_422(api: Api, path: str, tokens: str) -> None:
    field = "token_ids" if path == "/query" else "tokens"
    body = f'{{"model": "m", "{field}": {tokens}}}'.encode()
    response = api.client.post(path, content=body)
    assert error(response)[0] == 422
    assert "429496729" not in response.json()["error"]["message"]


def test_trap_26_of_duplicate_keys_the_last_one_counts(api: Api) -> None:
    body = b'{"model":"nobody","model":"m","tokens":"x","tokens":[1,2]}'
    assert api.refused("/v1/match", body)[:2] == (422, "invalid_request")
    body = b'{"model":"nobody","model":"m","tokens":[1],"tokens":[1,2]}'
    response = api.client.post("/v1/match", content=body)
    assert (response.status_code, response.json()["tokens"]) == (200, 2)


def test_errors_never_echo_the_body(api: Api) -> None:
    """But for the name of a field that nobody knows."""
    unwanted = "a-word-of-the-body"
    for path, body in (
        ("/v1/match", {"model": "m", "tokens": [unwanted]}),
        ("/v1/match", {"model": "m", "tokens": [1], "other": unwanted}),
        ("/v1/match", {"model": "m", "tokens": [1], "weights": {"other": [{unwanted: unwanted}]}}),
        ("/v1/match", {"model": "m", "tokens": [1], "require": [unwanted]}),
        ("/v1/match", {"model": "m", "tokens": [1], "cache_salt": [unwanted]}),
        ("/query", {"model": "m", "token_ids": unwanted}),
        ("/query_by_hash", {"model": "m", "seq_hashes": [1], "cache_salt": unwanted}),
        ("/register", {"instance_id": "a", "type": unwanted, "model": "m", "endpoint": "tcp://h:1", "block_size": 4}),
        ("/register", {"instance_id": "a", "report_mode": unwanted, "endpoint": "tcp://h:1", "block_size": 4}),
        ("/unregister", {"instance_id": {unwanted: 1}}),
    ):
        response = api.client.post(path, json=body)
        assert response.status_code in (400, 422)
        assert unwanted not in response.text


# Counts


def test_trap_26_more_tokens_than_the_limit_are_413(api: Api) -> None:
    """The default limit is 2**20 tokens: 1,000,000 pass, 1,100,000 don't, however they are given."""
    prompt = [7] * 1_000_000
    assert api.post("/v1/match", {"model": "m", "tokens": prompt})["tokens"] == 1_000_000
    prompt += [7] * 100_000
    packed = b64encode(struct.pack(f"<{len(prompt)}I", *prompt)).decode()
    for path, body in (
        ("/v1/match", {"tokens": prompt}),
        ("/v1/match", {"tokens_b64": packed}),
        ("/v1/match", {"keys": prompt[:300_000]}),
        ("/v1/keys", {"tokens": prompt}),
        ("/v1/keys", {"tokens_b64": packed}),
        ("/query", {"token_ids": prompt}),
        ("/query_by_hash", {"seq_hashes": prompt[:300_000]}),
        ("/query_by_hash", {"block_hashes": prompt[:300_000]}),
    ):
        status, code, hint = api.refused(path, {"model": "m", **body})
        assert (status, code) == (413, "too_large")
        assert "max_prompt_tokens" in hint


@pytest.mark.parametrize("path", [*HOT, *NEWER])
def test_a_body_full_of_values_is_refused_before_it_is_decoded(api: Api, path: str) -> None:
    body = b'{"x":[' + b"1," * 5_000_000 + b"1]}"
    assert api.refused(path, body)[:2] == (413, "too_large")


@pytest.mark.parametrize("path", PACKED)
def test_a_packed_body_full_of_values_is_refused_before_it_is_decoded(api: Api, path: str) -> None:
    body = b"\x81\xa1x\xdd" + struct.pack(">I", 5_000_000) + b"\x01" * 5_000_000
    assert api.refused(path, body, headers=AS_MSGPACK)[:2] == (413, "too_large")


# Values


DEEP = 1_000_000
DEEP_FIELDS = ("/v1/match", "/v1/explain", "/v1/keys", "/v1/routed", "/score_chat_completions")


@pytest.mark.parametrize("path", DEEP_FIELDS)
def test_trap_26_a_million_brackets_where_any_depth_is_allowed(api: Api, path: str) -> None:
    for field in ("messages", "tools"):
        body = f'{{"model":"m","{field}":'.encode() + b'[{"x":' * DEEP + b"1" + b"}]" * DEEP + b"}"
        assert api.refused(path, body)[:2] == (400, "malformed_json")
        name = bytes([0xA0 + len(field)]) + field.encode()
        packed = b"\x82\xa5model\xa1m" + name + b"\x91\x81\xa1x" * 100_000 + b"\x01"
        assert api.refused(path, packed, headers=AS_MSGPACK)[:2] == (400, "malformed_msgpack")
    assert still_answers(api)


ABOUT_NUMBERS = [
    ("/v1/routed", {"model": "m", "instance": "pod-a", "keys": [1], "block_size": ...}),
    ("/v1/routed", {"model": "m", "instance": "pod-a", "keys": [1], "prompt_tokens": ...}),
    ("/v1/feedback", {"instance": "pod-a", "predicted_tokens": ..., "cached_tokens": 1}),
    ("/v1/feedback", {"instance": "pod-a", "predicted_tokens": 1, "cached_tokens": 1, "rank": ...}),
    ("/v1/blocks/locate", {"model": "m", "keys": [1], "block_size": ...}),
    ("/v1/offload/plan", {"instance": "pod-a", "tier": "gpu", "hashes": [1], "rank": ...}),
    ("/v1/explain", {"model": "m", "tokens": [1], "top_k": ...}),
    ("/v1/match/batch", {"model": "m", "prompts": [], "top_k": ...}),
]


NO_NUMBERS = ("1" + "0" * 5000, "-1e400", "1e400", str(2**64), "-1", "1.5", "true", '"1"', "[]")


@pytest.mark.parametrize(("path", "body"), ABOUT_NUMBERS)
def test_trap_26_numbers_that_are_none_of_the_field_are_refused(api: Api, path: str, body: dict[str, Any]) -> None:
    text = json.dumps(_with(body, 4))
    assert api.client.post(path, content=text).status_code in (200, 404)
    for number in NO_NUMBERS:
        code = api.refused(path, text.replace(": 4", f": {number}").encode())[:2]
        assert code in ((422, "invalid_request"), (400, "malformed_json"))
        assert code[0] == 422 or "e400" in number


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/routed", {"model": "m", "instance": "pod-a", "tokens": [1], "ttl_s": ...}),
        ("/v1/offload/plan", {"instance": "pod-a", "tier": "gpu", "hashes": [1], "hot_from": ...}),
        ("/v1/match", {"model": "m", "tokens": [1], "weights": {"gpu": ...}}),
        ("/v1/explain", {"model": "m", "tokens": [1], "weights": {"disk": ...}}),
        ("/v1/feedback", {"instance": "pod-a", "predicted_tokens": ..., "cached_tokens": 1}),
        ("/v1/blocks/locate", {"model": "m", "keys": [...]}),
    ],
)
def test_trap_26_msgpack_has_numbers_that_are_none(api: Api, path: str, body: dict[str, Any]) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        packed = msgpack.packb(_with(body, value))
        assert api.refused(path, packed, headers=AS_MSGPACK)[:2] == (422, "invalid_request")


def _with(value: Any, number: Any) -> Any:
    if value is ...:
        return number
    if isinstance(value, dict):
        return {name: _with(inner, number) for name, inner in value.items()}
    return [_with(inner, number) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", NEWER)
def test_trap_26_of_duplicate_keys_the_last_one_counts_everywhere(api: Api, path: str) -> None:
    name = "instance" if path in ("/v1/feedback", "/v1/offload/plan") else "model"
    body = f'{{"{name}": "m", "{name}": [1]}}'.encode()
    assert api.refused(path, body)[:2] == (422, "invalid_request")
    twice = bytes([0xA0 + len(name)]) + name.encode()
    packed = b"\x82" + twice + b"\xa1m" + twice + b"\x91\x01"
    assert api.refused(path, packed, headers=AS_MSGPACK)[:2] == (422, "invalid_request")


@pytest.mark.parametrize("path", NEWER)
def test_trap_26_a_packed_body_that_is_none_is_400_or_422(api: Api, path: str) -> None:
    for body in (b"", b"\xc1", b"\x93\x01", b"\x81\xa5model", b"\xdf\xff\xff\xff\xff", b"\x91" * 500_000):
        assert api.refused(path, body, headers=AS_MSGPACK)[0] in (400, 422)
    assert still_answers(api)


LONG = "x" * 2000
WRONG_PARAMETERS = [
    *[
        (f"/v1/heat/{what}", name)
        for what in ("prefixes", "single", "prewarm")
        for name in ("model", "tenant", "additional_salt")
    ],
    *[("/v1/changes", name) for name in ("model", "tenant", "additional_salt", "since")],
    *[("/v1/sources", name) for name in ("model", "tenant", "instance")],
    *[("/v1/tiers", name) for name in ("model", "tenant")],
    *[("/workers", name) for name in ("model_name", "routing_group", "tenant_id")],
]


def test_trap_26_parameters_that_are_too_long_are_422_and_not_sent_back(api: Api) -> None:
    for path, name in WRONG_PARAMETERS:
        response = api.client.get(path, params={"model": "m", "instance": "pod-a", name: LONG})
        assert error(response)[0] == 422, (path, name)
        assert LONG not in response.text


NO_TOPS = ("", "x", "1.5", "1e2", "-1", "9" * 5000, "NaN", "%00", "1&top=0", "101")


@pytest.mark.parametrize("what", ["prefixes", "single", "prewarm"])
def test_trap_26_parameters_of_a_wrong_type_are_422(api: Api, what: str) -> None:
    for top in NO_TOPS:
        response = api.client.get(f"/v1/heat/{what}?model=m&instance=pod-a&top={top}")
        assert error(response)[:2] == (422, "invalid_request"), top


def test_bytes_in_parameters_that_are_no_text_harm_nobody(api: Api) -> None:
    for path in ("/v1/heat/prefixes", "/v1/changes", "/v1/sources", "/v1/tiers", "/workers"):
        for given in ("%ff%fe", "%00", "%ed%a0%80", "%", "%zz"):
            response = api.client.get(f"{path}?model={given}&tenant={given}&model_name={given}")
            assert response.status_code in (200, 404, 422), path
    assert still_answers(api)


def test_trap_26_a_hundred_thousand_candidates_are_413(api: Api) -> None:
    body = {"model": "m", "tokens": [1], "candidates": [f"pod-{n}" for n in range(100_000)]}
    status, code, hint = api.refused("/v1/match", body)
    assert (status, code) == (413, "too_large")
    assert "max_candidates" in hint


# Concurrency


def test_more_requests_than_the_limit_are_shed_and_probes_are_not() -> None:
    with serving(max_concurrent_requests=1) as api, connected(api) as raw:
        raw.sendall(head("/query", "content-length: 1000"))
        until(lambda: api.client.get("/workers").status_code == 503)
        response = api.client.get("/workers")
        assert error(response)[:2] == (503, "overloaded")
        assert response.headers["retry-after"] == "1"
        assert api.refused("/v1/match", {"model": "m", "tokens": [1]})[:2] == (503, "overloaded")
        for path in ("/health", "/ready", "/metrics"):
            assert api.client.get(path).status_code == 200
        raw.close()
        until(lambda: api.client.get("/workers").status_code == 200)
        assert api.refused("/v1/match", {"model": "m", "tokens": [1]})[0] == 404


# Faults of ours


@pytest.mark.parametrize("path", ["/v1/match", "/v1/sources"])
def test_a_fault_of_ours_is_logged_without_what_the_caller_sent(
    api: Api, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = [4711] * 4

    def broken(*_: object) -> object:
        raise KeyError(f"no such prompt: {prompt}")

    monkeypatch.setattr(api.index, "match", broken)
    monkeypatch.setattr(api.fleet, "reports", broken)
    with caplog.at_level(logging.DEBUG):
        body = {"model": "m", "tokens": prompt}
        response = api.client.post(path, json=body) if path == "/v1/match" else api.client.get(path)
        until(lambda: "in broken" in caplog.text)
    assert error(response)[:2] == (500, "internal")
    assert f"{path} failed: KeyError" in caplog.text
    assert "4711" not in caplog.text
    assert "Traceback" not in response.text
    monkeypatch.undo()
    assert still_answers(api)


def test_unknown_routes_and_methods_have_the_one_error_shape(api: Api) -> None:
    assert error(api.client.get("/v2/match"))[:2] == (404, "not_found")
    assert error(api.client.post("/v1/match/", json={}))[:2] == (404, "not_found")
    response = api.client.delete("/workers")
    assert error(response)[:2] == (405, "method_not_allowed")
    assert response.headers["allow"] == "GET"
    assert api.index.keyspaces("default", "m") == [Keyspace("default", "m", "", 4)]
