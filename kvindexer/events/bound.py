"""An endpoint that we bind, for engines that dial in (vLLM does so if its endpoint has no wildcard).

All its publishers come through one socket, so they are told apart by what their messages say: the topic, and the
rank in the batch.  Anybody who can reach the endpoint can claim both, hence it is off unless a setting names the
endpoint.  There is no monitor that tells one peer from another: a source is alive while it is heard, on this socket
or on its replay socket.
"""

from __future__ import annotations

import time

import zmq

from kvindexer.errors import RequestError, WireError
from kvindexer.events.follower import Follower
from kvindexer.events.pump import is_readable
from kvindexer.events.sockets import Wiring, seq_and_payload, subscription_socket
from kvindexer.events.wire import batch_rank


class BoundEndpoint:
    """One bound socket and the sources that dial in to it, by topic and rank."""

    def __init__(self, wiring: Wiring, endpoint: str) -> None:
        self._wiring = wiring
        self._endpoint = endpoint
        self._followers: dict[tuple[bytes, int], Follower] = {}
        self._closed = False
        self._socket = subscription_socket(wiring.context, wiring.settings)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise RequestError("bad_endpoint", f"can't bind {endpoint!r}: {error}", "check bind_endpoints") from None
        wiring.pumps.watch(self._socket, self)

    def add(self, topic: str, rank: int, follower: Follower) -> BoundSource:
        """Expect a publisher of this topic and rank."""
        self._followers[topic.encode(), rank] = follower
        now = time.monotonic()
        follower.act(follower.stream.start(now))
        follower.act(follower.stream.connected(now))
        return BoundSource(self, (topic.encode(), rank), follower)

    def remove(self, name: tuple[bytes, int]) -> None:
        """Expect it no more."""
        del self._followers[name]

    def pump(self, limit: int, until: float) -> bool:
        """See `Pump.pump`."""
        for _ in range(limit):
            if self._closed or not is_readable(self._socket):
                return False
            self._take(self._socket.recv_multipart(flags=zmq.NOBLOCK))
            if time.monotonic() >= until:
                break
        return True

    def _take(self, frames: list[bytes]) -> None:
        sink = self._wiring.sink
        frame = seq_and_payload(frames)
        if frame is None:
            sink.dropped(self._endpoint, "bad_frames")
            return
        try:
            rank = batch_rank(frame[1])
        except WireError as error:
            sink.dropped(self._endpoint, error.reason)
            return
        follower = self._followers.get((frames[0], rank or 0))
        if follower is None:
            sink.dropped(self._endpoint, "unknown_topic_or_rank")
        else:
            follower.frame(*frame)

    def close(self) -> None:
        """Listen no more."""
        self._closed = True
        self._wiring.pumps.unwatch(self._socket, self)
        self._socket.close()


class BoundSource:
    """One publisher of a bound endpoint."""

    refusal = ""
    """Nobody who dials in is refused."""

    def __init__(self, bound: BoundEndpoint, name: tuple[bytes, int], follower: Follower) -> None:
        self.follower = follower
        self._bound = bound
        self._name = name

    @property
    def receiver(self) -> BoundEndpoint:
        """What its frames come through."""
        return self._bound

    def tick(self, now: float) -> None:
        """Time has passed."""
        self.follower.act(self.follower.stream.tick(now))

    def close(self) -> None:
        """Expect it no more."""
        self.follower.close()
        self._bound.remove(self._name)
