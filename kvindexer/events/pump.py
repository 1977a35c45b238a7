"""Moving what sockets have received, in bounded slices of the event loop's time.

A ZMQ socket's file descriptor only says "look at me"; it must be read until it is empty, or be looked at again.
Ready pumps take turns, a few messages each, until the slice is over; then queries get their turn.

    turn of the loop     n          n + 1             n + 2
    ingest               a slice    lets pass         the next slice
    query                is read    is answered

Invariant: a pump that may have more stays in the queue, so no message waits for another one to arrive.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from typing import Final, Protocol

import zmq

_log = logging.getLogger(__name__)

MESSAGES_A_TURN: Final = 16


def is_readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message is waiting; asking costs less than an exception that says no."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


class Pump(Protocol):
    """Something with received messages."""

    def pump(self, limit: int, until: float) -> bool:
        """Process messages: at most `limit`, none but the first after `until`; returns whether there may be more."""


class Pumps:
    """All pumps of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, slice_s: float) -> None:
        self._loop = loop
        self._slice_s = slice_s
        self._ready: OrderedDict[Pump, float] = OrderedDict()
        self._scheduled = False

    def wake(self, pump: Pump) -> None:
        """The pump may have messages."""
        self._ready.setdefault(pump, time.monotonic())
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._slice)

    def watch(self, socket: zmq.Socket[bytes], pump: Pump) -> None:
        """Wake the pump whenever the socket's file descriptor says so, and now."""
        self._loop.add_reader(socket.FD, self.wake, pump)
        self.wake(pump)

    def unwatch(self, socket: zmq.Socket[bytes], pump: Pump) -> None:
        """The socket is about to be closed."""
        self._loop.remove_reader(socket.FD)
        self._ready.pop(pump, None)

    @property
    def busy(self) -> bool:
        """Whether any received message waits for its turn."""
        return bool(self._ready)

    def waiting_since(self, pump: Pump) -> float | None:
        """Since when the pump's messages wait for their turn; None: they don't."""
        return self._ready.get(pump)

    def _slice(self) -> None:
        end = time.monotonic() + self._slice_s
        while self._ready:
            pump, since = self._ready.popitem(last=False)
            try:
                more = pump.pump(MESSAGES_A_TURN, end)
            except Exception:  # noqa: BLE001 - one bad source must not stop the others; it is logged
                _log.exception("a message could not be processed; going on with the next one")
                more = True
            if more:
                self._ready.setdefault(pump, since)
            if time.monotonic() >= end:
                break
        self._scheduled = bool(self._ready)
        if self._scheduled:
            self._loop.call_soon(self._loop.call_soon, self._slice)
