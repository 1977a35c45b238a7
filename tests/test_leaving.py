"""How a service ends at SIGTERM: load balancers are told first, and nobody who is answered loses a request."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

from served import HOST, Served

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
