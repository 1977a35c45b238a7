"""Connections: slow and endless heads, answers that nobody takes, too many at once; and headers of all answers."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from api_server import until
from kvindexer.api import docs_page
from kvindexer.api.connection import MAX_HEAD_BYTES
from listening import HOST, heard, listening

GET = b"GET /v1/sources HTTP/1.1\r\nhost: x\r\n\r\n"


def refusal(said: bytes) -> tuple[int, dict[str, str], dict[str, str]]:
    """Status, headers and error of an answer."""
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, json.loads(body)["error"]


def answer(connection: socket.socket) -> bytes:
    """One answer, whole: its head and its body may come apart."""
    said = b""
    while not (length := re.search(rb"content-length: (\d+)\r\n", said)) or b"\r\n\r\n" not in said:
        piece = connection.recv(65536)
        assert piece, said
        said += piece
    while len(said.partition(b"\r\n\r\n")[2]) < int(length[1]):
        piece = connection.recv(65536)
        assert piece, said
        said += piece
    return said


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize(
    "sent",
    [
        b"G",
        b"GET /v1/match HTTP/1.1\r\nhost: x\r\n",
        GET + b"GET /v1/sources HT",
    ],
)
def test_a_head_that_does_not_come_to_its_end_is_given_up(loop: str, sent: bytes) -> None:
    """Also behind a request that was answered."""
    with listening(loop, receive_timeout_s=0.2) as there, there.dial() as connection:
        connection.sendall(sent)
        said = heard(connection)
        said = said[said.rindex(b"HTTP/1.1 ") :]
        status, headers, error = refusal(said)
        assert (status, error["code"]) == (408, "receive_timeout")
        assert headers["connection"] == "close"


def test_stray_line_ends_keep_no_connection() -> None:
    with listening(receive_timeout_s=0.2) as there, there.dial() as connection:
        connection.sendall(GET)
        assert answer(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"\r\n")
        assert refusal(heard(connection))[0] == 408


def test_a_head_that_drips_is_given_up_in_time() -> None:
    """A byte now and then doesn't begin the time anew."""
    with listening(receive_timeout_s=0.5) as there, there.dial() as connection:
        began = time.monotonic()
        head = iter(b"GET /v1/sources HTTP/1.1\r\nx: " + b"y" * 100_000)
        connection.setblocking(False)  # noqa: FBT003 - the standard library's
        said = b""
        while not said:
            assert time.monotonic() - began < 20
            try:
                connection.send(bytes([next(head)]))
                time.sleep(0.02)
                said = connection.recv(65536)
            except BlockingIOError:
                pass
        assert refusal(said)[0] == 408


def test_who_says_nothing_at_all_is_left_without_a_word() -> None:
    with listening(receive_timeout_s=0.2) as there, there.dial() as connection:
        assert heard(connection) == b""


def test_a_head_without_end_is_cut_off() -> None:
    with listening() as there, there.dial() as connection:
        head = b"GET / HTTP/1.1\r\nx: "
        connection.sendall(head + b"y" * (MAX_HEAD_BYTES + 1 - len(head)))
        status, _, error = refusal(heard(connection))
        assert (status, error["code"]) == (431, "too_large")


def test_a_head_in_pieces_is_read() -> None:
    with listening(receive_timeout_s=5) as there, there.dial() as connection:
        for piece in (b"GET /v1/sou", b"rces HTTP/1.1\r\nho", b"st: x\r\nconnection: close\r\n", b"\r\n"):
            connection.sendall(piece)
            time.sleep(0.02)  # so that they are no single piece; whatever comes of it, the answer is the same
        assert heard(connection).startswith(b"HTTP/1.1 200 ")


def test_a_connection_may_be_used_for_longer_than_a_head_may_take() -> None:
    with listening(receive_timeout_s=0.2) as there, there.client() as client:
        until_s = time.monotonic() + 0.5
        while time.monotonic() < until_s:
            assert client.get("/v1/sources").status_code == 200
        assert there.server.server_state.total_requests > 3


def test_a_head_that_came_in_time_is_no_reason_to_hang_up_later() -> None:
    with listening(receive_timeout_s=0.3) as there, there.dial() as connection:
        connection.sendall(GET[:10])
        until(lambda: any(each._head_timer for each in there.server.server_state.connections))  # type: ignore[union-attr]
        connection.sendall(GET[10:])
        assert answer(connection).startswith(b"HTTP/1.1 200 ")
        until_s = time.monotonic() + 0.6
        while time.monotonic() < until_s:
            connection.sendall(GET)
            assert answer(connection).startswith(b"HTTP/1.1 200 ")


def test_what_is_no_http_is_refused_in_the_one_error_shape() -> None:
    with listening() as there, there.dial() as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, _, error = refusal(heard(connection))
        assert (status, error["code"]) == (400, "invalid_request")


