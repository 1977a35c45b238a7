"""The ZMQ side of a replay: one request at a time on a DEALER, dialled on demand.

    request    b"", start seq (8 bytes, big-endian)
    answers    b"", [topic], seq, payload       topic since vLLM 0.26; counted from the end, both read alike
    the end    b"", [topic], ff * 8, b""

The socket has no high-water mark, for with one the publisher's ROUTER drops answers to a reader that is slow for a
moment; the bytes of a replay have a budget instead.

Invariant: answers name no request, so a socket is used again only if its last answer came to its end and nothing
behind it; after a timeout, a cancelled request, garbage or a disconnect of the source it is closed.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final, Protocol

import zmq

from kvindexer.events.curve import Curve
from kvindexer.events.pump import Pumps, is_readable

END: Final = b"\xff" * 8
KEPT_FOR_S: Final = 30.0
"""An unused connection is closed before anything on the way (NAT, load balancers) forgets it without a word."""
_FEWEST_FRAMES: Final = 3
_SEQ_BYTES: Final = 8


class Reader(Protocol):
    """Who takes the answers of a replay."""

    def replay_frame(self, seq: int, payload: bytes) -> None:
        """One replayed message."""

    def replay_over(self, failure: str | None) -> None:
        """The end marker is in, or the replay failed for this reason."""


class Replay:
    """One request under way."""

    def __init__(self, replays: Replays, endpoint: str, start: int, reader: Reader) -> None:
        self._replays = replays
        self.endpoint = endpoint
        self._start = start
        self._reader = reader
        self._socket: zmq.Socket[bytes] | None = None
        self._bytes = 0
        self.heard_at = 0.0

    def open(self) -> None:
        """Connect and ask."""
        socket = self._replays.dealers.take(self.endpoint, time.monotonic())
        socket.send_multipart([b"", self._start.to_bytes(_SEQ_BYTES, "big")], flags=zmq.NOBLOCK)
        self._socket = socket
        self.heard_at = time.monotonic()
        self._replays.pumps.watch(socket, self)

    def close(self) -> None:
        """Hang up; the reader hears nothing more."""
        if self._socket is not None:
            self._replays.pumps.unwatch(self._socket, self)
            self._socket.close()
            self._socket = None

    def pump(self, limit: int, until: float) -> bool:
        """See `Pump.pump`."""
        for _ in range(limit):
            if self._socket is None:
                return False
            try:
                frames = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._take(frames)
            if time.monotonic() >= until:
                break
        return True

    def _take(self, frames: list[bytes]) -> None:
        self.heard_at = time.monotonic()
        if len(frames) < _FEWEST_FRAMES or len(frames[-2]) != _SEQ_BYTES:
            self._replays.finish(self, "its answer is no replay")
        elif frames[-2] == END:
            self._replays.finish(self, None)
        else:
            self._bytes += len(frames[-1])
            if self._bytes > self._replays.max_bytes:
                self._replays.finish(self, "too many bytes (setting replay_max_bytes)")
            else:
                self._reader.replay_frame(int.from_bytes(frames[-2], "big"), frames[-1])

    def release(self) -> None:
        """The answer came to its end: leave the socket to the next request."""
        if self._socket is not None:
            self._replays.pumps.unwatch(self._socket, self)
            self._replays.dealers.keep(self.endpoint, self._socket, time.monotonic())
            self._socket = None

    def over(self, failure: str | None) -> None:
        """Tell the reader."""
        self._reader.replay_over(failure)


class Dealers:
    """DEALER sockets by replay endpoint: dialled, or kept open from the last request, at most one each.

    A probe on an open connection costs half of one that dials.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        max_message_bytes: int,
        max_kept: int,
        curve: Curve | None = None,
    ) -> None:
        self._curve = curve or Curve()
        self._context = context
        self._max_message_bytes = max_message_bytes
        self._max_kept = max_kept
        self._kept: dict[str, tuple[zmq.Socket[bytes], float]] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def take(self, endpoint: str, now: float) -> zmq.Socket[bytes]:
        """A socket on which nothing has been asked that is not answered.  Raises ZMQError."""
        socket, since = self._kept.pop(endpoint, (None, now))
        if socket is not None:
            if now - since < KEPT_FOR_S and not is_readable(socket):
                return socket
            socket.close()
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, self._max_message_bytes)
        self._curve.secure(socket, endpoint)
        socket.connect(endpoint)
        return socket

    def keep(self, endpoint: str, socket: zmq.Socket[bytes], now: float) -> None:
        """The last answer on it came to its end; without room for it, or with something behind the end: close it."""
        if endpoint in self._kept or len(self._kept) >= self._max_kept or is_readable(socket):
            socket.close()
        else:
            self._kept[endpoint] = socket, now

    def hang_up(self, endpoint: str) -> None:
        """Whoever answers there next may be somebody else."""
        socket, _ = self._kept.pop(endpoint, (None, 0.0))
        if socket is not None:
            socket.close()

    def tick(self, now: float) -> None:
        """Close what has not been used for long."""
        for endpoint in [endpoint for endpoint, (_, since) in self._kept.items() if now - since >= KEPT_FOR_S]:
            self.hang_up(endpoint)

    def close(self) -> None:
        """Hang up everywhere."""
        for endpoint in list(self._kept):
            self.hang_up(endpoint)


class Replays:
    """All replays of the process; only so many at once, the others wait for their turn."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        pumps: Pumps,
        *,
        max_concurrent: int,
        max_bytes: int,
        max_message_bytes: int,
        max_kept: int,
        timeout_s: float,
        curve: Curve | None = None,
    ) -> None:
        self.dealers = Dealers(context, max_message_bytes=max_message_bytes, max_kept=max_kept, curve=curve)
        self.max_bytes = max_bytes
        self.pumps = pumps
        self._max_concurrent = max_concurrent
        self._timeout_s = timeout_s
        self._waiting: deque[Replay] = deque()
        self._running: set[Replay] = set()

    def request(self, endpoint: str, start: int, reader: Reader) -> Replay:
        """Ask for everything from `start` on, now or when it is this request's turn."""
        replay = Replay(self, endpoint, start, reader)
        self._waiting.append(replay)
        self._start_next()
        return replay

    def cancel(self, replay: Replay) -> None:
        """Nobody wants the answer any more."""
        if replay in self._running:
            self._running.remove(replay)
        elif replay in self._waiting:
            self._waiting.remove(replay)
        replay.close()
        self._start_next()

    def tick(self, now: float) -> None:
        """End what has been silent for too long."""
        self.dealers.tick(now)
        for replay in [replay for replay in self._running if now - replay.heard_at > self._timeout_s]:
            self.finish(replay, f"no answer from {replay.endpoint} in {self._timeout_s:g} s")

    def finish(self, replay: Replay, failure: str | None) -> None:
        """The replay is over, well or not."""
        if failure is None:
            replay.release()
        self.cancel(replay)
        replay.over(failure)

    def close(self) -> None:
        """End all, tell nobody."""
        self._waiting.clear()
        for replay in self._running:
            replay.close()
        self._running.clear()
        self.dealers.close()

    def _start_next(self) -> None:
        while self._waiting and len(self._running) < self._max_concurrent:
            replay = self._waiting.popleft()
            self._running.add(replay)
            try:
                replay.open()
            except zmq.ZMQError as error:
                self.finish(replay, f"can't ask {replay.endpoint}: {error}")
