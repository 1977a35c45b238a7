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

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from time import monotonic
from typing import Final, NamedTuple

from kvindexer.api.lookup import Found
from kvindexer.api.prompt import Prompt
from kvindexer.index.seam import HolderMatch, Index
from kvindexer.tiering.awaited import Awaited
from kvindexer.tiering.speculative import Speculation

_MOST_KNOWN: Final = 8
"""Ends of one prompt that are remembered: trying one costs a tenth of looking for it."""


class Ahead(NamedTuple):
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
        self, found: Iterable[Found], prompt: Prompt, candidates: Collection[str] | None
    ) -> dict[str, Ahead] | None:
        """Instances that get further than what they hold; None: none of them."""
        self._speculation.expire(self._clock())
        reached: dict[str, Ahead] = {}
        for keyspace, matches in found:
            awaited = self._speculation.awaited(keyspace)
            keys = prompt.keys(keyspace.block_size)
            if awaited is None or not keys:
                continue
            going_on = _going_on(keys, matches, awaited)
            if not going_on:
                continue
            known = self._index.instances(keyspace)
            ends = _Ends(keys, awaited.waiting, keyspace.block_size)
            for instance, held, bit in going_on:
                if instance in known and (candidates is None or instance in candidates):
                    soon, before = ends.of(held, bit), reached.get(instance)
                    if before is None or soon.tokens > before.tokens:
                        reached[instance] = soon
        return reached or None


def _going_on(keys: Sequence[int], matches: Sequence[HolderMatch], awaited: Awaited) -> list[tuple[str, int, int]]:
    """Instances that wait for the block behind those that they hold; with where that is, and their bit."""
    waiting, bits, length = awaited.waiting.get, awaited.bits, len(keys)
    going_on = [
        (match.instance, match.held, bit)
        for match in matches
        if match.held < length and (mask := waiting(keys[match.held])) and (bit := mask & bits.get(match.instance, 0))
    ]
    first = waiting(keys[0])
    if first:
        without = bits.keys() - {match.instance for match in matches}
        going_on += [(instance, 0, bit) for instance in without if (bit := first & bits[instance])]
    return going_on


class _Ends:
    """Where the parts of one prompt end that were routed: for most instances where they do for another, too.

    A key stands for the whole prompt up to its block, so whoever routed it has routed those before it, too.
    """

    def __init__(self, keys: Sequence[int], waiting: Mapping[int, int], block_size: int) -> None:
        self._keys = keys
        self._waiting = waiting
        self._block_size = block_size
        self._known: list[tuple[int, int, int, Ahead]] = []
        """An end, the masks of the blocks before and behind it, and what there is to say of it."""
        self._learn(len(keys))

    def of(self, start: int, bit: int) -> Ahead:
        """How far an instance gets that waits for the block at `start`."""
        for end, last, behind, ahead in self._known:
            if end > start and last & bit and not behind & bit:
                return ahead
        waiting = self._waiting.get
        return self._learn(bisect_left(self._keys, 1, start, key=lambda key: int(not waiting(key, 0) & bit)))

    def _learn(self, end: int) -> Ahead:
        keys, waiting = self._keys, self._waiting.get
        ahead = Ahead(end * self._block_size, self._block_size)
        behind = waiting(keys[end], 0) if end < len(keys) else 0
        if len(self._known) < _MOST_KNOWN:
            self._known.append((end, waiting(keys[end - 1], 0), behind, ahead))
        return ahead
