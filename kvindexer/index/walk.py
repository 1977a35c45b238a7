"""Walking a prompt's keys over the masks: how long a prefix each holder has.

    keys      k0    k1    k2    k3    k4
    masks     0111  0111  0011  0011  0000       runs of one mask object
    alive     0111 ────►  0011 ────►  0          a bit that drops out has its depth

The keys are grouped into segments of equal masks once; everything after works on segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Final, NamedTuple

from kvindexer.index.seam import HolderMatch
from kvindexer.index.space import Space
from kvindexer.index.topology import Holder, Tail
from kvindexer.types import TIERS, Tier

_ByTier = tuple[int, int, int, int]

_ONLY_TIER: Final[Mapping[Tier, Callable[[int], tuple[_ByTier, _ByTier]]]] = {
    Tier.GPU: lambda held: ((held, 0, 0, 0), (held, held, held, held)),
    Tier.CPU: lambda held: ((0, held, 0, 0), (0, held, held, held)),
    Tier.DISK: lambda held: ((0, 0, held, 0), (0, 0, held, held)),
    Tier.REMOTE: lambda held: ((0, 0, 0, held), (0, 0, 0, held)),
}
"""(alone, cumulative) where only one tier is in use, which is the common case."""


class Segment(NamedTuple):
    """Consecutive blocks [start, end) with the same holders; one mask for each tier in use."""

    start: int
    end: int
    masks: tuple[int, ...]


def match(
    space: Space, keys: Sequence[int], prompt_tokens: int, holders: Sequence[Holder], wanted: int
) -> list[HolderMatch]:
    """What each of these holders has of the prompt; those without a first block are left out.

    `wanted` are the bits of all their slots.
    """
    tiers = [tier for tier in TIERS if space.tiers[tier]]
    cap = max(0, (prompt_tokens - 1) // space.keyspace.block_size)
    if tiers == [Tier.GPU] and space.topology.plain:
        return _match_gpu(space, keys, wanted, cap)
    segments = _segments(space, keys, tiers, wanted)
    if not segments:
        return []
    walk = _Walk(segments, tiers, wanted)
    matches = (walk.match(holder, cap) for holder in holders)
    return [found for found in matches if found is not None]


def _match_gpu(space: Space, keys: Sequence[int], wanted: int, cap: int) -> list[HolderMatch]:
    """The walk where only GPUs hold blocks and every holder is one slot: a bit that drops out is an answer.

    It says what the general walk says (the tests compare them); most fleets and most queries are like this.
    """
    topology = space.topology
    holder_of, feeds = topology.holder_of, topology.feeds
    found: list[HolderMatch] = []
    alive, before, depth, made = wanted, -1, 0, 0
    # a mask that follows the last block: there everybody who is left drops out
    for depth, mask in enumerate(chain(map(space.tiers[Tier.GPU].get, keys, repeat(0)), (0,))):
        if mask is before:  # holder sets are interned, so this is nearly all of the runs; equal ones do no harm
            continue
        before = mask
        left = alive & (_fed(mask, feeds) if feeds else mask)
        if left == alive:
            continue
        gone, alive = alive ^ left, left
        if depth:
            reusable = min(depth, cap)
            known = topology.matches(depth, reusable)
            while gone:
                bit = gone & -gone
                gone ^= bit
                match = known.get(bit)
                if match is None:
                    holder = holder_of[bit]
                    cached = reusable - holder.speculative_blocks if reusable > holder.speculative_blocks else 0
                    match = known[bit] = HolderMatch(
                        holder.instance,
                        holder.rank,
                        depth,
                        depth,
                        cached,
                        (depth, 0, 0, 0),
                        (depth, depth, depth, depth),
                        holder.unknown_group,
                    )
                    made += 1
                found.append(match)
        if not alive:
            break
    topology.room -= made
    return found


def _segments(space: Space, keys: Sequence[int], tiers: Sequence[Tier], wanted: int) -> list[Segment]:
    """Runs of equal masks, up to where no wanted holder has an unbroken prefix."""
    topology = space.topology
    columns = [map(space.tiers[tier].get, keys, repeat(0)) for tier in tiers]
    single = len(columns) == 1
    rows: Iterable[int | tuple[int, ...]] = columns[0] if single else zip(*columns, strict=True)
    segments: list[Segment] = []
    start, alive = 0, wanted
    row: int | tuple[int, ...] | None = None
    masks: tuple[int, ...] = ()
    position = 0
    for position, following in enumerate(rows):
        if following == row:
            continue
        if row is not None:
            segments.append(Segment(start, position, masks))
        row, start = following, position
        masks = (row,) if isinstance(row, int) else row
        if topology.feeds:
            masks = tuple(_fed(mask, topology.feeds) for mask in masks)
        union = masks[0]
        for mask in masks[1:]:
            union |= mask
        alive &= union
        if not alive and not topology.tail_only:
            return segments
    if row is not None:
        segments.append(Segment(start, position + 1, masks))
    return segments


def _fed(mask: int, feeds: Sequence[tuple[int, int]]) -> int:
    for bit, primaries in feeds:
        if mask & bit:
            mask |= primaries
    return mask


class _Walk:
    """The depths of all slots in every view of one prompt's segments."""

    def __init__(self, segments: list[Segment], tiers: Sequence[Tier], wanted: int) -> None:
        self._segments = segments
        self._tiers = tiers
        self._wanted = wanted
        self._alone = [self._depths(range(n, n + 1)) for n in range(len(tiers))]
        self._cumulative = [self._alone[0]] + [self._depths(range(n + 1)) for n in range(1, len(tiers))]

    def _depths(self, view: range) -> dict[int, int]:
        """Slot number -> leading blocks on any tier of the view; slots without a first block are left out."""
        depths: dict[int, int] = {}
        alive = self._wanted
        end = 0
        for segment in self._segments:
            mask = 0
            for n in view:
                mask |= segment.masks[n]
            gone = alive & ~mask
            if gone:
                _note(depths, gone, segment.start)
                alive &= mask
                if not alive:
                    return depths
            end = segment.end
        _note(depths, alive, end)
        return depths

    def match(self, holder: Holder, cap: int) -> HolderMatch | None:
        """This holder's figures; `cap` is how many blocks an engine reuses at most without a connector."""
        whole = range(len(self._tiers))
        if holder.prefix:
            held = min(self._cumulative[-1].get(n, 0) for n in holder.prefix)
        else:
            held = self._cut(self._segments[-1].end, holder.tails, whole)
        if not held:
            return None
        usable = self._cut(held, holder.tails, whole) if holder.tails and holder.prefix else held
        alone, cumulative = self._by_tier(holder, held)
        gpu = self._cut(min(alone[Tier.GPU], cap), holder.tails, range(1))
        cached = max(0, gpu - holder.speculative_blocks)
        if holder.connector:
            cached = self._extended(holder, cached, usable)
        return HolderMatch(
            holder.instance, holder.rank, held, usable, cached, alone, cumulative, holder.unknown_group
        )

    def _by_tier(self, holder: Holder, held: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        if len(self._tiers) == 1:
            return _ONLY_TIER[self._tiers[0]](held)
        alone, cumulative, deepest = [0] * len(TIERS), [0] * len(TIERS), 0
        for tier in TIERS:
            if tier in self._tiers:
                column = self._tiers.index(tier)
                alone[tier] = self._depth(holder, self._alone[column], range(column, column + 1))
                deepest = self._depth(holder, self._cumulative[column], range(column + 1))
            cumulative[tier] = deepest
        return (alone[0], alone[1], alone[2], alone[3]), (cumulative[0], cumulative[1], cumulative[2], cumulative[3])

    def _depth(self, holder: Holder, depths: dict[int, int], view: range) -> int:
        if holder.prefix:
            return min(depths.get(n, 0) for n in holder.prefix)
        return self._cut(self._segments[-1].end, holder.tails, view)

    def _cut(self, blocks: int, tails: tuple[Tail, ...], view: range) -> int:
        """The longest prefix of at most `blocks` blocks that every tail's rule allows."""
        settled = not tails
        while not settled:
            before = blocks
            for tail in tails:
                blocks = self._cut_one(blocks, tail, view)
            settled = blocks == before
        return blocks

    def _cut_one(self, blocks: int, tail: Tail, view: range) -> int:
        bit = 1 << tail.number
        end = 0  # end of the held run that is being followed backwards; 0: none
        for segment in reversed(self._segments):
            if segment.start >= blocks:
                continue
            held = any(segment.masks[n] & bit for n in view)
            if held:
                end = end or min(segment.end, blocks)
                if end - segment.start >= tail.blocks:
                    return end
            else:
                end = 0
        return end  # a run from the very first block may be shorter than the window

    def _extended(self, holder: Holder, reused: int, usable: int) -> int:
        """Where a connector gets to that goes on from the GPU's prefix with blocks of the tiers below."""
        below = range(1 if self._tiers[0] is Tier.GPU else 0, len(self._tiers))
        bits = sum(1 << n for n in holder.prefix or [tail.number for tail in holder.tails])
        for segment in self._segments:
            if segment.end <= reused:
                continue
            mask = 0
            for n in below:
                mask |= segment.masks[n]
            if segment.start > reused or mask & bits != bits or reused >= usable:
                break
            reused = min(segment.end, usable)
        return reused


def _note(depths: dict[int, int], bits: int, depth: int) -> None:
    if not depth:
        return
    while bits:
        low = bits & -bits
        depths[low.bit_length() - 1] = depth
        bits ^= low
