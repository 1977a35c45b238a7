"""A source that we dial: its SUB socket and the monitor that says whether it is connected.

The shell decides nothing; it moves bytes.  The monitor is read before the SUB socket, so that a frame that came after
a disconnect is never taken for one that came before.
"""

from __future__ import annotations

import logging
import time
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvindexer.errors import RequestError
from kvindexer.events.follower import Follower
from kvindexer.events.pump import is_readable
from kvindexer.events.sockets import Wiring, seq_and_payload, subscription_socket

_log = logging.getLogger(__name__)

REDIAL_AFTER_S: Final = 1.0
_REFUSALS: Final[dict[int, str]] = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "CURVE: it has another key than curve_server_key, or does not let us in",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "one side speaks CURVE and the other does not: is curve_server_key set?",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "CURVE: it does not let us in: does it know our public key?",
}
"""Handshakes that failed; without CURVE on either side there is nothing to refuse."""
_MONITORED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_CONNECT_DELAYED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class DialledSource:
    """One publisher, dialled."""

    def __init__(self, wiring: Wiring, endpoint: str, topic: str, follower: Follower) -> None:
        self.follower = follower
        self._wiring = wiring
        self._endpoint = endpoint
        self._curve = wiring.curve.expects(endpoint)
        self._down_at: float | None = None
        self.refusal = ""
        """Why there is no connection, if that is known."""
        self._socket = subscription_socket(wiring.context, wiring.settings)
        self._monitor = self._socket.get_monitor_socket(_MONITORED)
        self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        try:
            wiring.curve.secure(self._socket, endpoint)
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise RequestError(
                "bad_endpoint", f"can't dial {endpoint!r}: {error}", "check address and port"
            ) from None
        wiring.pumps.watch(self._monitor, self)
        wiring.pumps.watch(self._socket, self)
        follower.act(follower.stream.start(time.monotonic()))

    @property
    def receiver(self) -> DialledSource:
        """What its frames come through."""
        return self

    def pump(self, limit: int, until: float) -> bool:
        """See `Pump.pump`."""
        if self.follower.closed:
            return False
        # once a turn is enough: libzmq dials again 100 ms after a disconnect at the earliest, a turn is much shorter
        self._read_monitor()
        if self.follower.stream.catching_up:
            return True  # whatever is read now would have to be held as well
        for _ in range(limit):
            if self.follower.closed or not is_readable(self._socket):
                return False
            frame = seq_and_payload(self._socket.recv_multipart(flags=zmq.NOBLOCK))
            if frame is None:
                self._wiring.sink.dropped(self.follower.source, "bad_frames")
            else:
                self.follower.frame(*frame)
            if time.monotonic() >= until:
                break
        return True

    def _read_monitor(self) -> None:
        follower = self.follower
        while is_readable(self._monitor):
            message = parse_monitor_message(self._monitor.recv_multipart(flags=zmq.NOBLOCK))
            event, now = message["event"], time.monotonic()
            if event in _REFUSALS:
                self._refused(event, message["value"])
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._down_at = None
                self.refusal = ""
                follower.act(follower.stream.connected(now))
            elif event == zmq.EVENT_DISCONNECTED:
                self._down_at = now
                follower.disconnected(now)
            else:
                self._down_at = None  # libzmq is dialling again by itself

    def _refused(self, event: int, value: int) -> None:
        """Peers that break off for other reasons fail alike: only what CURVE explains is told."""
        if not (self._curve or value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH):
            return
        refusal = _REFUSALS[event]
        if refusal != self.refusal:
            _log.warning("source %s: %s", self.follower.source, refusal)
        self.refusal = refusal

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self._down_at is not None and now - self._down_at >= REDIAL_AFTER_S:
            # after a message above the size limit libzmq gives the connection up for good
            self._down_at = now
            self._wiring.sink.dropped(self.follower.source, "connection_given_up")
            self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)
        self.follower.act(self.follower.stream.tick(now))

    def close(self) -> None:
        """Hang up."""
        self.follower.close()
        self._wiring.pumps.unwatch(self._monitor, self)
        self._wiring.pumps.unwatch(self._socket, self)
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
