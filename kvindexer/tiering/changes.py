"""What has changed of late, for those who keep a view of the index of their own.

    batches ─► rings, one a source:  ... (seq, which hashes) (seq, which hashes) ─► followers
               (tiering.ring)                    │                                  (tiering.follower)
                                                 └ what a hash is now is asked of the index when it is told

Nothing is worked out for a batch when it comes: its list of hashes is kept as it is.  What is told of a hash is
absolute, where it lies now, so telling it twice or late does no harm, and a follower that lags is told less.

Invariant: what is kept of all sources together takes no more than its bound of bytes; the oldest goes first.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Final

from kvindexer.index.seam import Change, Index
from kvindexer.index.topology import is_store
from kvindexer.tiering.follower import Follower
from kvindexer.tiering.position import Position
from kvindexer.tiering.ring import Life, Ring, size_of
from kvindexer.types import SourceSpec

_Family = tuple[str, str, str]
"""Tenant, model and salt: only sources that have them in common can share hashes."""
_MOST_DEAD: Final = 1024


class ChangeLog:
    """The recent changes of all sources, bounded in bytes.

    `name` tells this log from those of other replicas and of earlier processes.
    """

    def __init__(self, index: Index, max_bytes: int, name: str) -> None:
        self.index = index
        self.name = name
        self._max_bytes = max_bytes
        self._rings: dict[str, Ring] = {}
        self._order: deque[Ring] = deque()
        """Whose the entries are, in the order in which they came; the first ones of a ring may be dead."""
        self._bytes = 0
        self._generations = 0
        self._followers: list[Follower] = []
        self._stores: Counter[_Family] = Counter()

    # What happens

    def attached(self, source: str, spec: SourceSpec, life: Life) -> None:
        """A source was attached to the index, or its share was loaded."""
        ring = self._rings.get(source)
        if ring is None or ring.life is not life:
            self.forgotten(source)
            ring = self._rings[source] = Ring(source, spec, life, 0)
            self._stores[_family(spec)] += is_store(spec)
        self._begin(ring)
        if self._shares_hashes(ring):  # what their hashes mean may have changed
            for other in self._rings.values():
                if other is not ring and _family(other.spec) == _family(spec):
                    self._begin(other)

    def applied(self, source: str, seq: int, change: Change) -> None:
        """A message went into the index."""
        ring = self._rings.get(source)
        if ring is None:
            return
        touched, touched_of = change.touched, change.touched_of
        entry = (seq, ring.life.applied_digest(seq) or b"", touched)
        ring.entries.append(entry)
        self._order.append(ring)
        self._bytes += size_of(entry)
        if self._followers:
            self._tell(ring)
        if touched_of:
            self._applied_to_others(touched_of)
        while self._bytes > self._max_bytes:
            self._bytes -= self._order.popleft().drop_first()

    def _applied_to_others(self, touched_of: Mapping[str, array[int]]) -> None:
        for name, hashes in touched_of.items():
            other = self._rings.get(name)
            if other is not None:
                entry = (None, b"", hashes)
                other.entries.append(entry)
                self._order.append(other)
                self._bytes += size_of(entry)
                self._tell(other)

    def withdrawn(self, source: str) -> None:
        """Entries of a source were dropped because they may be gone."""
        ring = self._rings.get(source)
        if ring is not None:
            self._begin(ring)

    def forgotten(self, source: str) -> None:
        """A source is followed no longer."""
        ring = self._rings.pop(source, None)
        if ring is not None:
            self._stores[_family(ring.spec)] -= is_store(ring.spec)
            self._bytes -= ring.begin(0)
            for follower in self._followers:
                follower.lost(source)

    # Followers

    @property
    def followers(self) -> int:
        """How many are told."""
        return len(self._followers)

    @property
    def kept_bytes(self) -> int:
        """What is kept for them, whether there are any or not."""
        return self._bytes

    def follow(
        self, fits: Callable[[SourceSpec], bool], since: Position | None, wake: Callable[[], None]
    ) -> Follower:
        """Tell somebody of all sources that fit; `wake` is called when there is something to tell."""
        follower = Follower(self, fits, since, wake)
        self._followers.append(follower)
        return follower

    def unfollow(self, follower: Follower) -> None:
        """Nobody is told any more."""
        self._followers.remove(follower)

    @property
    def rings(self) -> dict[str, Ring]:
        """By source."""
        return self._rings

    def exact(self, ring: Ring) -> bool:
        """Whether every replica that is as sure as this one has the same content at the same message."""
        sure = ring.life.sound and ring.life.complete and not self.index.truncated(ring.source)
        return sure and not self._shares_hashes(ring)

    def _begin(self, ring: Ring) -> None:
        self._generations += 1
        self._bytes -= ring.begin(self._generations)
        self._tell(ring)
        if len(self._order) > _MOST_DEAD + 2 * sum(len(each.entries) for each in self._rings.values()):
            self._bury()

    def _bury(self) -> None:
        """Leave out what is dead: it would stay until the bound is reached."""
        kept: deque[Ring] = deque()
        for ring in self._order:
            if ring.dead:
                ring.dead -= 1
            else:
                kept.append(ring)
        self._order = kept

    def _tell(self, ring: Ring) -> None:
        for follower in self._followers:
            follower.changed(ring)

    def _shares_hashes(self, ring: Ring) -> bool:
        return self._stores[_family(ring.spec)] > 0


def _family(spec: SourceSpec) -> _Family:
    return spec.tenant, spec.model, spec.additional_salt
