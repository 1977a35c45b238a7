"""One source's machine and its replays, whatever socket its frames come from.

frames ─┐                       ┌─► Apply ────► sink.apply
up, down┼─► Stream (a machine) ─┼─► Withdraw ─► sink.withdraw
clock ──┘            ▲          ├─► Drop ─────► sink.dropped
                     │          └─► Ask ──────► DEALER (events.replay) ─┐
                     └──────────────────────────────────────────────────┘
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from kvindexer.events.replay import Replay, Replays
from kvindexer.events.states import Action, Apply, Ask, Drop, Withdraw
from kvindexer.events.stream import Stream


class Sink(Protocol):
    """Where ordered payloads go."""

    def apply(self, source: str, seq: int, payload: bytes) -> None:
        """The next payload of a source."""

    def withdraw(self, source: str, reason: str, *, everything: bool) -> None:
        """The source's entries are not to be trusted any more."""

    def dropped(self, source: str, reason: str) -> None:
        """A frame had no effect."""

    def changed(self, source: str) -> None:
        """The machine has heard something: its state, flags and lag may be others now."""


class Follower:
    """Carries out what a source's machine says, and tells it what its replays bring."""

    def __init__(
        self, source: str, replay_endpoint: str | None, stream: Stream, sink: Sink, replays: Replays
    ) -> None:
        self.source = source
        self.stream = stream
        self.sink = sink
        self._replay_endpoint = replay_endpoint
        self._replays = replays
        self._replay: Replay | None = None
        self.closed = False

    def frame(self, seq: int, payload: bytes) -> None:
        """A live message."""
        self.act(self.stream.frame(seq, payload, time.monotonic()))

    def disconnected(self, now: float) -> None:
        """The transport is down: what answers replays next may be another life."""
        if self._replay_endpoint is not None:
            self._replays.dealers.hang_up(self._replay_endpoint)
        self.act(self.stream.disconnected(now))

    def act(self, actions: Iterable[Action]) -> None:
        """Do what the machine says."""
        for action in actions:
            match action:
                case Apply(seq, payload):
                    self.sink.apply(self.source, seq, payload)
                case Drop(reason):
                    self.sink.dropped(self.source, reason)
                case Withdraw(reason, everything):
                    self.sink.withdraw(self.source, reason, everything=everything)
                case Ask(start):
                    self._ask(start)
        self.sink.changed(self.source)
        if self.stream.catching_up:
            self._replays.pumps.wake(self)

    def pump(self, limit: int, until: float) -> bool:
        """Carry out what was held during a replay; see `Pump.pump`."""
        for _ in range(limit):
            if self.closed or not self.stream.catching_up:
                return False
            self.act(self.stream.catch_up(time.monotonic()))
            if time.monotonic() >= until:
                break
        return True

    def _ask(self, start: int) -> None:
        self._stop_replay()
        if self._replay_endpoint is not None:
            self._replay = self._replays.request(self._replay_endpoint, start, self)

    def _stop_replay(self) -> None:
        if self._replay is not None:
            self._replays.cancel(self._replay)
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
        """Nothing of this source is applied after this."""
        self.closed = True
        self._stop_replay()
        if self._replay_endpoint is not None:
            self._replays.dealers.hang_up(self._replay_endpoint)
