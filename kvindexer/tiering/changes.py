"""What has changed of late, for those who keep a view of the index of their own.

    batches ─► rings, one a source:  ... (seq, which hashes) (seq, which hashes) ─► followers
                                                 │
                                                 └ what a hash is now is asked of the index when it is told

Nothing is worked out for a batch when it comes: its list of hashes is kept as it is.  What is told of a hash is
absolute, where it lies now, so telling it twice or late does no harm, and a follower that lags is told less.

A follower is given each source's content from the start (a reset), or from its position on.  A position can be taken
up if the ring still has the message that it stands behind.  On another replica also its content must be the same:
both sound and complete at that message of the same life, and no hashes shared with other sources, which replicas may
have heard in another order.  Everything else begins anew.

Invariant: a follower that has been told all that there is has exactly the content of the index.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Final, NamedTuple, Protocol

from kvindexer.index.records import Spot, read
from kvindexer.index.seam import Change, Index
from kvindexer.index.topology import is_store
from kvindexer.tiering.position import Mark, Position, mark_digest
from kvindexer.types import SourceSpec

PIECE: Final = 512
"""Hashes that are told at once."""

_Family = tuple[str, str, str]
"""Tenant, model and salt: only sources that have them in common can share hashes."""
_ENTRY_BYTES: Final = 200
_HASH_BYTES: Final = 8
_MOST_DEAD: Final = 1024
_MOST: Final = 2**64 - 1
_NOTHING_YET: Final = -1
"""The seq before a life's first."""


class Life(Protocol):
    """What a source's stream knows of its life; `events.stream.Stream` does."""

    @property
    def epoch(self) -> int:
        """Which life it is."""

    @property
    def last_seq(self) -> int | None:
        """Of the last message that was applied."""

    @property
    def sound(self) -> bool:
        """Nothing is claimed that may be gone."""

    @property
    def complete(self) -> bool:
        """Nothing that is held may be missing."""

    def applied_digest(self, seq: int) -> bytes | None:
        """Digest of an applied message, if it was one of the last ones."""


class Reset(NamedTuple):
    """Forget what was told of a source: what it holds now follows."""

    source: str
    spec: SourceSpec
    epoch: int
    seq: int | None


class Block(NamedTuple):
    """A block that is held: which one, and where it lies now."""

    hash: int
    key: int | None
    block_size: int
    spots: tuple[Spot, ...]


class Blocks(NamedTuple):
    """What some hashes of a source are now."""

    source: str
    spec: SourceSpec
    epoch: int
    seq: int | None
    held: list[Block]
    removed: list[int]
    rest: int | None
    """After a reset: how many hashes are still to come."""


class Gone(NamedTuple):
    """A source is not registered any more."""

    source: str


Told = Reset | Blocks | Gone


_UNFINISHED: Final = Mark(0, 0, b"", 0, exact=False)
"""Something of the source was told, and not all since: it begins anew, or is gone."""


class TooSlowError(Exception):
    """What a follower should have been told next is not kept any more."""


_Entry = tuple[int | None, bytes, "array[int]"]
"""A message: its seq, its digest, which hashes it may have changed; without a seq: a message of another source."""


class _Ring:
    """The recent changes of one source."""

    def __init__(self, source: str, spec: SourceSpec, life: Life, generation: int) -> None:
        self.source = source
        self.spec = spec
        self.life = life
        self.generation = generation
        """Another one: nothing that was told before counts."""
        self.entries: deque[_Entry] = deque()
        self.first = 0
        """Number of the first entry that is kept; numbers never start again."""
        self.before: tuple[int, bytes] | None = None
        """The message before that entry."""
        self._dropped = (_NOTHING_YET, b"")
        self.dead = 0
        """Entries that were dropped before it was their turn."""

    @property
    def end(self) -> int:
        """Number of the entry to come."""
        return self.first + len(self.entries)

    @property
    def last(self) -> tuple[int, bytes]:
        """The newest message."""
        return next(((seq, digest) for seq, digest, _ in reversed(self.entries) if seq is not None), self._dropped)

    def begin(self, generation: int) -> int:
        """Nothing of what is kept counts any more; returns how many bytes that was."""
        size = sum(map(_size, self.entries))
        self.generation = generation
        self.first = self.end
        self.dead += len(self.entries)
        self.entries.clear()
        seq = self.life.last_seq
        digest = b"" if seq is None else self.life.applied_digest(seq) or b""
        self.before = self._dropped = (_NOTHING_YET, b"") if seq is None else (seq, digest)
        return size

    def drop_first(self) -> int:
        """The oldest entry is kept no longer; returns how many bytes it was."""
        if self.dead:
            self.dead -= 1
            return 0
        entry = self.entries.popleft()
        self.first += 1
        seq, digest, _ = entry
        self.before = None if seq is None else (seq, digest)
        if seq is not None:
            self._dropped = (seq, digest)
        return _size(entry)

    def behind(self, mark: Mark) -> int | None:
        """Number of the entry behind a mark; None: the mark is too old, too new or of another life."""
        if self.before is not None and _is_at(mark, *self.before):
            return self.first
        for number, (seq, digest, _) in enumerate(self.entries, self.first + 1):
            if seq is not None and _is_at(mark, seq, digest):
                return number
        return None


