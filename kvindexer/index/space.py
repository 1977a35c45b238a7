"""One keyspace's table: which slots hold which block, per tier.

    tiers[GPU]   key_0 -> 0b0111 ─┐            a slot  = (source, rank, group), one bit of every mask
                 key_1 -> 0b0111 ─┴ one run    a mask  = the set of slots that hold the block on this tier,
                 key_2 -> 0b0011 ── next run             an int; equal masks are one object (interned)
    tiers[CPU]   key_0 -> 0b1000

Blocks of one prompt mostly share one holder set, so a walk over a prompt sees few runs of identical masks, and
what it costs depends on the runs, not on blocks x instances.

Several engine hashes of one slot may name the same block (lookahead hashing, two owners of one tier): the bit is
set once, `Slot.aliases` counts the others.

Invariant: for each slot, tier and key, the number of `show` minus `hide` calls is 0 if the bit is clear, and
1 + aliases[key] if it is set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from kvindexer.index.topology import Slot, Topology
from kvindexer.types import TIERS, Keyspace, SourceSpec, Tier

_FEWEST_MASKS: Final = 4096


class Space:
    """Holder sets of all blocks of one keyspace."""

    def __init__(self, keyspace: Keyspace) -> None:
        self.keyspace = keyspace
        self.tiers: tuple[dict[int, int], ...] = tuple({} for _ in TIERS)
        self.slots: list[Slot | None] = []
        self._masks: dict[int, int] = {}
        self._masks_limit = _FEWEST_MASKS
        self._topology: Topology | None = None

    def open_slot(self, source: str, spec: SourceSpec, rank: int, group: int) -> Slot:
        """A bit of its own for the blocks of one group of one rank of a source."""
        number = next((n for n, slot in enumerate(self.slots) if slot is None), len(self.slots))
        if number == len(self.slots):
            self.slots.append(None)
        slot = Slot(self, number, source, spec, rank=rank, group=group)
        self.slots[number] = slot
        self._topology = None
        return slot

    def close_slot(self, slot: Slot) -> None:
        """Give the bit back; the slot must hold nothing any more."""
        self.slots[slot.number] = None
        self._topology = None

    def changed(self) -> None:
        """What a slot is has changed: holders must be put together anew."""
        self._topology = None

    @property
    def topology(self) -> Topology:
        """Who the holders are and which slots are theirs."""
        if self._topology is None:
            self._topology = Topology(slot for slot in self.slots if slot is not None)
        return self._topology

    @property
    def in_use(self) -> bool:
        """Whether any source has a slot here."""
        return any(slot is not None for slot in self.slots)

    def holders(self, tier: Tier, key: int) -> Iterator[Slot]:
        """The slots that hold a block on this tier."""
        mask = self.tiers[tier].get(key, 0)
        while mask:
            lowest = mask & -mask
            slot = self.slots[lowest.bit_length() - 1]
            if slot is not None:
                yield slot
            mask ^= lowest

    def intern(self, mask: int) -> int:
        """The one object that stands for this holder set."""
        known = self._masks.setdefault(mask, mask)
        if len(self._masks) > self._masks_limit:
            self._forget_unused_masks()
        return known

    def _forget_unused_masks(self) -> None:
        """Sweep after as many new masks as there are blocks, so that a sweep costs O(1) a change."""
        self._masks = {mask: mask for holders in self.tiers for mask in holders.values()}
        self._masks_limit = 2 * len(self._masks) + sum(map(len, self.tiers)) + _FEWEST_MASKS

    def tidy(self) -> None:
        """Give memory back after many blocks went at once."""
        if len(self._masks) > 2 * sum(map(len, self.tiers)) + _FEWEST_MASKS:
            self._forget_unused_masks()
        for holders in self.tiers:
            if not holders:
                holders.clear()  # a dict that was emptied key by key keeps its table

    def show(self, slot: Slot, tier: Tier, key: int) -> None:
        """One more of the slot's engine hashes on this tier names the block."""
        holders = self.tiers[tier]
        mask = holders.get(key, 0)
        if mask & slot.bit:
            aliases = slot.aliases[tier]
            aliases[key] = aliases.get(key, 0) + 1
            return
        holders[key] = self.intern(mask | slot.bit)

    def show_all(self, slot: Slot, tier: Tier, keys: Iterable[int]) -> None:
        """`show` for many blocks: neighbours mostly have the same holder set, which is looked up once."""
        holders, aliases, bit = self.tiers[tier], slot.aliases[tier], slot.bit
        before = after = -1
        for key in keys:
            mask = holders.get(key, 0)
            if mask & bit:
                aliases[key] = aliases.get(key, 0) + 1
                continue
            if mask is not before:
                before, after = mask, self.intern(mask | bit)
            holders[key] = after

    def hide(self, slot: Slot, tier: Tier, key: int) -> None:
        """One less; the last one takes the slot out of the block's holder set."""
        aliases = slot.aliases[tier]
        if aliases and key in aliases:
            if aliases[key] == 1:
                del aliases[key]
            else:
                aliases[key] -= 1
            return
        holders = self.tiers[tier]
        mask = holders[key] & ~slot.bit
        if mask:
            holders[key] = self.intern(mask)
        else:
            del holders[key]

    def hide_all(self, slot: Slot, tier: Tier, keys: Iterable[int]) -> None:
        """`hide` for many blocks, as `show_all`."""
        holders, aliases, bit = self.tiers[tier], slot.aliases[tier], slot.bit
        before = after = -1
        for key in keys:
            if key in aliases:
                self.hide(slot, tier, key)
                continue
            mask = holders[key]
            if mask is not before:
                before, after = mask, mask & ~bit
                after = self.intern(after) if after else 0
            if after:
                holders[key] = after
            else:
                del holders[key]
