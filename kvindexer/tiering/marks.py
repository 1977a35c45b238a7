"""Where routed prompts went that begin like another one: a coarse look that touches little memory.

    blocks of a prompt     0 . . . 16 . . . 32 . . . 48 . . .
    marks                  0111    0011     0001     none        bits of the instances that it was routed to so far

Every `EVERY`-th block of a routing is marked for as long as it lives, whatever events say of its blocks.  Questions
look up some dozens of marks, which stay in the processor's caches, and of all routed blocks, which don't, only those
that the marks let them expect.  Between a mark and the next one, what was routed to an instance has holes only if the
mark is torn for it.

Invariant: a mask has the bits of the instances that have a living routing which names the block; none is 0.  Those
for which the mark is torn are among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from operator import truth
from typing import Final

EVERY: Final = 16


class Marks:
    """The marks of one keyspace."""

    def __init__(self) -> None:
        self.bits: dict[str, int] = {}
        """A bit for each instance with a mark; given anew when its last one is gone."""
        self._used = 0
        self._masks: dict[int, int] = {}
        self._torn: dict[int, int] = {}
        self._routings: Counter[tuple[int, int]] = Counter()
        """(block, bit) -> routings that name it."""
        self._of_instance: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self.bits)

    def add(self, instance: str, keys: Sequence[int]) -> None:
        """A routing to this instance begins to live."""
        bit = self.bits.get(instance)
        if bit is None:
            bit = self.bits[instance] = ~self._used & (self._used + 1)  # the lowest that is free
            self._used |= bit
        self._of_instance[instance] += 1
        masks, routings = self._masks, self._routings
        for key in keys[::EVERY]:
            masks[key] = masks.get(key, 0) | bit
            routings[key, bit] += 1

    def drop(self, instance: str, keys: Sequence[int]) -> None:
        """That routing is over."""
        bit, masks, routings = self.bits[instance], self._masks, self._routings
        for key in keys[::EVERY]:
            routings[key, bit] -= 1
            if not routings[key, bit]:
                del routings[key, bit]
                masks[key] ^= bit
                if not masks[key]:
                    del masks[key]
                if key in self._torn:
                    self._torn[key] &= ~bit
                    if not self._torn[key]:
                        del self._torn[key]
        self._of_instance[instance] -= 1
        if not self._of_instance[instance]:
            del self._of_instance[instance], self.bits[instance]
            self._used ^= bit

    def tear(self, instance: str, keys: Sequence[int], gone: set[int]) -> None:
        """An event spoke of some blocks of a routing that lives: they are not waited for any more."""
        bit, torn = self.bits[instance], self._torn
        for start in range(0, len(keys), EVERY):
            if not gone.isdisjoint(keys[start : start + EVERY]):
                torn[keys[start]] = torn.get(keys[start], 0) | bit

    def along(self, keys: Sequence[int]) -> list[int]:
        """The masks of every `EVERY`-th block of a prompt, as far as anybody was routed something that begins so."""
        return list(takewhile(truth, map(self._masks.get, keys[::EVERY])))  # type: ignore[arg-type]

    def torn(self, keys: Sequence[int]) -> list[int]:
        """Of every `EVERY`-th block of a prompt the instances for which its mark is torn."""
        return [self._torn.get(key, 0) for key in keys[::EVERY]] if self._torn else []