class _Cursor:
    """How far a follower has been told of a source."""

    def __init__(self, generation: int, at: int, last: tuple[int, bytes]) -> None:
        self.generation = generation
        self.at = at
        self.last = last


class _Snapshot(NamedTuple):
    """The content of a source, on its way to a follower."""

    source: str
    cursor: _Cursor
    hashes: Iterator[int]
    rest: int
    """How many are still to come."""


class ChangeLog:
    """The recent changes of all sources, bounded in bytes.

    `name` tells this log from those of other replicas and of earlier processes.
    """

    def __init__(self, index: Index, max_bytes: int, name: str) -> None:
        self.index = index
        self.name = name
        self._max_bytes = max_bytes
        self._rings: dict[str, _Ring] = {}
        self._order: deque[_Ring] = deque()
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
            ring = self._rings[source] = _Ring(source, spec, life, 0)
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
        ring.entries.append((seq, ring.life.applied_digest(seq) or b"", touched))
        self._order.append(ring)
        self._bytes += _ENTRY_BYTES + _HASH_BYTES * len(touched)
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
                self._bytes += _size(entry)
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
    def rings(self) -> dict[str, _Ring]:
        """By source."""
        return self._rings

    def exact(self, ring: _Ring) -> bool:
        """Whether every replica that is as sure as this one has the same content at the same message."""
        sure = ring.life.sound and ring.life.complete and not self.index.truncated(ring.source)
        return sure and not self._shares_hashes(ring)

    def _begin(self, ring: _Ring) -> None:
        self._generations += 1
        self._bytes -= ring.begin(self._generations)
        self._tell(ring)
        if len(self._order) > _MOST_DEAD + 2 * sum(len(each.entries) for each in self._rings.values()):
            self._bury()

    def _bury(self) -> None:
        """Leave out what is dead: it would stay until the bound is reached."""
        kept: deque[_Ring] = deque()
        for ring in self._order:
            if ring.dead:
                ring.dead -= 1
            else:
                kept.append(ring)
        self._order = kept

    def _tell(self, ring: _Ring) -> None:
        for follower in self._followers:
            follower.changed(ring)

    def _shares_hashes(self, ring: _Ring) -> bool:
        return self._stores[_family(ring.spec)] > 0