def test_who_takes_nothing_of_an_answer_is_cut_off() -> None:
    """And so holds no place among the requests that are answered at once."""
    with listening(send_timeout_s=0.3, max_concurrent_requests=1) as there:
        for number in range(200):
            there.api.add(f"pod-{number}")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((HOST, there.port))
            connection.sendall(GET * 200)
            with there.client() as client:
                until(lambda: client.get("/v1/match").status_code == 503 or not there.server.server_state.connections)
                until(lambda: client.get("/v1/sources").status_code == 200)
                until(lambda: len(there.server.server_state.connections) == 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_one_connection_too_many_is_told_to_come_back() -> None:
    with listening(max_connections=3) as there, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(there.dial())
        until(lambda: len(there.server.server_state.connections) == 3)
        with there.dial() as connection:
            status, headers, error = refusal(heard(connection))
            assert (status, error["code"]) == (503, "overloaded")
            assert headers["retry-after"]
        stack.close()
        until(lambda: not there.server.server_state.connections)
        with there.client() as client:
            assert client.get("/v1/sources").status_code == 200


# Bodies of those who are not let in


def closed(tmp_path: Path) -> str:
    path = tmp_path / "tokens.yaml"
    path.write_text('tokens: [{name: x, token: "a-token-of-the-test", roles: [query]}]')
    path.chmod(0o600)
    return str(path)


def test_who_sends_a_long_prompt_with_a_wrong_token_is_told_so(tmp_path: Path) -> None:
    """By a client that sends everything before it reads: what is on the way is read, and forgotten."""
    with listening(auth_tokens_file=closed(tmp_path), max_body_bytes=2**24) as there:
        for _ in range(5):
            connection = HTTPConnection(HOST, there.port, timeout=20)
            connection.request("POST", "/v1/match", b"x" * 2**23, {"authorization": "Bearer wrong"})
            assert connection.getresponse().status == 401
            connection.close()


def test_no_more_is_read_of_it_than_of_other_bodies(tmp_path: Path) -> None:
    """Nor from one who asks first, nor for longer."""
    chosen: dict[str, Any] = {"auth_tokens_file": closed(tmp_path), "max_body_bytes": 1000, "receive_timeout_s": 0.2}
    head = b"POST /v1/match HTTP/1.1\r\nhost: x\r\n"
    each = (
        b"content-length: 1001\r\n\r\n",
        b"content-length: 10\r\nexpect: 100-continue\r\n\r\n",
        b"content-length: 10\r\n\r\n123",
        b"transfer-encoding: chunked\r\n\r\n" + b"3e9\r\n" + b"x" * 1001 + b"\r\n",
    )
    with listening(**chosen) as there:
        for more in each:
            with there.dial() as connection:
                connection.sendall(head + more)
                said = heard(connection)
                assert b"100 Continue" not in said
                assert refusal(said)[0] == 401


# Headers


def test_every_answer_has_the_headers_that_a_reviewer_expects() -> None:
    with listening() as there, there.client() as client:
        for path in ("/v1/sources", "/health", "/metrics", "/docs", "/openapi.json", "/nowhere", "/v1/match"):
            headers = client.get(path).headers
            assert headers.get_list("x-content-type-options") == ["nosniff"]
            assert headers.get_list("cache-control") == ["no-store"]
            assert "server" not in headers
            assert "strict-transport-security" not in headers


def test_changes_has_each_header_once() -> None:
    with listening() as there, there.client() as client:
        there.api.add("a-pod")
        with client.stream("GET", "/v1/changes", params={"model": "m"}) as response:
            assert response.headers.get_list("cache-control") == ["no-store"]


def test_an_answer_without_an_application_has_them_too() -> None:
    with listening() as there, there.dial() as connection:
        connection.sendall(b"?\r\n\r\n")
        _, headers, _ = refusal(heard(connection))
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_an_upgrade_is_not_taken() -> None:
    upgrade = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n"
    with listening() as there, there.dial() as connection:
        connection.sendall(b"GET /v1/sources HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert heard(connection).startswith(b"HTTP/1.1 200 ")


# /docs


def test_the_page_of_the_routes_needs_nothing_from_elsewhere() -> None:
    """No script, no address of another server, and a policy under which its own style works."""
    with listening() as there, there.client() as client:
        response = client.get("/docs")
        text = response.text
        document: dict[str, Any] = client.get("/openapi.json").json()
    assert "<script" not in text
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert text.count("<style>") == 1
    for path, operations in document["paths"].items():
        assert all(f">{method.upper()} {path}</h3>" in text for method in operations)
    assert "<td>Token ids of the prompt." in text, "of fields that may be absent, too"
    titles = {f"{method.upper()}:{path}" for path, operations in document["paths"].items() for method in operations}
    ids = set(re.findall(r' id="([^"]+)"', text))
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert titles <= links <= ids == titles | set(document["components"]["schemas"])


def test_the_page_shows_text_as_text() -> None:
    nasty = "<script>alert(1)</script>"
    document = {
        "info": {"title": nasty, "version": nasty, "summary": nasty, "description": nasty},
        "paths": {nasty: {"get": {"summary": nasty, "parameters": [{"name": nasty, "schema": {"enum": [nasty]}}]}}},
        "components": {"schemas": {nasty: {"description": nasty, "properties": {nasty: {"type": nasty}}}}},
    }
    assert nasty not in docs_page.page(document)


# Probes


def test_probes_have_a_port_of_their_own() -> None:
    """There /health says everything, to everybody; nothing else is there."""
    with listening(probe_port=0) as there:
        there.api.add("a-pod")
        there.api.fleet.statuses["a-pod"] = there.api.fleet.status("a-pod")._replace(state="stale")
        connection = HTTPConnection(HOST, there.probe_port, timeout=20)

        def get(path: str) -> tuple[int, bytes]:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

        health = json.loads(get("/health")[1])
        assert [problem["instance"] for problem in health["problems"]] == ["a-pod"]
        assert get("/ready")[0] == 200
        assert b"kvindexer_" in get("/metrics")[1]
        there.api.fleet.ready = False
        assert get("/ready")[0] == 503
        for path in ("/v1/sources", "/v1/match", "/docs", "/openapi.json", "/register", "/"):
            assert get(path)[0] == 404
        connection.close()
        with there.client() as client:
            assert client.get("/ready").status_code == 503, "it is on the service's port, too"
