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
from itertools import islice, takewhile
from time import monotonic
from typing import Final, NamedTuple

from kvindexer.api.lookup import Found
from kvindexer.api.prompt import Prompt
from kvindexer.index.seam import Index
from kvindexer.tiering.speculative import Speculation
from kvindexer.types import Keyspace

MOST_BRIDGES: Final = 16
"""Routed blocks lead on to held ones at most so often; behind that it is not looked any further."""


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
            size, keys = keyspace.block_size, prompt.keys(keyspace.block_size)
            depths: dict[str, dict[int | None, int]] = {}
            for match in matches:
                if match.instance in routed:
                    depths.setdefault(match.instance, {})[match.rank] = match.held
            known = self._index.instances(keyspace)
            for instance, blocks in routed.items():
                if instance not in known or (candidates is not None and instance not in candidates):
                    continue
                ranks = depths.get(instance) or {None: 0}
                longest = max(
                    self._reach(keyspace, keys, blocks, _Rank(instance, rank, held)) for rank, held in ranks.items()
                )
                before = reached.get(instance)
                if longest > max(ranks.values()) and (before is None or longest * size > before.tokens):
                    reached[instance] = Ahead(longest * size, size)
        return reached if any_routed else None

    def _reach(self, keyspace: Keyspace, keys: Sequence[int], routed: Collection[int], known: _Rank) -> int:
        """Leading blocks of the prompt, routed or held by one rank."""
        instance, rank, depth = known
        for _ in range(MOST_BRIDGES):
            run = sum(1 for _ in takewhile(routed.__contains__, islice(keys, depth, None)))
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