class Follower:
    """Who is told; `step` says what next."""

    def __init__(
        self, log: ChangeLog, fits: Callable[[SourceSpec], bool], since: Position | None, wake: Callable[[], None]
    ) -> None:
        self._log = log
        self._fits = fits
        self._wake = wake
        self._cursors: dict[str, _Cursor] = {}
        self._changed: dict[str, None] = {}
        self._fresh: dict[str, None] = {}
        """Sources that are to be told from the start."""
        self._snapshot: _Snapshot | None = None
        self._gone: list[str] = []
        self._turn = False
        marks = {} if since is None else since.marks
        self._holds = set(marks)
        """Sources of which it may have some content."""
        for source, ring in log.rings.items():
            if fits(ring.spec):
                self._begin_with(ring, since, marks.get(source))
        self._gone += (source for source in marks if source not in self._changed)
        self._holds.difference_update(self._gone)

    def _begin_with(self, ring: _Ring, since: Position | None, mark: Mark | None) -> None:
        self._changed[ring.source] = None
        if since is None or mark is None:
            return
        known = mark.generation == ring.generation if since.log == self._log.name else mark.exact
        if not known or (since.log != self._log.name and not self._log.exact(ring)):
            return
        number = ring.behind(mark)
        if number is not None:
            self._cursors[ring.source] = _Cursor(ring.generation, number, (mark.next - 1, mark.digest))

    # What the log says

    def changed(self, ring: _Ring) -> None:
        """There is something new of a source."""
        if self._fits(ring.spec):
            self._changed[ring.source] = None
            self._wake()

    def lost(self, source: str) -> None:
        """A source is not there any more."""
        self._cursors.pop(source, None)
        if self._snapshot is not None and self._snapshot.source == source:
            self._snapshot = None
        if source in self._holds:
            self._holds.remove(source)
            self._gone.append(source)
            self._wake()

    # What is told

    def step(self) -> Told | None:
        """The next piece; None: everything is told for now.  Raises TooSlowError."""
        if self._gone:
            return Gone(self._gone.pop())
        self._turn = not self._turn  # so that a long snapshot keeps nobody from hearing of other sources
        first, second = (self._next_change, self._next_of_snapshot)[:: 1 if self._turn else -1]
        return first() or second() or first()

    @property
    def position(self) -> Position:
        """Where to go on from what was told so far."""
        marks = dict.fromkeys((*self._holds, *self._gone), _UNFINISHED)
        for source, cursor in self._cursors.items():
            ring = self._log.rings.get(source)
            if ring is not None and ring.generation == cursor.generation:
                seq, digest = cursor.last
                behind = min(seq + 1, _MOST)
                exact = self._log.exact(ring)
                marks[source] = Mark(ring.life.epoch, behind, mark_digest(digest), ring.generation, exact)
        return Position(self._log.name, marks)

    def _next_change(self) -> Told | None:
        while self._changed:
            source = next(iter(self._changed))
            ring = self._log.rings.get(source)
            cursor = self._cursors.get(source)
            if ring is None or (self._snapshot is not None and self._snapshot.source == source):
                del self._changed[source]
                continue
            if cursor is None or cursor.generation != ring.generation:
                del self._changed[source]
                self._cursors.pop(source, None)
                self._fresh[source] = None
                continue
            if cursor.at < ring.first:
                raise TooSlowError
            if cursor.at == ring.end:
                del self._changed[source]
                continue
            hashes: dict[int, None] = {}
            for entry in islice(ring.entries, cursor.at - ring.first, None):
                seq, digest, touched = entry
                hashes.update(dict.fromkeys(touched))
                cursor.at += 1
                if seq is not None:
                    cursor.last = (seq, digest)
                if len(hashes) >= PIECE:
                    break
            if hashes:
                return self._blocks(ring, hashes, cursor.last[0], None)
        return None

    def _next_of_snapshot(self) -> Told | None:
        snapshot = self._snapshot
        if snapshot is not None:
            ring = self._log.rings.get(snapshot.source)
            if ring is not None and ring.generation == snapshot.cursor.generation:
                return self._go_on(ring, snapshot)
            self._snapshot = None
            if ring is not None:
                self._fresh[snapshot.source] = None
        while self._fresh:
            source = next(iter(self._fresh))
            del self._fresh[source]
            ring = self._log.rings.get(source)
            if ring is None or not self._fits(ring.spec):
                continue
            hashes = self._log.index.hashes(source)
            cursor = _Cursor(ring.generation, ring.end, ring.last)
            self._holds.add(source)
            self._snapshot = _Snapshot(source, cursor, iter(hashes), len(hashes))
            return Reset(source, ring.spec, ring.life.epoch, _seq(ring.last[0]))
        return None

    def _go_on(self, ring: _Ring, snapshot: _Snapshot) -> Told:
        hashes = list(islice(snapshot.hashes, PIECE))
        rest = snapshot.rest - len(hashes)
        self._snapshot = snapshot._replace(rest=rest)
        if not rest:
            self._snapshot = None
            self._cursors[ring.source] = snapshot.cursor
            self._changed[ring.source] = None
        return self._blocks(ring, hashes, snapshot.cursor.last[0], rest)

    def _blocks(self, ring: _Ring, hashes: Iterable[int], seq: int, rest: int | None) -> Blocks:
        hashes = list(hashes)
        own = ring.spec.block_size
        held: list[Block] = []
        removed: list[int] = []
        for block_hash, packed in zip(hashes, self._log.index.records(ring.source, hashes), strict=True):
            record = read(packed, own) if packed else None
            if record is not None and record.spots:
                held.append(Block(block_hash, record.key, record.block_size, record.spots))
            elif rest is None:
                removed.append(block_hash)
        return Blocks(ring.source, ring.spec, ring.life.epoch, _seq(seq), held, removed, rest)


def _family(spec: SourceSpec) -> _Family:
    return spec.tenant, spec.model, spec.additional_salt


def _is_at(mark: Mark, seq: int, digest: bytes) -> bool:
    return mark.next == seq + 1 and mark.digest == mark_digest(digest) and (bool(digest) or seq == _NOTHING_YET)


def _size(entry: _Entry) -> int:
    return _ENTRY_BYTES + _HASH_BYTES * len(entry[2])


def _seq(seq: int) -> int | None:
    return None if seq == _NOTHING_YET else seq
