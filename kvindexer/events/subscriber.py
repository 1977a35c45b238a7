"""The ZMQ shell around the streams: one SUB and its monitor per source, replays on demand, one event loop for all.

    SUB socket ─► frames ─┐                       ┌─► Apply ────► sink.apply
    monitor ─► up, down ──┼─► Stream (a machine) ─┼─► Withdraw ─► sink.withdraw
    clock ─► tick ────────┘            ▲          ├─► Drop ─────► sink.dropped
                                       │          └─► Ask ──────► DEALER (events.replay) ─┐
                                       └──────────────────────────────────────────────────┘

The shell decides nothing; it moves bytes and keeps time.  The monitor is read before the SUB socket, so that a
frame that came after a disconnect is never taken for one that came before.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvindexer.errors import RequestError
from kvindexer.events.pump import Pumps
from kvindexer.events.replay import Replay, Replays
from kvindexer.events.states import Action, Apply, Ask, Drop, Withdraw
from kvindexer.events.stream import Stream

_log = logging.getLogger(__name__)

TICK_S: Final = 0.5
_FRAMES: Final = 3
_SEQ_BYTES: Final = 8
_REDIAL_AFTER_S: Final = 1.0
_RECONNECT_MIN_MS: Final = 100
_RECONNECT_MAX_MS: Final = 2_000
_HEARTBEAT_MS: Final = 2_000
_HEARTBEAT_TIMEOUT_MS: Final = 6_000
_SOCKETS_A_SOURCE: Final = 3
_MONITORED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CONNECT_DELAYED
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriberSettings:
    """Limits and times of the sockets; see `Settings` for what each is for."""

    receive_hwm: int = 1_000
    max_message_bytes: int = 64 * 2**20
    replay_max_bytes: int = 512 * 2**20
    replay_timeout_s: float = 5.0
    max_concurrent_replays: int = 8
    max_sources: int = 4096
    slice_s: float = 0.002


class Sink(Protocol):
    """Where ordered payloads go."""

    def apply(self, source: str, seq: int, payload: bytes) -> None:
        """The next payload of a source."""

    def withdraw(self, source: str, reason: str, *, everything: bool) -> None:
        """The source's entries are not to be trusted any more."""

    def dropped(self, source: str, reason: str) -> None:
        """A frame had no effect."""


