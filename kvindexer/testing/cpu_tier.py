"""The CPU tier of a fake engine with an offloading connector: a set of blocks, least recently used out first.

A block lives here in two phases: `begin` reserves its place while the copy runs (evicting others at once), `finish`
makes it readable one step later. Invariant: readable and pending blocks together never exceed the capacity, and a
block is announced exactly once per stay.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvindexer.testing.events import BlockStored, Digest
    from kvindexer.testing.physical import GroupedDigest


class CpuTier:
    """An LRU set of blocks, filled with a delay of one engine step."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._ready: OrderedDict[GroupedDigest, None] = OrderedDict()
        self._pending: dict[GroupedDigest, BlockStored] = {}

    def __contains__(self, key: GroupedDigest) -> bool:
        return key in self._ready

    def is_pending(self, key: GroupedDigest) -> bool:
        """Tell whether a copy of this block is under way."""
        return key in self._pending

    def held(self) -> set[GroupedDigest]:
        """Return what can be read from this tier now."""
        return set(self._ready)

    def touch(self, keys: Iterable[GroupedDigest]) -> None:
        """Mark blocks as used, the deepest first, so that a prefix outlives what hangs on it."""
        for key in reversed(list(keys)):
            self._ready.move_to_end(key)

    def begin(self, blocks: Iterable[BlockStored]) -> list[Digest]:
        """Start copying blocks that are not here yet; return what had to go for them.

        Each of `blocks` describes one block. If they do not all fit, none is copied, as in vLLM.
        """
        fresh = {(stored.group_idx, stored.block_hashes[0]): stored for stored in blocks}
        fresh = {key: stored for key, stored in fresh.items() if key not in self._ready | self._pending}
        overflow = len(self._ready) + len(self._pending) + len(fresh) - self.capacity
        if overflow > len(self._ready):
            return []
        evicted = [self._ready.popitem(last=False)[0][1] for _ in range(overflow)]
        self._pending.update(fresh)
        return evicted

    def finish(self) -> list[BlockStored]:
        """End the running copies; return what to announce."""
        done = list(self._pending.values())
        self._ready.update(dict.fromkeys(self._pending))
        self._pending.clear()
        return done

    def clear(self) -> None:
        """Empty the tier; engines send no event for it."""
        self._ready.clear()
        self._pending.clear()
