"""Probes share a connection, and never an answer: what is asked next gets its own, or a new connection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from kvindexer.events import replay
from kvindexer.events.replay import Dealers

PATIENCE_MS = 30_000


class Publisher:
    """The replay socket of an engine, answered by hand."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.router.bind("tcp://127.0.0.1:0")
        self.endpoint = self.router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def hears(self, dealer: zmq.Socket[bytes]) -> bytes:
        """Who asks, as the publisher tells its peers apart."""
        dealer.send(b"?")
        assert self.router.poll(PATIENCE_MS)
        return bytes(self.router.recv_multipart()[0])


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: list[zmq.Socket[bytes]] = []

    class Remembering(zmq.Context[zmq.Socket[bytes]]):
        """Its sockets are closed at the end, whoever has forgotten them by then."""

        def socket(self, *arguments: Any, **options: Any) -> zmq.Socket[bytes]:
            made.append(super().socket(*arguments, **options))
            return made[-1]

    with Remembering() as it:
        yield it
        for socket in made:
            socket.close(linger=0)


def dealers(context: zmq.Context[zmq.Socket[bytes]], max_kept: int = 10) -> Dealers:
    return Dealers(context, max_message_bytes=1_000, max_kept=max_kept)


def test_a_socket_that_answered_to_the_end_is_used_again(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    publisher, pool = Publisher(context), dealers(context)
    first = pool.take(publisher.endpoint, 0.0)
    peer = publisher.hears(first)
    pool.keep(publisher.endpoint, first, 0.0)
    again, another = pool.take(publisher.endpoint, 5.0), pool.take(publisher.endpoint, 5.0)
    assert publisher.hears(again) == peer
    assert publisher.hears(another) != peer, "one request at a time"


def test_what_comes_behind_the_end_is_no_answer_to_the_next_request(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    publisher, pool = Publisher(context), dealers(context)
    first = pool.take(publisher.endpoint, 0.0)
    peer = publisher.hears(first)
    pool.keep(publisher.endpoint, first, 0.0)
    publisher.router.send_multipart([peer, b"late"])
    assert first.poll(PATIENCE_MS)
    second = pool.take(publisher.endpoint, 5.0)
    assert first.closed
    assert publisher.hears(second) != peer
    assert not second.poll(0)


def test_no_socket_is_kept_beyond_its_time_its_number_or_a_disconnect(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    one, other, pool = Publisher(context), Publisher(context), dealers(context, max_kept=1)
    first, second = pool.take(one.endpoint, 0.0), pool.take(other.endpoint, 0.0)
    pool.keep(one.endpoint, first, 0.0)
    pool.keep(other.endpoint, second, 0.0)
    assert second.closed
    pool.tick(replay.KEPT_FOR_S - 1)
    assert not first.closed
    pool.tick(replay.KEPT_FOR_S)
    assert first.closed
    third = pool.take(one.endpoint, 100.0)
    pool.keep(one.endpoint, third, 100.0)
    pool.hang_up(one.endpoint)
    assert third.closed
    assert len(pool) == 0
