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
from collections.abc import Callable, Collection, Iterable, Sequence
from time import monotonic
from typing import NamedTuple

from kvindexer.api.lookup import Found
from kvindexer.api.prompt import Prompt
from kvindexer.index.seam import Index
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
            if not routed:
                continue
            size, keys = keyspace.block_size, prompt.keys(keyspace.block_size)
            if not keys:
                continue
            # nearly all questions or instances fall out here: what was routed does not go on where they end
            receivers = self._speculation.receivers(keyspace).get
            depths = {match.held for match in matches}
            after = {held: names for held in depths if held < len(keys) and (names := receivers(keys[held]))}
            ends = [
                (match.instance, match.held)
                for match in matches
                if match.held in after and match.instance in after[match.held]
            ]
            others = receivers(keys[0])
            if others:
                begun = {match.instance for match in matches}
                ends += [(instance, 0) for instance in others if instance not in begun]
            known = self._index.instances(keyspace) if ends else ()
            for instance, held in ends:
                if instance in known and (candidates is None or instance in candidates):
                    tokens = _end(keys, held, routed[instance]) * size
                    before = reached.get(instance)
                    if before is None or tokens > before.tokens:
                        reached[instance] = Ahead(tokens, size)
        return reached or None


def _end(keys: Sequence[int], start: int, blocks: Collection[int]) -> int:
    """How far the keys reach that were routed, from one on that was.

    A key stands for the whole prompt up to its block, so whoever routed it has routed those before it, too.
    """
    return bisect_left(keys, 1, start, key=lambda key: int(key not in blocks))
