"""The load balancer between plain clients and small HTTP servers."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from api_server import until
from kvindexer.testing import Backend, Balancer

HOST = "127.0.0.1"
PATIENCE_S = 30.0
NEVER_S = 3600.0


class Service:
    """A server that says its name, and whether it is ready."""

    def __init__(self, name: str) -> None:
        self.ready = True
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                text = name.encode()
                self.send_response(200 if service.ready or self.path != "/ready" else 503)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._server.daemon_threads = True
        self.backend = Backend(HOST, self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """End it.  May be called twice."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def services() -> Iterator[list[Service]]:
    services = [Service(name) for name in "abc"]
    yield services
    for one in services:
        one.close()


@pytest.fixture
def balancer(services: list[Service]) -> Iterator[Balancer]:
    with Balancer([one.backend for one in services], check_interval_s=0.02) as between:
        until(lambda: len(between.ready) == len(services))
        yield between


def get(connection: HTTPConnection) -> HTTPResponse:
    connection.request("GET", "/")
    return connection.getresponse()


def ask(balancer: Balancer) -> str:
    """The name of the server that answers a new connection."""
    connection = HTTPConnection(HOST, balancer.port, timeout=PATIENCE_S)
    name = get(connection).read().decode()
    connection.close()
    return name


def test_connections_go_in_turn_and_stay_where_they_are(balancer: Balancer) -> None:
    assert Counter(ask(balancer) for _ in range(9)) == {"a": 3, "b": 3, "c": 3}
    kept = HTTPConnection(HOST, balancer.port, timeout=PATIENCE_S)
    assert len({get(kept).read() for _ in range(5)}) == 1
    kept.close()


def test_a_backend_that_is_not_ready_gets_nothing_until_it_is(services: list[Service], balancer: Balancer) -> None:
    services[0].ready = False
    until(lambda: services[0].backend not in balancer.ready)
    assert Counter(ask(balancer) for _ in range(6)) == {"b": 3, "c": 3}
    services[0].ready = True
    until(lambda: services[0].backend in balancer.ready)
    assert {ask(balancer) for _ in range(3)} == {"a", "b", "c"}


def test_a_connection_that_is_refused_goes_to_the_next_backend(services: list[Service]) -> None:
    """Also before the next check finds out."""
    with Balancer([one.backend for one in services], check_interval_s=NEVER_S) as balancer:
        until(lambda: len(balancer.ready) == len(services))
        services[1].close()
        assert Counter(ask(balancer) for _ in range(6)) == {"a": 3, "c": 3}
        assert balancer.ready == {services[0].backend, services[2].backend}


def test_where_nobody_is_ready_the_answer_is_503(services: list[Service], balancer: Balancer) -> None:
    for one in services:
        one.ready = False
    until(lambda: not balancer.ready)
    connection = HTTPConnection(HOST, balancer.port, timeout=PATIENCE_S)
    answer = get(connection)
    assert (answer.status, answer.getheader("retry-after")) == (503, "1")
    assert b"no replica is ready" in answer.read()
    connection.close()


def test_behind_close_nothing_is_left(services: list[Service]) -> None:
    """Neither the listener nor connections nor the thread; and closing twice is fine."""
    before = threading.active_count()
    balancer = Balancer([one.backend for one in services])
    until(lambda: bool(balancer.ready))
    kept = socket.create_connection((HOST, balancer.port), timeout=PATIENCE_S)
    kept.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert kept.recv(12) == b"HTTP/1.1 200"
    balancer.close()
    balancer.close()
    until(lambda: threading.active_count() <= before + len(services))  # those of the servers' own connections
    assert drained(kept)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, balancer.port))
    kept.close()
    gc.collect()


def drained(client: socket.socket) -> bool:
    """The connection has come to an end, with or without a reset."""
    with contextlib.suppress(ConnectionResetError):
        while client.recv(1 << 16):
            pass
    return True
