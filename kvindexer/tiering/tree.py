"""Weights of prompts' blocks as a tree of runs: blocks that were always asked for together share one weight.

    root ─┬─ k0 k1 k2  7.0 ─┬─ k3 k4  5.0         counting  k0 k1 k2 k3 k8
          │                 └─ k5     1.0           adds to    k0 k1 k2, k3, which is parted from k4,
          └─ k6 k7     2.0                          and k8 is a new run behind k3

So a prompt costs what its runs cost, however long they are: a few comparisons each.  Keys of prompts are chains, each
stands for the whole prompt up to its block, so where two prompts part is found by halves.  Of keys that are no chain
runs may hold a few others than those that were asked for, which does no harm.

Invariant: along a path weights never grow, and none is below the floor, with which new blocks begin.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

ROOT: Final = -1
"""Stands for the block before the first one."""


class Run:
    """Consecutive blocks, at least one, and those that were asked for behind them."""

    __slots__ = ("below", "keys", "weight")

    def __init__(self, keys: array[int], weight: float, below: dict[int, Run]) -> None:
        self.keys = keys
        """Packed: thousands of integers that are dropped one by one take longer than all else here."""
        self.weight = weight
        self.below = below
        """By their first key."""

    def shared(self, keys: Sequence[int], start: int) -> int:
        """How many of its blocks a prompt goes through that goes on with the first one at `start`."""
        own = self.keys
        end = min(len(own), len(keys) - start) - 1
        if own[end] == keys[start + end]:
            return end + 1
        low = 1
        while low < end:
            middle = (low + end) >> 1
            if own[middle] == keys[start + middle]:
                low = middle + 1
            else:
                end = middle
        return low


class Placed(NamedTuple):
    """A run, and where it is."""

    run: Run
    start: int
    """Blocks before it."""
    above: int
    """Key of the block before it."""


class Runs:
    """All prompts of one keyspace."""

    def __init__(self) -> None:
        self.blocks = 0
        self.floor = 0.0
        """What a block begins with; the part of a weight that says nothing."""
        self._first: dict[int, Run] = {}
        self._by_key: dict[int, Run] | None = None
        """Only while single blocks are asked for; then without those of `_newer`."""
        self._newer: list[Run] = []

    def count(self, keys: Sequence[int], weight: float) -> int:
        """Add to the weight of a prompt's blocks; says how many runs it has gone through."""
        below, start, length, passed = self._first, 0, len(keys), 0
        while start < length:
            passed += 1
            run = below.get(keys[start])
            if run is None:
                run = below[keys[start]] = Run(array("Q", keys[start:]), self.floor + weight, {})
                self.blocks += length - start
                self._note(run)
                break
            shared = run.shared(keys, start)
            if shared < len(run.keys):
                self._part(run, shared)
            run.weight += weight
            start += shared
            below = run.below
        return passed

    def _part(self, run: Run, length: int) -> None:
        """Leave it so many blocks; the others become a run behind it."""
        rest = Run(run.keys[length:], run.weight, run.below)
        run.keys, run.below = run.keys[:length], {rest.keys[0]: rest}
        self._note(rest)

    def _note(self, run: Run) -> None:
        if self._by_key is not None:
            self._newer.append(run)

    def weight(self, key: int) -> float:
        """The weight of one block; that of a block that is not there is the floor."""
        if self._by_key is None:
            self._by_key = {}
            self._newer = [placed.run for placed in self.all()]
        for run in self._newer:
            self._by_key.update(dict.fromkeys(run.keys, run))
        self._newer.clear()
        known = self._by_key.get(key)
        return self.floor if known is None else known.weight

    def all(self) -> Iterator[Placed]:
        """Every run."""
        waiting = [Placed(run, 0, ROOT) for run in self._first.values()]
        while waiting:
            placed = waiting.pop()
            yield placed
            run, start = placed.run, placed.start + len(placed.run.keys)
            waiting += [Placed(below, start, run.keys[-1]) for below in run.below.values()]

    def lighten(self) -> None:
        """Drop the lighter half of the blocks, and move the floor up to what they weighed at most."""
        half, blocks = self.blocks // 2, 0
        for run in sorted((placed.run for placed in self.all()), key=lambda run: run.weight):
            blocks += len(run.keys)
            if blocks > half:
                self.floor = run.weight
                break
        self._first = self._kept(self._first)
        waiting = list(self._first.values())
        self.blocks = 0
        while waiting:
            run = waiting.pop()
            self.blocks += len(run.keys)
            if run.below:
                run.below = self._kept(run.below)
                waiting += run.below.values()
        self._by_key = None
        self._newer.clear()

    def _kept(self, runs: dict[int, Run]) -> dict[int, Run]:
        return {key: run for key, run in runs.items() if run.weight > self.floor}

    def divide(self, by: float) -> None:
        """Begin anew with small numbers."""
        for placed in self.all():
            placed.run.weight /= by
        self.floor /= by
