"""How far instances will get soon: prompts that were routed to them count as held behind what they hold.

    keys       k0 k1 k2 k3 k4 k5 k6
    held       ■  ■  .  .  .  .  .       the index
    routed     ■  ■  ■  ■  ■  .  ■       the overlay (`tiering.speculative`)
    together   ■  ■  ■  ■  ■  .  .       five blocks

One rank of the instance, never a union over ranks.  Of a hybrid model the rules of cache groups are left out: an
engine that computes a prompt has all of it.  Held blocks behind a hole that only routed ones fill are not looked at:
engines drop the end of a prompt before its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from time import monotonic
from typing import Final

import msgspec

from kvindexer.api.lookup import Found
from kvindexer.api.prompt import Prompt
from kvindexer.index.seam import HolderMatch, Index
from kvindexer.tiering.routings import Routings
from kvindexer.tiering.speculative import Speculation

BEGINNING: Final = 16
"""Up to so many held blocks, also what was not routed from its first block on is looked for behind them."""


class Ahead(msgspec.Struct, frozen=True, gc=False):
    """Leading tokens of the prompt that an instance holds or will hold soon."""

    tokens: int
    block_size: int


class Lookahead:
    """Looks at index and overlay together."""

    def __init__(self, index: Index, speculation: Speculation, clock: Callable[[], float] = monotonic) -> None:
        self._index = index
        self._speculation = speculation
        self._clock = clock

    def ahead(
        self, found: Sequence[Found], prompt: Prompt, candidates: Collection[str] | None
    ) -> dict[str, Ahead] | None:
        """Instances that get further than what they hold; None: none of them."""
        self._speculation.expire(self._clock())
        reached: dict[str, Ahead] = {}
        several = len(found) > 1
        for keyspace, matches in found:
            routings, keys = self._speculation.routings(keyspace), prompt.keys(keyspace.block_size)
            if routings is None or not keys:
                continue
            holding = {match.instance for match in matches}
            several = several or len(holding) < len(matches)
            ends = _ends(keys, matches, holding, routings)
            if ends:
                size, names, known = keyspace.block_size, routings.names, self._index.instances(keyspace)
                for bit, end in ends.items():
                    instance = names[bit]
                    if instance in known and (candidates is None or instance in candidates):
                        before = reached.get(instance)
                        if before is None or end * size > before.tokens:
                            reached[instance] = Ahead(end * size, size)
        return (_further(found, reached) if several else reached) or None


def _further(found: Iterable[Found], reached: dict[str, Ahead]) -> dict[str, Ahead]:
    """Those that get further than another rank, or another block size, has matched already."""
    for keyspace, matches in found:
        for match in matches:
            soon = reached.get(match.instance)
            if soon is not None and match.usable * keyspace.block_size >= soon.tokens:
                del reached[match.instance]
    return reached


def _ends(
    keys: list[int], matches: Iterable[HolderMatch], holding: AbstractSet[str], routings: Routings
) -> dict[int, int]:
    """Bits of instances that wait for the block behind those that they hold -> how far they get."""
    stops, masks = routings.along(keys)
    bits = routings.bits
    waiting: list[int] = []  # for each block who waits for it
    for stop, mask in zip(stops, masks, strict=True):
        waiting += [mask] * (stop - len(waiting))
    reach = len(waiting)
    near = max(reach, BEGINNING)
    starts: dict[int, int] = {}
    elsewhere: list[tuple[int, int]] = []
    for match in [match for match in matches if match.held < near]:
        held = match.held
        bit = bits.get(match.instance, 0)
        if held >= reach:
            elsewhere += [(held, bit)] if bit else []
        elif (bit := bit & waiting[held]) and held >= starts.get(bit, 0):
            starts[bit] = held  # of several ranks the one that is furthest gets furthest
    if masks and not bits.keys() <= holding:
        starts |= {bit: 0 for instance, bit in bits.items() if bit & masks[0] and instance not in holding}
    ends = _going_on(stops, masks, starts) if starts else {}
    for held, bit in sorted(elsewhere):
        ends |= _going_on(*routings.along(keys, held), {bit: held})
    return ends


def _going_on(stops: list[int], masks: list[int], starts: Mapping[int, int]) -> dict[int, int]:
    """Where blocks end without a hole for which instances wait, from their starts on."""
    ends: dict[int, int] = {}
    left = sum(starts)
    for stop, mask, following in zip(stops, masks, [*masks[1:], 0], strict=False):
        going = left & mask & ~following
        while going:
            bit = going & -going
            going ^= bit
            if starts[bit] < stop:
                ends[bit] = stop
                left ^= bit
    return ends
