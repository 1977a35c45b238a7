"""How a service ends at SIGTERM: load balancers are told first, and nobody who is answered loses a request."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

from kvindexer.testing import FakeEngine, FaultProxy, LinkFaults
from served import HOST, Served
from servers import Server

DRAIN_S = 1.5


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path, "leaving", "--set", f"drain_s={DRAIN_S}")
    service.start()
    yield service
    service.close()


def ask(connection: HTTPConnection, path: str) -> tuple[int, str | None]:
    """Status of an answer, and what it says about the connection."""
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    return answer.status, answer.getheader("connection")


def status(port: int, path: str) -> int:
    """Of an answer on a connection of its own."""
    with closing(HTTPConnection(HOST, port)) as connection:
        return ask(connection, path)[0]


def test_at_sigterm_ready_is_503_and_queries_are_answered_until_the_time_is_over(service: Served) -> None:
    """Each answer ends its connection, and new connections are taken."""
    kept = HTTPConnection(HOST, service.port)
    assert ask(kept, "/ready") == (200, None)
    began = time.monotonic()
    service.tell(signal.SIGTERM)
    until_told = [ask(kept, "/health")]
    while until_told[-1][1] is None:
        until_told.append(ask(kept, "/health"))
    assert {status for status, _ in until_told} == {200}
    assert ask(HTTPConnection(HOST, service.port), "/ready") == (503, "close")
    assert ask(HTTPConnection(HOST, service.port), "/v1/sources") == (200, "close")
    assert service.wait() == 0
    assert time.monotonic() - began >= DRAIN_S


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_sigint_and_a_second_signal_end_it_without_a_farewell(
    service: Served, numbers: tuple[signal.Signals]
) -> None:
    began = time.monotonic()
    for number in numbers:
        service.tell(number)
        time.sleep(0.1)  # two signals of a kind that nobody has taken yet are one
    assert service.wait() == 0
    assert time.monotonic() - began < DRAIN_S


def test_connections_that_are_busy_at_sigterm_lose_no_request(service: Served) -> None:
    """A connection that is closed between two answers would lose the request that is under way."""
    asked, lost = [0], []

    def client() -> None:
        connection = HTTPConnection(HOST, service.port)
        try:
            while ask(connection, "/health")[1] is None:
                asked[0] += 1
        except (OSError, HTTPException) as error:
            lost.append(error)

    clients = [threading.Thread(target=client) for _ in range(16)]
    for one in clients:
        one.start()
    time.sleep(0.3)
    service.tell(signal.SIGTERM)
    for one in clients:
        one.join()
    assert asked[0] > len(clients)
    assert not lost
    assert service.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_follows_the_changes_is_told_and_holds_nobody_up(service: Served, number: signal.Signals) -> None:
    connection = HTTPConnection(HOST, service.port)
    body = b'{"endpoint": "tcp://127.0.0.1:9", "modelname": "m", "instance_id": "pod-a", "block_size": 4}'
    connection.request("POST", "/register", body)
    connection.getresponse().read()
    connection.request("GET", "/v1/changes?model=m")
    with closing(connection), connection.getresponse() as stream:
        assert stream.status == 200
        began = time.monotonic()
        service.tell(number)
        assert stream.read().endswith(b'event: end\ndata: {"code":"leaving"}\n\n')
    assert service.wait() == 0
    assert time.monotonic() - began < DRAIN_S + 2


def test_probes_on_a_port_of_their_own_hear_of_it_at_once_and_until_the_end(tmp_path: Path) -> None:
    """503 at /ready and 200 at /health for as long as queries are answered: that port doesn't close before them."""
    service = Served(tmp_path, "probed", "--set", f"drain_s={DRAIN_S}", "--set", "probe_port=0")
    service.start()
    try:
        (port,) = re.findall(rf"probes on http://{HOST}:(\d+)", service.log)
        assert status(int(port), "/ready") == 200
        began = time.monotonic()
        service.tell(signal.SIGTERM)
        while status(int(port), "/ready") == 200:
            assert time.monotonic() - began < DRAIN_S
        while time.monotonic() - began < 0.8 * DRAIN_S:
            assert status(int(port), "/ready") == 503
            assert status(int(port), "/health") == 200
            assert status(service.port, "/v1/sources") == 200
            time.sleep(0.1)
        assert service.wait() == 0
    finally:
        service.close()


@pytest.mark.proof
def test_the_end_is_bounded_whoever_does_not_let_go(tmp_path: Path) -> None:
    """A client that sends half a request, a Redis that doesn't answer any more, an engine that never answers."""
    drain_s, grace_s = 0.2, 1.0
    with ExitStack() as stack:
        redis = stack.enter_context(Server())
        proxy = stack.enter_context(FaultProxy(HOST, redis.port))
        engine = stack.enter_context(FakeEngine())
        mute = stack.enter_context(socket.create_server((HOST, 0)))
        service = Served(
            tmp_path,
            "held",
            *("--set", f"drain_s={drain_s}", "--set", f"shutdown_grace_s={grace_s}"),
            *("--set", "store_timeout_s=60", "--set", "receive_timeout_s=60", "--set", "sync_deadline_s=1"),
            *("--store", f"redis://{HOST}:{proxy.port}"),
            *("--source", f"instance=a,model=m,block_size=16,endpoint={engine.endpoint}"),
            *("--source", f"instance=b,model=m,block_size=16,endpoint=http://{HOST}:{mute.getsockname()[1]}"),
        )
        service.start()
        stack.callback(service.close)
        stack.callback(mute.accept()[0].close)  # the service waits for its list
        engine.wait_for_subscribers()
        half = stack.enter_context(socket.create_connection((HOST, service.port)))
        half.sendall(b"POST /v1/match HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        proxy.faults = LinkFaults(stall=True)
        engine.run_request(list(range(64)))  # something to write
        began = time.monotonic()
        service.tell(signal.SIGTERM)
        while service.running:
            service.tell(signal.SIGHUP)  # somebody who wants the settings read again doesn't cut it short
            time.sleep(0.05)
        assert service.wait() == 0
        assert time.monotonic() - began < drain_s + 2 * grace_s + 1.8, "the engine's five seconds would be longer"