class Subscription:
    """One source's sockets and its machine."""

    def __init__(self, owner: Subscriber, source: str, replay: str | None, topic: str, stream: Stream) -> None:
        self._owner = owner
        self.source = source
        self.stream = stream
        self._replay_endpoint = replay
        self._replay: Replay | None = None
        self._down_at: float | None = None
        self._closed = False
        settings = owner.settings
        self._socket = owner.context.socket(zmq.SUB)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IPV6, 1),
            (zmq.RCVHWM, settings.receive_hwm),
            (zmq.MAXMSGSIZE, settings.max_message_bytes),
            (zmq.RECONNECT_IVL, _RECONNECT_MIN_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(_MONITORED)
        self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        try:
            self._socket.connect(source)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise RequestError("bad_endpoint", f"can't dial {source!r}: {error}", "check address and port") from None
        owner.pumps.watch(self._monitor, self)
        owner.pumps.watch(self._socket, self)
        self.act(stream.start(time.monotonic()))

    def pump(self, limit: int) -> bool:
        """See `Pump.pump`."""
        if self._closed:
            return False
        # once a turn is enough: libzmq dials again 100 ms after a disconnect at the earliest, a turn is much shorter
        self._read_monitor()
        for _ in range(limit):
            if self._closed or not _readable(self._socket):
                return False
            frames = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            if len(frames) != _FRAMES or len(frames[1]) != _SEQ_BYTES:
                self._owner.sink.dropped(self.source, "bad_frames")
                continue
            self.act(self.stream.frame(int.from_bytes(frames[1], "big"), frames[2], time.monotonic()))
        return True

    def _read_monitor(self) -> None:
        while _readable(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart(flags=zmq.NOBLOCK))["event"]
            now = time.monotonic()
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._down_at = None
                self.act(self.stream.connected(now))
            elif event == zmq.EVENT_DISCONNECTED:
                self._down_at = now
                self.act(self.stream.disconnected(now))
            else:
                self._down_at = None  # libzmq is dialling again by itself

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self._down_at is not None and now - self._down_at >= _REDIAL_AFTER_S:
            # after a message above the size limit libzmq gives the connection up for good
            self._down_at = now
            self._owner.sink.dropped(self.source, "connection_given_up")
            self._socket.disconnect(self.source)
            self._socket.connect(self.source)
        self.act(self.stream.tick(now))

    def act(self, actions: Iterable[Action]) -> None:
        """Do what the machine says."""
        sink = self._owner.sink
        for action in actions:
            match action:
                case Apply(seq, payload):
                    sink.apply(self.source, seq, payload)
                case Drop(reason):
                    sink.dropped(self.source, reason)
                case Withdraw(reason, everything):
                    sink.withdraw(self.source, reason, everything=everything)
                case Ask(start):
                    self._ask(start)

    def _ask(self, start: int) -> None:
        self._stop_replay()
        if self._replay_endpoint is not None:
            self._replay = self._owner.replays.request(self._replay_endpoint, start, self)

    def _stop_replay(self) -> None:
        if self._replay is not None:
            self._owner.replays.cancel(self._replay)
            self._replay = None

    def replay_frame(self, seq: int, payload: bytes) -> None:
        """See `Reader.replay_frame`."""
        self.act(self.stream.replay_frame(seq, payload, time.monotonic()))

    def replay_over(self, failure: str | None) -> None:
        """See `Reader.replay_over`."""
        self._replay = None
        now = time.monotonic()
        self.act(self.stream.replay_end(now) if failure is None else self.stream.replay_failed(failure, now))

    def close(self) -> None:
        """Hang up; nothing of this source is applied after this."""
        self._closed = True
        self._stop_replay()
        self._owner.pumps.unwatch(self._monitor, self)
        self._owner.pumps.unwatch(self._socket, self)
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


def _readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message is waiting; asking costs less than an exception that says no."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


class Subscriber:
    """All subscriptions of the process, on the running event loop."""

    def __init__(self, settings: SubscriberSettings, sink: Sink) -> None:
        self.settings = settings
        self.sink = sink
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(
            zmq.MAX_SOCKETS, _SOCKETS_A_SOURCE * settings.max_sources + settings.max_concurrent_replays + 64
        )
        self.pumps = Pumps(asyncio.get_running_loop(), settings.slice_s)
        self.replays = Replays(
            self.context,
            self.pumps,
            max_concurrent=settings.max_concurrent_replays,
            max_bytes=settings.replay_max_bytes,
            max_message_bytes=settings.max_message_bytes,
            timeout_s=settings.replay_timeout_s,
        )
        self._subscriptions: dict[str, Subscription] = {}
        self._ticker = asyncio.create_task(self._tick(), name="kvindexer-tick")

    def add(self, source: str, replay: str | None, topic: str, stream: Stream) -> None:
        """Dial a source.  Raises RequestError if its endpoint can't be dialled at all."""
        self._subscriptions[source] = Subscription(self, source, replay, topic, stream)

    def remove(self, source: str) -> None:
        """Hang up on a source; its late frames are never seen."""
        subscription = self._subscriptions.pop(source, None)
        if subscription is not None:
            subscription.close()

    def backlog_s(self, source: str, now: float) -> float:
        """How long this source's received messages have been waiting for their turn."""
        subscription = self._subscriptions.get(source)
        since = None if subscription is None else self.pumps.waiting_since(subscription)
        return 0.0 if since is None else now - since

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self.replays.tick(now)
            for subscription in list(self._subscriptions.values()):
                try:
                    subscription.tick(now)
                except Exception:  # noqa: BLE001 - one bad source must not stop the others; it is logged
                    _log.exception("source %s: a tick failed", subscription.source)

    async def close(self) -> None:
        """Hang up on everybody."""
        self._ticker.cancel()
        await asyncio.gather(self._ticker, return_exceptions=True)
        for source in list(self._subscriptions):
            self.remove(source)
        self.replays.close()
        self.context.term()
