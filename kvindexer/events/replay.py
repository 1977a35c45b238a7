"""The ZMQ side of a replay: one DEALER a request, opened on demand and closed behind it.

    request    b"", start seq (8 bytes, big-endian)
    answers    b"", [topic], seq, payload       topic since vLLM 0.26; counted from the end, both read alike
    the end    b"", [topic], ff * 8, b""

The socket has no high-water mark, for with one the publisher's ROUTER drops answers to a reader that is slow for a
moment; the bytes of a replay have a budget instead.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final, Protocol

import zmq

from kvindexer.events.pump import Pumps

END: Final = b"\xff" * 8
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
        socket = self._replays.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, self._replays.max_message_bytes)
        socket.connect(self.endpoint)
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

    def pump(self, limit: int) -> bool:
        """See `Pump.pump`."""
        for _ in range(limit):
            if self._socket is None:
                return False
            try:
                frames = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._take(frames)
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

    def over(self, failure: str | None) -> None:
        """Tell the reader."""
        self._reader.replay_over(failure)


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
        timeout_s: float,
    ) -> None:
        self.context = context
        self.max_bytes = max_bytes
        self.max_message_bytes = max_message_bytes
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
        for replay in [replay for replay in self._running if now - replay.heard_at > self._timeout_s]:
            self.finish(replay, f"no answer from {replay.endpoint} in {self._timeout_s:g} s")

    def finish(self, replay: Replay, failure: str | None) -> None:
        """The replay is over, well or not."""
        self.cancel(replay)
        replay.over(failure)

    def close(self) -> None:
        """End all, tell nobody."""
        self._waiting.clear()
        for replay in self._running:
            replay.close()
        self._running.clear()

    def _start_next(self) -> None:
        while self._waiting and len(self._running) < self._max_concurrent:
            replay = self._waiting.popleft()
            self._running.add(replay)
            try:
                replay.open()
            except zmq.ZMQError as error:
                self.finish(replay, f"can't ask {replay.endpoint}: {error}")
