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
from itertools import accumulate, takewhile
from operator import or_
from time import monotonic
from typing import Final, NamedTuple

from kvindexer.api.lookup import Found
from kvindexer.api.prompt import Prompt
from kvindexer.index.seam import HolderMatch, Index
from kvindexer.tiering.marks import EVERY, Marks
from kvindexer.tiering.speculative import Speculation

_NOTHING: Final[frozenset[int]] = frozenset()


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
        self, found: Sequence[Found], prompt: Prompt, candidates: Collection[str] | None
    ) -> dict[str, Ahead] | None:
        """Instances that get further than what they hold; None: none of them."""
        self._speculation.expire(self._clock())
        reached: dict[str, Ahead] = {}
        for keyspace, matches in found:
            marks, keys = self._speculation.marks(keyspace), prompt.keys(keyspace.block_size)
            if marks is None or not keys:
                continue
            going_on = _going_on(keys, matches, marks, self._speculation.instances(keyspace))
            known = self._index.instances(keyspace) if going_on else ()
            for instance, end in going_on:
                if instance in known and (candidates is None or instance in candidates):
                    tokens, before = end * keyspace.block_size, reached.get(instance)
                    if before is None or tokens > before.tokens:
                        reached[instance] = Ahead(tokens, keyspace.block_size)
        return _further(found, reached) if reached else None


def _further(found: Iterable[Found], reached: dict[str, Ahead]) -> dict[str, Ahead] | None:
    """Those that get further than another rank, or another block size, has matched already."""
    for keyspace, matches in found:
        for match in matches:
            soon = reached.get(match.instance)
            if soon is not None and match.usable * keyspace.block_size >= soon.tokens:
                del reached[match.instance]
    return reached or None


def _going_on(
    keys: list[int], matches: Iterable[HolderMatch], marks: Marks, routed: Mapping[str, Collection[int]]
) -> list[tuple[str, int]]:
    """Instances to which the block behind those that they hold was routed, and how far they get."""
    along, bits, length = marks.along(keys), marks.bits.get, len(keys)
    deepest = max(len(along), 1) * EVERY
    # nearly all instances fall out by the marks: what was routed does not go on where they end
    going_on = [
        (match.instance, match.held)
        for match in matches
        if (held := match.held) < deepest
        and held < length
        and (held < EVERY or along[held // EVERY] & bits(match.instance, 0))
        and keys[held] in routed.get(match.instance, _NOTHING)
    ]
    if along:
        going_on += [
            (instance, 0)
            for instance in marks.bits.keys() - {match.instance for match in matches}
            if along[0] & bits(instance, 0) and keys[0] in routed.get(instance, _NOTHING)
        ]
    if not going_on:
        return []
    ends = _Ends(keys, along, marks.torn(keys))
    return [(instance, ends.of(held, routed[instance], bits(instance, 0))) for instance, held in going_on]


class _Ends:
    """Where the parts of one prompt end that were routed, to one instance after the other.

    A key stands for the whole prompt up to its block, so whoever routed it has routed those before it, too: where
    marks are not torn, it is waited for without a hole.
    """

    def __init__(self, keys: list[int], along: Sequence[int], torn: Sequence[int]) -> None:
        self._keys, self._along, self._torn = keys, along, torn
        self._torn_behind = list(accumulate(reversed(torn[1:]), or_, initial=0))[::-1]
        """For each mark the instances for which a later one is torn."""
        self._backwards = keys[::-1]
        self._found = {len(along): len(keys)}
        """Marks before an end -> the end that another instance has there; at first that of the whole prompt."""

    def of(self, start: int, blocks: Collection[int], bit: int) -> int:
        """How far an instance gets that waits for the block at `start`."""
        keys, along, mark = self._keys, self._along, start // EVERY
        if self._torn and (self._torn[mark] | self._torn_behind[mark]) & bit:
            # mostly by the events of blocks right before `start`: then it is whole from the next mark on
            stop = len(keys) if self._torn_behind[mark] & bit else min((mark + 1) * EVERY, len(keys))
            start += len(list(takewhile(blocks.__contains__, keys[start:stop])))
            if start < stop or start == len(keys) or keys[start] not in blocks:
                return start
        marks = bisect_left(along, x=True, lo=start // EVERY, key=lambda mask: not mask & bit)
        end = self._found.get(marks, 0)
        if end > start and keys[end - 1] in blocks and (end == len(keys) or keys[end] not in blocks):
            return end
        last = (marks - 1) * EVERY
        if last > start and keys[last] in blocks:
            end = self._among(last, min(last + EVERY, len(keys)), blocks)
        else:
            end = self._among(start, len(keys), blocks)
        self._found[marks] = end
        return end

    def _among(self, start: int, stop: int, blocks: Collection[int]) -> int:
        length = len(self._keys)
        return length - bisect_left(
            self._backwards, x=True, lo=length - stop, hi=length - start, key=blocks.__contains__
        )
