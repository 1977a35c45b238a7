"""Blocks that an instance will hold soon: prompts that were routed to it, until its events say so.

    routed ──► awaited (`tiering.routings`)     forgotten when its routing ends,
                                                when an event speaks of the block (confirm),
                                                when its routing makes room at the bound

The overlay stands beside the index, not in it: who does not ask for it sees nothing of it, and an index engine knows
nothing of it.  Times are of any one monotonic clock, in seconds.

Invariant: only blocks of living routings are awaited, and `references` never exceeds the bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Literal

from kvindexer.tiering.routings import Name, Order, Routing, Routings
from kvindexer.types import Keyspace


class Speculation:
    """The overlays of one service; `max_blocks` bounds the blocks of all living routings together."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._spaces: dict[Keyspace, Routings] = {}
        self._routings: dict[Name, Routing] = {}
        self._ends: list[tuple[Order, Routing]] = []
        """A heap with one entry a routing, at the end that it had when it was put there."""
        self._serial = 0
        self.references = 0
        """Blocks that living routings name, each as often as it is named."""
        self.routed = 0
        """Prompts that were routed."""
        self.confirmed = 0
        """Blocks that left because an event spoke of them."""
        self.expired = 0
        """Blocks that left because their last routing ended."""
        self.made_room = 0
        """Blocks that left, or never came in, because there was no room."""

    @property
    def alive(self) -> bool:
        """Whether any routing lives; cheap: without one, nothing else here need be asked."""
        return bool(self._routings)

    @property
    def blocks(self) -> int:
        """Different blocks that are held speculatively, by all instances together."""
        return sum(routings.blocks for routings in self._spaces.values())

    def add(self, keyspace: Keyspace, instance: str, keys: list[int], ends_at: float) -> int:
        """A prompt was routed to an instance; returns how many of its leading blocks are noted until `ends_at`."""
        self.routed += 1
        if len(keys) > self._max_blocks:
            self.made_room += len(keys) - self._max_blocks
            keys = keys[: self._max_blocks]
        if not keys:
            return 0
        self._serial += 1
        order = (ends_at, self._serial)
        place = (keyspace, instance)
        name: Name = (place, keys[-1], len(keys), 0)  # a key stands for all of the prompt before it
        routing = self._routings.get(name)
        if routing is not None and routing.keys != keys:  # callers' own keys need not be a chain
            name, routing = (place, keys[-1], len(keys), self._serial), None
        if routing is None:
            while self.references + len(keys) > self._max_blocks:
                self._next_to_end("made_room")
            routing = self._routings[name] = Routing(name, place, keys, order)
            self.references += len(keys)
            heappush(self._ends, (order, routing))
            self._spaces.setdefault(keyspace, Routings()).begin(routing)
        else:
            routing.order = max(routing.order, order)
            self._spaces[keyspace].expect(routing)
        return len(keys)

    def expire(self, now: float) -> None:
        """Forget what has ended."""
        ends = self._ends
        while ends and ends[0][0][0] <= now:
            self._next_to_end("expired")

    def _next_to_end(self, reason: Literal["expired", "made_room"]) -> None:
        """Look at the heap's first: it ends, or it was routed again and goes back with its later end."""
        noted, routing = heappop(self._ends)
        if routing.order > noted:
            heappush(self._ends, (routing.order, routing))
            return
        del self._routings[routing.name]
        self.references -= len(routing.keys)
        keyspace, _ = routing.place
        routings = self._spaces[keyspace]
        gone = routings.end(routing)
        if not routings:
            del self._spaces[keyspace]
        if reason == "expired":
            self.expired += gone
        else:
            self.made_room += gone

    def confirm(self, keyspace: Keyspace, instance: str, keys: Iterable[int]) -> None:
        """Events of the instance have spoken of these blocks: what it holds of them is the index's to say."""
        routings = self._spaces.get(keyspace)
        if routings is not None:
            self.confirmed += routings.confirm(instance, keys)

    def awaits(self, instance: str) -> bool:
        """Whether any block of the instance waits for its event; cheap."""
        return any(routings.awaits(instance) for routings in self._spaces.values())

    def routings(self, keyspace: Keyspace) -> Routings | None:
        """What was routed there; None: nothing that lives."""
        return self._spaces.get(keyspace)
