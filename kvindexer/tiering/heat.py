"""How often blocks are asked for, in bounded memory: decayed counts of the blocks of prompts, by keyspace.

    asked(k0 k1 k2) ──► budget left? ── no ──► counted by the next one of its keyspace, which weighs more
                            │ yes
                            ▼
    runs      k0 k1 ─► 7.0 ─► k2 ─► 3.0             a block's prefix is asked for whenever the block is,
                                                    so weights never grow along a prompt (`tiering.tree`)

Old counts fade: after `half_life_s` they are worth half.  Weights are not touched for that; new ones grow instead
(forward decay), and all are divided now and then.

Past its bound a table drops its lighter half and moves its floor up to what that half weighed at most (Misra and
Gries, in batches).  A block that comes later begins at the floor, so

    estimate <= truth <= estimate + error,    error = the floor, about 2 / max_blocks of all that was counted

of the prompts that were looked at.  `error_per_minute` is the exact figure.  If more is asked than `blocks_per_s`,
prompts are left out by chance of timing, and the next one that is counted stands for those before it: then estimates
are right on average.  A prompt that is left out costs a microsecond.  A run costs the budget `RUN_BLOCKS` at least,
since it takes as long: so a second's budget takes about the same time whatever is asked
(docs/decisions/0021-speculation-feedback-heat.md).

Keys of blocks are all that is kept, never tokens.  Keyspaces (so tenants, too) have tables of their own, which share
the bound evenly: none can push out another's counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import nlargest
from math import exp2, log
from random import Random
from typing import Final, NamedTuple

from kvindexer.tiering.tree import Runs
from kvindexer.types import Keyspace

MIN_SHARE: Final = 256
"""Fewest blocks of a table; if there are more keyspaces than fit, the one that was asked for longest ago goes."""
RUN_BLOCKS: Final = 16
"""So many blocks of the budget each run costs that a prompt goes through, at least."""
PREFIX_ENDS: Final = 0.9
"""A shared prefix ends where no next block has that share of its heat."""

_MINUTE_S: Final = 60.0
_MOST_GROWTH: Final = 2.0**30
_TWICE: Final = 1.5
"""So many of the heaviest single counts is more than one."""
_LONGEST_SHARE: Final = 4
"""Of one prompt at most this part of a table is counted."""
_SAVED_S: Final = 0.05
"""Budget of quiet times that is kept for busy ones."""


class HotBlock(NamedTuple):
    """A block that was asked for more than once, and the prefix that it ends."""

    key: int
    above: int
    """Key of the block before it; -1: it is the first."""
    blocks: int
    """Length of the prefix."""
    asked_per_minute: float


class HeatCounts:
    """The counts of one service.  `clock` is any monotonic one, in seconds."""

    def __init__(
        self,
        max_blocks: int,
        half_life_s: float,
        blocks_per_s: float,
        clock: Callable[[], float],
        dice: Random | None = None,
    ) -> None:
        self._max_blocks = max(max_blocks, MIN_SHARE)
        self._half_life_s = half_life_s
        self._blocks_per_s = blocks_per_s
        self._clock = clock
        self._dice = dice or Random()  # noqa: S311 - spreads samples, guards nothing
        self._tables: dict[Keyspace, _Table] = {}
        self._looked_at = self._began_at = clock()
        self._budget = self._most_budget = max(1.0, blocks_per_s * _SAVED_S)
        self._wanted = 0.0
        """Budget that the next prompt needs to be counted."""
        self.counted = 0
        """Prompts that were counted."""
        self.left_out = 0
        """Prompts for which there was no budget."""

    def asked(self, keyspace: Keyspace, keys: Sequence[int]) -> None:
        """Somebody wants to know who holds this prompt."""
        now = self._clock()
        budget = min(self._budget + (now - self._looked_at) * self._blocks_per_s, self._most_budget)
        self._looked_at = now
        table = self._tables.get(keyspace)
        if table is None:
            table = self._open(keyspace, now)
        table.asked_at = now
        if budget < self._wanted:
            self._budget = budget
            self.left_out += 1
            table.left_out += 1
            return
        share = self._max_blocks // len(self._tables)
        if len(keys) > share // _LONGEST_SHARE:
            keys = keys[: share // _LONGEST_SHARE]
        self.counted += 1
        growth = self._growth(now)
        if growth > _MOST_GROWTH:
            for each in self._tables.values():
                each.divide(growth)
            self._began_at, growth = now, 1.0
        cost = max(len(keys), RUN_BLOCKS * table.count(keys, growth))
        self._budget = budget - cost
        self._wanted = min(self._dice.random() * cost, self._most_budget)
        if table.runs.blocks > share:
            table.shed(share)

    def heat(self, keyspace: Keyspace, key: int) -> float:
        """How often a block is asked for, a minute; 0: hardly ever, or never."""
        table = self._tables.get(keyspace)
        if table is None:
            return 0.0
        return (table.runs.weight(key) - table.runs.floor) * self._a_minute(table, self._clock())

    def error_per_minute(self, keyspace: Keyspace) -> float:
        """How much more a block may have been asked for than `heat` says, but for prompts that were left out."""
        table = self._tables.get(keyspace)
        return 0.0 if table is None else table.runs.floor * self._a_minute(table, self._clock())

    @property
    def blocks(self) -> int:
        """Blocks that have a count."""
        return sum(table.runs.blocks for table in self._tables.values())

    def prefixes(self, keyspace: Keyspace, most: int) -> list[HotBlock]:
        """Shared prefixes, those first whose tokens are asked for most: how often, times how long."""
        return self._best(keyspace, most, _Table.ends, lambda block: block.asked_per_minute * block.blocks)

    def hottest(self, keyspace: Keyspace, most: int) -> list[HotBlock]:
        """Blocks that are asked for most."""
        return self._best(keyspace, most, _Table.shared, lambda block: block.asked_per_minute)

    def _best(
        self,
        keyspace: Keyspace,
        most: int,
        choose: Callable[[_Table, float], Iterator[HotBlock]],
        worth: Callable[[HotBlock], float],
    ) -> list[HotBlock]:
        table = self._tables.get(keyspace)
        if table is None:
            return []
        chosen = choose(table, self._a_minute(table, self._clock()))
        return nlargest(most, chosen, key=lambda block: (worth(block), -block.key))

    def _open(self, keyspace: Keyspace, now: float) -> _Table:
        if len(self._tables) >= self._max_blocks // MIN_SHARE:
            del self._tables[min(self._tables, key=lambda name: self._tables[name].asked_at)]
        table = self._tables[keyspace] = _Table(now)
        share = self._max_blocks // len(self._tables)
        for each in self._tables.values():
            if each.runs.blocks > share:
                each.shed(share)
        return table

    def _growth(self, now: float) -> float:
        """What a prompt weighs now that is counted once."""
        return exp2((now - self._began_at) / self._half_life_s)

    def _a_minute(self, table: _Table, now: float) -> float:
        """What weights have to be multiplied with: of a steady stream they are a rate times the mean life of a count.

        A table that is young has not seen that much yet; below a minute of age nothing is made larger than it was.
        """
        mean_life_s = self._half_life_s / log(2)
        age_s = max(now - table.born_at, _MINUTE_S)
        seen_s = mean_life_s * (1 - exp2(-age_s / self._half_life_s))
        return _MINUTE_S / (seen_s * self._growth(now))


class _Table:
    """The counts of one keyspace."""

    __slots__ = ("asked_at", "born_at", "heaviest", "left_out", "runs")

    def __init__(self, now: float) -> None:
        self.runs = Runs()
        self.heaviest = 0.0
        """Most that one prompt has weighed."""
        self.left_out = 0
        """Prompts since the last one that was counted."""
        self.born_at = self.asked_at = now

    def count(self, keys: Sequence[int], growth: float) -> int:
        """Count a prompt, and those that were left out before it; says how many runs that took."""
        weight = growth * (1 + self.left_out)
        self.left_out = 0
        self.heaviest = max(self.heaviest, weight)
        return self.runs.count(keys, weight)

    def shed(self, share: int) -> None:
        """Drop the lighter half, and more if need be."""
        most = share - share // _LONGEST_SHARE  # so that the next prompts find room
        while self.runs.blocks > most:
            self.runs.lighten()

    def divide(self, growth: float) -> None:
        """Begin anew with small numbers."""
        self.runs.divide(growth)
        self.heaviest /= growth

    def shared(self, a_minute: float) -> Iterator[HotBlock]:
        """Blocks that were counted more than once."""
        floor, least = self.runs.floor, self.runs.floor + _TWICE * self.heaviest
        for run, start, above in self.runs.all():
            if run.weight > least:
                asked, before = (run.weight - floor) * a_minute, above
                for blocks, key in enumerate(run.keys, start + 1):
                    yield HotBlock(key, before, blocks, asked)
                    before = key

    def ends(self, a_minute: float) -> Iterator[HotBlock]:
        """Those of them that end a shared prefix."""
        floor, least = self.runs.floor, self.runs.floor + _TWICE * self.heaviest
        for run, start, above in self.runs.all():
            if run.weight > least:
                followed = max((below.weight for below in run.below.values()), default=floor) - floor
                if followed < PREFIX_ENDS * (run.weight - floor):
                    before = run.keys[-2] if len(run.keys) > 1 else above
                    yield HotBlock(run.keys[-1], before, start + len(run.keys), (run.weight - floor) * a_minute)
