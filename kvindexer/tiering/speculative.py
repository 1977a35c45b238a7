"""Blocks that an instance will hold soon: prompts that were routed to it, until its events say so.

    routed ──► held[key] = the routing that ends last       forgotten when its routing ends,
                                                            when an event speaks of the block (confirm),
                                                            when its routing makes room at the bound

A block that several routings name lives as long as the last of them, which is what a count of references would say.
The overlay stands beside the index, not in it: who does not ask for it sees nothing of it, and an index engine knows
nothing of it.  Times are of any one monotonic clock, in seconds.

Invariant: `held` of an instance names living routings only, and `references` never exceeds the bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Literal

from kvindexer.tiering.marks import Marks
from kvindexer.types import Keyspace

_Place = tuple[Keyspace, str]
"""Keyspace and instance."""
_Name = tuple[_Place, int, int, int]
"""Place, last key, number of keys, and a number that tells those apart that are equal in all of this."""
_Order = tuple[float, int]
"""When it ends, and which of equal ends is the later routing."""


class Routing:
    """One prompt that was routed to one instance, however often."""

    __slots__ = ("keys", "name", "order", "place")

    def __init__(self, name: _Name, place: _Place, keys: Sequence[int], order: _Order) -> None:
        self.name = name
        self.place = place
        self.keys = keys
        self.order = order


class Speculation:
    """The overlay of one service; `max_blocks` bounds the blocks of all living routings together."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._held: dict[Keyspace, dict[str, dict[int, Routing]]] = {}
        self._marks: dict[Keyspace, Marks] = {}
        self._routings: dict[_Name, Routing] = {}
        self._ends: list[tuple[_Order, Routing]] = []
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
        return sum(len(held) for instances in self._held.values() for held in instances.values())

    def add(self, keyspace: Keyspace, instance: str, keys: Sequence[int], ends_at: float) -> int:
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
        name: _Name = (place, keys[-1], len(keys), 0)  # a key stands for all of the prompt before it
        routing = self._routings.get(name)
        if routing is not None and routing.keys != keys:  # callers' own keys need not be a chain
            name, routing = (place, keys[-1], len(keys), self._serial), None
        if routing is None:
            while self.references + len(keys) > self._max_blocks:
                self._next_to_end("made_room")
            routing = self._routings[name] = Routing(name, place, keys, order)
            self.references += len(keys)
            if keyspace not in self._marks:
                self._marks[keyspace] = Marks()
            self._marks[keyspace].add(instance, keys)
            heappush(self._ends, (order, routing))
        else:
            order = routing.order = max(routing.order, order)
        held = self._held.setdefault(keyspace, {}).setdefault(instance, {})
        for key in routing.keys:
            other = held.get(key)
            if other is None or other.order < order:
                held[key] = routing
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
        keyspace, instance = routing.place
        marks = self._marks[keyspace]
        marks.drop(instance, routing.keys)
        if not marks:
            del self._marks[keyspace]
        held = self._held.get(keyspace, {}).get(instance, {})
        gone = self._drop(routing.place, [key for key in routing.keys if held.get(key) is routing])
        if reason == "expired":
            self.expired += gone
        else:
            self.made_room += gone

    def confirm(self, keyspace: Keyspace, instance: str, keys: Iterable[int]) -> None:
        """Events of the instance have spoken of these blocks: what it holds of them is the index's to say."""
        held = self._held.get(keyspace, {}).get(instance)
        if held is None:
            return
        gone: dict[Routing, set[int]] = {}
        for key in keys:
            if (routing := held.get(key)) is not None:
                gone.setdefault(routing, set()).add(key)
        for routing, of_routing in gone.items():
            self._marks[keyspace].tear(instance, routing.keys, of_routing)
            self.confirmed += self._drop((keyspace, instance), of_routing)

    def _drop(self, place: _Place, keys: Iterable[int]) -> int:
        """Forget these blocks of an instance; returns how many there were."""
        keyspace, instance = place
        instances = self._held.get(keyspace, {})
        held = instances.get(instance)
        if held is None:
            return 0
        before = len(held)
        for key in keys:
            held.pop(key, None)
        gone = before - len(held)
        if not held:
            del instances[instance]
            if not instances:
                del self._held[keyspace]
        return gone

    def awaits(self, instance: str) -> bool:
        """Whether any block of the instance waits for its event; cheap."""
        return bool(self._routings) and any(instance in instances for instances in self._held.values())

    def instances(self, keyspace: Keyspace) -> Mapping[str, Mapping[int, Routing]]:
        """Instances with speculative blocks, and the keys of those, each with a routing that names it."""
        return self._held.get(keyspace, {})

    def marks(self, keyspace: Keyspace) -> Marks | None:
        """Where living routings went; None: there are none."""
        return self._marks.get(keyspace)
