"""How far instances will get soon: prompts that were routed to them count as held, beside what they hold.

    keys       k0 k1 k2 k3 k4 k5 k6
    held       ■  ■  .  .  ■  .  .       the index
    routed     .  .  ■  ■  .  ■  .       the overlay (`tiering.speculative`)
    together   ■  ■  ■  ■  ■  ■  .       six blocks

One rank of the instance, never a union over ranks.  Of a hybrid model the rules of cache groups are left out: an
engine that computes a prompt has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from time import monotonic
from typing import Final, NamedTuple

from kvindexer.api.lookup import Found
from kvindexer.api.prompt import Prompt
from kvindexer.index.seam import Index
from kvindexer.tiering.speculative import Speculation
from kvindexer.types import Keyspace

MOST_BRIDGES: Final = 16
"""Routed blocks lead on to held ones at most so often; behind that it is not looked any further."""
_STRIDE: Final = 256
"""Keys that are looked up at a time."""


class Ahead(NamedTuple):
    """Leading tokens of the prompt that an instance holds or will hold soon."""

    tokens: int
    block_size: int


class _Rank(NamedTuple):
    instance: str
    rank: int | None
    """None: it holds nothing of the prompt, any rank may go on."""
    held: int
    """Leading blocks."""


class Lookahead:
    """Looks at index and overlay together."""

    def __init__(self, index: Index, speculation: Speculation, clock: Callable[[], float] = monotonic) -> None:
        self._index = index
        self._speculation = speculation
        self._clock = clock

    def ahead(
        self, found: Iterable[Found], prompt: Prompt, candidates: Collection[str] | None
    ) -> dict[str, Ahead] | None:
        """Instances that get further than what they hold; None: no prompt of these keyspaces is on its way."""
        self._speculation.expire(self._clock())
        reached: dict[str, Ahead] = {}
        any_routed = False
        for keyspace, matches in found:
            routed = self._speculation.instances(keyspace)
            if not routed:
                continue
            any_routed = True
            keys = prompt.keys(keyspace.block_size)
            # nearly all instances fall out here: what was routed to them does not go on where they end
            ranks = [
                _Rank(match.instance, match.rank, match.held)
                for match in matches
                if match.instance in routed and match.held < len(keys) and keys[match.held] in routed[match.instance]
            ]
            if keys:
                begun = {match.instance for match in matches}
                ranks += [
                    _Rank(instance, None, 0)
                    for instance, blocks in routed.items()
                    if keys[0] in blocks and instance not in begun
                ]
            if ranks:
                self._extend(reached, keyspace, keys, ranks, candidates)
        return reached if any_routed else None

    def _extend(
        self,
        reached: dict[str, Ahead],
        keyspace: Keyspace,
        keys: Sequence[int],
        ranks: Iterable[_Rank],
        candidates: Collection[str] | None,
    ) -> None:
        known, size = self._index.instances(keyspace), keyspace.block_size
        routed = self._speculation.instances(keyspace)
        for rank in ranks:
            instance = rank.instance
            if instance not in known or (candidates is not None and instance not in candidates):
                continue
            tokens = self._reach(keyspace, keys, routed[instance], rank) * size
            before = reached.get(instance)
            if before is None or tokens > before.tokens:
                reached[instance] = Ahead(tokens, size)

    def _reach(self, keyspace: Keyspace, keys: Sequence[int], routed: Collection[int], known: _Rank) -> int:
        """Leading blocks of the prompt, routed or held by one rank."""
        instance, rank, depth = known
        for _ in range(MOST_BRIDGES):
            run = _run(keys, depth, routed)
            depth += run
            if not run or depth == len(keys):
                break
            rest = keys[depth:]
            behind = [
                match
                for match in self._index.match(keyspace, rest, len(rest) * keyspace.block_size + 1, {instance})
                if rank in (None, match.rank)
            ]
            if not behind:
                break
            best = max(behind, key=lambda match: match.held)
            rank = best.rank
            depth += best.held
        return depth


def _run(keys: Sequence[int], start: int, blocks: Collection[int]) -> int:
    """How many keys from this one on are all among the blocks."""
    end = start
    while end < len(keys):
        among = list(map(blocks.__contains__, keys[end : end + _STRIDE]))
        if False in among:
            return end + among.index(False) - start
        end += len(among)
    return end - start
