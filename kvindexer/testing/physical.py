"""The physical blocks of a fake GPU: reference counts, free queue, and which block holds which digest.

    free queue   [least recently freed ... most recently freed]
                  ^ allocate() takes here, evicting what the block held
                                    release() puts here, leaf first, hash kept ^
                  ^ release() puts blocks without a hash here, since vLLM 0.24

Invariant: every block is either referenced by a request or in the free queue, never both; a digest maps to all
blocks that hold it, and duplicates are never merged. Block 0 is a placeholder and is never handed out, as in vLLM.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvindexer.testing.events import Digest

GroupedDigest = tuple[int, "Digest"]
"""A digest in one KV-cache group; the groups of a hybrid model share the blocks but not their content."""

BlockId = int
RESERVED_BLOCKS = 1


class PhysicalBlocks:
    """A fixed number of blocks, as vLLM's BlockPool keeps them."""

    def __init__(self, num_blocks: int, *, reuse_empty_first: bool = True) -> None:
        if num_blocks <= RESERVED_BLOCKS:
            raise ValueError(f"num_blocks: expected more than {RESERVED_BLOCKS}, got {num_blocks}")
        self._reuse_empty_first = reuse_empty_first
        self.usable = num_blocks - RESERVED_BLOCKS
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(range(RESERVED_BLOCKS, num_blocks))
        self._references = [0] * num_blocks
        self._content: dict[BlockId, GroupedDigest] = {}
        self._holders: dict[GroupedDigest, dict[BlockId, None]] = {}

    @property
    def free_count(self) -> int:
        """Blocks that no request refers to; many of them still hold reusable content."""
        return len(self._free)

    def find(self, key: GroupedDigest) -> BlockId | None:
        """Return the longest-standing block that holds `key`."""
        return next(iter(self._holders.get(key, ())), None)

    def is_free(self, block: BlockId) -> bool:
        """Tell whether no request refers to the block."""
        return block in self._free

    def allocate(self, count: int) -> tuple[list[BlockId], list[GroupedDigest]]:
        """Take the least recently freed blocks; also return, in order, the contents this evicts."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        evicted = []
        for block in blocks:
            self._references[block] = 1
            if block in self._content:
                evicted.append(self._forget(block))
        return blocks, evicted

    def touch(self, blocks: Iterable[BlockId]) -> None:
        """Refer to blocks that are reused; free ones leave the free queue."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Drop a request's references, its last block first, so that leaves are evicted before their parents."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._reuse_empty_first and block not in self._content:
                    self._free.move_to_end(block, last=False)

    def fill(self, block: BlockId, key: GroupedDigest) -> None:
        """Note that a block is now full and reusable under `key`."""
        self._content[block] = key
        self._holders.setdefault(key, {})[block] = None

    def clear(self) -> bool:
        """Forget all contents, unless some request still refers to a block."""
        if len(self._free) != self.usable:
            return False
        self._content.clear()
        self._holders.clear()
        return True

    def held(self) -> Counter[GroupedDigest]:
        """Count the physical copies of everything reusable."""
        return Counter(self._content.values())

    def _forget(self, block: BlockId) -> GroupedDigest:
        key = self._content.pop(block)
        holders = self._holders[key]
        del holders[block]
        if not holders:
            del self._holders[key]
        return key
