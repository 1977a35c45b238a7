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
from typing import NamedTuple

from kvindexer.api.lookup import Found
from kvindexer.api.prompt import Prompt
from kvindexer.index.seam import HolderMatch, Index
from kvindexer.tiering.speculative import Speculation


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
            routed = self._speculation.instances(keyspace)
            keys = prompt.keys(keyspace.block_size)
            if not routed or not keys:
                continue
            going_on = _going_on(keys, matches, routed)
            first = keys[0]
            begun = self._speculation.begun(keyspace, first)
            if begun:
                without = set(begun).difference([match.instance for match in matches])
                going_on += [(name, 0, blocks) for name in without if first in (blocks := routed.get(name, ()))]
            if not going_on:
                continue
            known = self._index.instances(keyspace)
            size, backwards = keyspace.block_size, keys[::-1]
            for instance, held, blocks in going_on:
                if instance in known and (candidates is None or instance in candidates):
                    tokens = _end(backwards, held, blocks) * size
                    before = reached.get(instance)
                    if before is None or tokens > before.tokens:
                        reached[instance] = Ahead(tokens, size)
        return reached or None


def _going_on(
    keys: Sequence[int], matches: Iterable[HolderMatch], routed: Mapping[str, Collection[int]]
) -> list[tuple[str, int, Collection[int]]]:
    """Instances to which the block behind those that they hold was routed; where that is, and what was routed."""
    blocks_of, length = routed.get, len(keys)
    return [
        (match.instance, match.held, blocks)
        for match in matches
        if match.held < length and keys[match.held] in (blocks := blocks_of(match.instance, ()))
    ]


def _end(backwards: Sequence[int], start: int, blocks: Collection[int]) -> int:
    """How far a prompt's keys reach that were routed, from one on that was; the keys are given last one first.

    A key stands for the whole prompt up to its block, so whoever routed it has routed those before it, too.
    """
    length = len(backwards)
    if backwards[0] in blocks:  # prompts alike
        return length
    return length - bisect_left(backwards, x=True, lo=0, hi=length - start, key=blocks.__contains__)
