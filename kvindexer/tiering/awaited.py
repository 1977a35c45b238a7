"""Blocks of one keyspace that will come soon, and the instances that wait for each.

    waiting   k0 ─► 0111   k1 ─► 0111   k2 ─► 0011       a bit for each instance
    bits      pod-a ─► 0001   pod-b ─► 0010   ...         given anew when an instance waits for nothing more

Invariant: no mask is 0, and a bit that stands in any mask is that of one instance.
"""

from __future__ import annotations

from collections.abc import Iterable


class Awaited:
    """Masks by block; who changes them sees to it that a block is added and dropped once."""

    __slots__ = ("_used", "bits", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[int, int] = {}
        """Block key -> bits of the instances that wait for it."""
        self.bits: dict[str, int] = {}
        self._used = 0

    def add(self, instance: str, keys: Iterable[int]) -> None:
        """The instance waits for these blocks too; it did not before."""
        bit = self.bits.get(instance)
        if bit is None:
            bit = self.bits[instance] = ~self._used & (self._used + 1)  # the lowest that is free
            self._used |= bit
        waiting = self.waiting
        for key in keys:
            waiting[key] = waiting.get(key, 0) | bit

    def drop(self, instance: str, keys: Iterable[int]) -> None:
        """The instance no longer waits for these blocks; it did."""
        bit, waiting = self.bits[instance], self.waiting
        for key in keys:
            others = waiting[key] ^ bit
            if others:
                waiting[key] = others
            else:
                del waiting[key]

    def leave(self, instance: str) -> None:
        """The instance waits for nothing more."""
        self._used ^= self.bits.pop(instance)
