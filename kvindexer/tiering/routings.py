"""Routed prompts of one keyspace, as runs: consecutive blocks that the same routings name and events left alone.

    prompt to a     k0 k1 k2 k3 k4 k5         runs    k0 k1 k2 ─┬─ k3 k4 k5        bits of the instances that
    prompt to b     k0 k1 k2 j3 j4                      a b     │      a           wait for all blocks of it
                                                                └─ j3 j4
                                                                     b

A prompt that goes along a run to its last block has gone along all of it, since a key stands for the whole prompt up
to its block: so a question jumps from run to run, and a routing that comes or ends changes few of them.  A block is
`named` for as long as routings live, and `awaited` until an event speaks of it; of both the routing of an instance is
kept that ends last, which is what a count of references would say.

Invariant: every named block is in one run, once; all blocks of a run are named and awaited alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice, pairwise

from kvindexer.types import Keyspace

Place = tuple[Keyspace, str]
"""Keyspace and instance."""
Name = tuple[Place, int, int, int]
"""Place, last key, number of keys, and a number that tells those apart that are equal in all of this."""
Order = tuple[float, int]
"""When a routing ends, and which of equal ends is the later routing."""


class Routing:
    """One prompt that was routed to one instance, however often."""

    __slots__ = ("keys", "name", "order", "place")

    def __init__(self, name: Name, place: Place, keys: list[int], order: Order) -> None:
        self.name = name
        self.place = place
        self.keys = keys
        self.order = order


class Run:
    """Consecutive blocks that are named and awaited alike."""

    __slots__ = ("at", "awaited", "keys", "last", "mask", "named", "stop")

    def __init__(self, at: int, keys: list[int], named: dict[int, Routing], awaited: dict[int, Routing]) -> None:
        self.named = named
        """Bit of an instance -> its living routing that ends last."""
        self.awaited = awaited
        """The same, of those that came after the last event that spoke of the blocks."""
        self.mask = sum(awaited)
        self.lie(at, keys)

    def lie(self, at: int, keys: list[int]) -> None:
        """Have these blocks, the first one at this place of a prompt."""
        self.at = at
        self.keys = keys
        self.stop = at + len(keys)
        self.last = keys[-1]

    def join(self, bit: int, routing: Routing) -> int:
        """An instance waits for the blocks; returns for how many it did not before."""
        gained = 0 if self.mask & bit else len(self.keys)
        self.mask |= bit
        for routings in (self.named, self.awaited):
            other = routings.get(bit)
            if other is None or other.order < routing.order:
                routings[bit] = routing
        return gained

    def leave(self, bit: int) -> int:
        """An instance waits no more; returns for how many blocks it did."""
        if self.awaited.pop(bit, None) is None:
            return 0
        self.mask ^= bit
        return len(self.keys)

    def goes_on_as(self, other: Run) -> bool:
        """Whether the other one lies right behind this one, and is named and awaited as this one is."""
        return (
            self.mask == other.mask
            and self.stop == other.at
            and self.awaited == other.awaited
            and self.named == other.named
        )


class Routings:
    """Where prompts of one keyspace went, and what is awaited of them."""

    def __init__(self) -> None:
        self.bits: dict[str, int] = {}
        """A bit for each instance with a living routing; given anew when its last one is over."""
        self.names: dict[int, str] = {}
        """Bit -> instance."""
        self._used = 0
        self._runs: dict[int, Run] = {}
        """Of every block."""
        self._first: dict[int, Run] = {}
        """Of first blocks of runs alone: a small table that stays in the processor's caches, unlike the other."""
        self._living: Counter[str] = Counter()
        self._awaiting: Counter[str] = Counter()
        """For how many blocks an instance waits."""

    def __bool__(self) -> bool:
        return bool(self.bits)

    @property
    def blocks(self) -> int:
        """Different blocks that are awaited, by all instances together."""
        return self._awaiting.total()

    def awaits(self, instance: str) -> bool:
        """Whether the instance waits for any block."""
        return self._awaiting[instance] > 0

    def waiting(self, instance: str) -> set[int]:
        """Blocks for which the instance waits; not cheap."""
        bit = self.bits.get(instance, 0)
        return {key for key, run in self._runs.items() if run.mask & bit}

    def along(self, keys: Sequence[int], at: int = 0) -> tuple[list[int], list[int]]:
        """Parts of a prompt from this place on, as far as it is named: where they stop, and who waits for them."""
        stops: list[int] = []
        masks: list[int] = []
        length = len(keys)
        run = self._runs.get(keys[at]) if at < length else None
        while run is not None:
            stop = run.stop
            if not at < stop <= length or keys[stop - 1] != run.last:
                stop = _parting(run, keys, at)
            stops.append(stop)
            masks.append(run.mask)
            at, run = stop, None
            if stop < length:
                run = self._first.get(keys[stop]) or self._runs.get(keys[stop])
        return stops, masks

    # Changes

    def begin(self, routing: Routing) -> None:
        """A routing begins to live."""
        _, instance = routing.place
        if instance not in self.bits:
            bit = ~self._used & (self._used + 1)  # the lowest that is free
            self.bits[instance], self.names[bit] = bit, instance
            self._used |= bit
        self._living[instance] += 1
        self.expect(routing)

    def expect(self, routing: Routing) -> None:
        """All blocks of a living routing are awaited, also those that events spoke of."""
        _, instance = routing.place
        bit, keys = self.bits[instance], routing.keys
        at, gained = 0, 0
        before: Run | None = None
        while at < len(keys):
            run = self._runs.get(keys[at])
            run = self._new(keys, at) if run is None else self._shared(run, keys, at)
            at += len(run.keys)
            gained += run.join(bit, routing)
            before = self._joined(before, run) if before is not None and before.goes_on_as(run) else run
        self._awaiting[instance] += gained

    def end(self, routing: Routing) -> int:
        """A routing is over; returns how many blocks its instance waits for no more."""
        _, instance = routing.place
        bit, gone = self.bits[instance], 0
        for run in dict.fromkeys(map(self._runs.get, routing.keys)):
            if run is None:
                continue
            if run.awaited.get(bit) is routing:
                gone += run.leave(bit)
            if run.named.get(bit) is routing:
                del run.named[bit]
                if not run.named:
                    del self._first[run.keys[0]]
                    for key in run.keys:
                        del self._runs[key]
        self._awaiting[instance] -= gone
        self._living[instance] -= 1
        if not self._living[instance]:
            del self._living[instance], self._awaiting[instance], self.bits[instance], self.names[bit]
            self._used ^= bit
        return gone

    def confirm(self, instance: str, keys: Iterable[int]) -> int:
        """Events of the instance spoke of these blocks; returns for how many of them it waited."""
        bit = self.bits.get(instance, 0)
        spoken: dict[Run, dict[int, None]] = {}
        for key in keys:
            run = self._runs.get(key)
            if run is not None and run.mask & bit:
                spoken.setdefault(run, {})[key] = None
        gone = 0
        for run, those in spoken.items():
            for part in self._cut(run, _edges(run.keys, those)):
                if part.keys[0] in those:
                    gone += part.leave(bit)
                    self._join_neighbours(part)
        self._awaiting[instance] -= gone
        return gone

    def _new(self, keys: list[int], at: int) -> Run:
        """A run of blocks that nobody named before."""
        run, runs, before = Run(at, keys[at : at + 1], {}, {}), self._runs, len(self._runs)
        own = []
        for key in islice(keys, at, None):
            if runs.setdefault(key, run) is not run:
                break  # callers' own keys need not be a chain
            own.append(key)
        run.lie(at, own if len(runs) - before == len(own) else list(dict.fromkeys(own)))
        self._first[keys[at]] = run
        return run

    def _shared(self, run: Run, keys: list[int], at: int) -> Run:
        """A run of the blocks of this one that these keys have, too, from this place on."""
        start = at - run.at
        if not (0 <= start < len(run.keys) and run.keys[start] == keys[at]):
            self._cut(run, range(1, len(run.keys)))  # it lies elsewhere, as it may if keys are no chain
            return self._runs[keys[at]]
        low, high = 1, min(len(run.keys) - start, len(keys) - at)
        middle = high  # mostly all of it
        while low < high:
            if run.keys[start + low : start + middle] == keys[at + low : at + middle]:
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        self._cut(run, [edge for edge in (start, start + low) if 0 < edge < len(run.keys)])
        return self._runs[keys[at]]

    def _cut(self, run: Run, edges: Sequence[int]) -> list[Run]:
        """Runs in the place of one; the longest stays what it is."""
        if not edges:
            return [run]
        parts = list(pairwise((0, *edges, len(run.keys))))
        longest, at, keys = max(parts, key=lambda part: part[1] - part[0]), run.at, run.keys
        runs = []
        for start, stop in parts:
            if (start, stop) == longest:
                run.lie(at + start, keys[start:stop])
                runs.append(run)
            else:
                runs.append(Run(at + start, keys[start:stop], run.named.copy(), run.awaited.copy()))
                self._runs.update(dict.fromkeys(runs[-1].keys, runs[-1]))
            self._first[runs[-1].keys[0]] = runs[-1]
        return runs

    def _join_neighbours(self, run: Run) -> None:
        """Events speak of block after block: that leaves no edges behind."""
        keys = next(iter(run.named.values())).keys
        if keys[run.at : run.at + 1] != run.keys[:1]:
            return
        before = self._runs.get(keys[run.at - 1]) if run.at else None
        if before is not None and before.goes_on_as(run):
            run = self._joined(before, run)
        behind = self._runs.get(keys[run.stop]) if run.stop < len(keys) else None
        if behind is not None and run.goes_on_as(behind):
            self._joined(run, behind)

    def _joined(self, first: Run, second: Run) -> Run:
        """One run in the place of two; the longer one stays."""
        stays, goes = (first, second) if len(first.keys) >= len(second.keys) else (second, first)
        self._runs.update(dict.fromkeys(goes.keys, stays))
        del self._first[second.keys[0]]
        self._first[first.keys[0]] = stays
        at, keys = first.at, first.keys
        keys += second.keys
        stays.lie(at, keys)
        return stays


def _edges(keys: list[int], some: Collection[int]) -> list[int]:
    """Where in these keys those of some begin and end."""
    start = keys.index(next(iter(some)))
    stop = start + len(some)
    if keys[start:stop] != list(some):  # events mostly speak of blocks in their order
        return [i for i, (one, two) in enumerate(pairwise(keys), 1) if (one in some) is not (two in some)]
    return [edge for edge in (start, stop) if 0 < edge < len(keys)]


def _parting(run: Run, keys: Sequence[int], at: int) -> int:
    """How far a prompt goes along a run that has its block at this place: not to its end, or it lies elsewhere."""
    low, high = at + 1, min(run.stop, len(keys))
    if not (run.at <= at < run.stop and run.keys[at - run.at] == keys[at]):
        return low
    while low < high:
        middle = (low + high) // 2
        if run.keys[middle - run.at] == keys[middle]:
            low = middle + 1
        else:
            high = middle
    return low
